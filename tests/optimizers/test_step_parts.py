"""What each part of the optimizer's step does to the entropy: loops, other backends, enumeration, finite differences."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import enumerable
import support
from entropy_probe import AdamState, InputError, ProbeResult, Settings, probe
from entropy_probe.data.rollouts import group_rollouts
from entropy_probe.data.units import Mode, Units, block_units, exact_units
from entropy_probe.gradients import Storage, UnitGradients, Wanted, reference, response_dots, unit_gradients
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.model.policy import Policy
from entropy_probe.model.virtual_step import virtual_step
from entropy_probe.optimizers.adamw_step import adamw_step
from entropy_probe.optimizers.clipping import clip_factor, gradient_norm
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.optimizers.gradient_weights import gradient_factors
from entropy_probe.optimizers.state import AdamGroup, AdamMoments
from entropy_probe.optimizers.step_parts import PARTS, StepPrediction, predict_parts
from entropy_probe.optimizers.steps_of_others import StepsOfOthers
from entropy_probe.report import AdamWPart, FallSection, WhatIfRow, WhatIfSection
from entropy_probe.report.sentences import step_sentence
from entropy_probe.report.text import print_report
from entropy_probe.statistics.quantiles import t_quantile
from entropy_probe.targets.base import Sample
from entropy_probe.targets.choices import EntropyUnit, Estimator
from entropy_probe.targets.entropy import EntropyTarget
from entropy_probe.targets.per_token import entropy_ratio
from enumerable import EnumerablePolicy
from oracle import optimizer_step, parts_with_v_at_t
from step_setting import coefficients, setting

MAX_GRAD_NORM = 0.05
DEFAULTS = Settings()


def looked(units: Units, target: EntropyTarget, storage: Storage) -> UnitGradients:
    model, adam, batch = setting()

    def look(ascent: dict[str, Tensor], terms: Sequence[dict[str, Tensor]]) -> StepsOfOthers:
        assert not terms
        factor = clip_factor(gradient_norm(ascent), MAX_GRAD_NORM)
        assert factor < 1.0
        return StepsOfOthers(dict(model.named_parameters()), adam, ascent, factor, units.sizes)

    p = {name: torch.ones_like(q) for name, q in model.named_parameters()}
    policy = Policy(model, microbatch_size=5)
    return unit_gradients(
        policy, batch, units, Sides(target, coefficients(batch)), Geometry.fixed(p),
        wanted=Wanted(storage, look=look),  # type: ignore[arg-type]
    )  # fmt: skip


TARGETS = [EntropyTarget(e, u) for e in Estimator for u in EntropyUnit]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.estimator}-{t.unit}")
@pytest.mark.parametrize("storage", list(Storage))
@pytest.mark.parametrize("units", [exact_units(7), block_units(7, 3)], ids=["exact", "blocks"])
def test_every_unit_is_met_by_the_step_of_the_others(units: Units, storage: Storage, target: EntropyTarget) -> None:
    """Slowly: the other prompts' own gradient, torch's step from it, and every response's dot with its parts."""
    model, adam, batch = setting()
    found = looked(units, target, storage).looked
    assert found is not None
    policy, a = Policy(model, microbatch_size=5), coefficients(batch)
    group_of_row = np.repeat(np.arange(7), batch.group_sizes)
    unit_of = np.array(units.of_rows(batch.group_sizes))

    def ascent_of(rows: np.ndarray) -> dict[str, Tensor]:
        kept = [r for r, inside in zip(batch.responses, rows, strict=True) if inside]
        sums = reference.loss_gradient(policy, kept, a[torch.from_numpy(rows)])
        return {name: y / len(set(group_of_row[rows])) for name, y in sums.items()}

    whole = ascent_of(np.ones(len(unit_of), dtype=bool))
    factor = clip_factor(gradient_norm(whole), MAX_GRAD_NORM)

    def parts(ascent: dict[str, Tensor], *, updated_v: bool) -> list[dict[str, Tensor]]:
        clipped = {name: factor * y for name, y in ascent.items()}
        if not updated_v:
            return list(parts_with_v_at_t(policy.trainable(), adam, clipped))
        step = adamw_step(policy.trainable(), adam, clipped)
        return [dict(step.momentum), dict(step.gradient), dict(step.weight_decay)]

    asked: list[dict[str, Tensor]] = []
    for u in range(len(units.ranges)):
        others = ascent_of(unit_of != u)
        asked += [*parts(others, updated_v=True), *parts(others, updated_v=False)]
    # J along every unit's own sum, by a central difference.
    for u in range(len(units.ranges)):
        own = {n: y * len(units.ranges[u]) for n, y in ascent_of(unit_of == u).items()}
        eps = 1e-4
        ends = [
            parts({n: y + sign * eps * own[n] if n in own else y for n, y in whole.items()}, updated_v=True)[1]
            for sign in (1, -1)
        ]
        asked.append({n: (ends[0][n] - ends[1][n]) / (2 * eps) for n in ends[0]})

    measured = policy.measure(batch.responses, entropies=True)
    assert measured.entropies is not None
    entropies = torch.stack([h.sum() for h in torch.split(measured.entropies, batch.lengths)])
    of = -measured.scores if target.estimator is Estimator.SCORE else entropies
    ratio = entropy_ratio(of, batch.lengths, batch.group_sizes)
    x = target.coefficients(Sample.of(batch, measured), ratio)
    dots = response_dots(policy, batch, asked, [x])[:, 0].numpy()
    count = len(units.ranges)
    by_unit = np.array([dots[unit_of == u].sum(0) for u in range(count)])
    for u in range(count):
        expected = by_unit[u, 6 * u : 6 * u + 6]
        np.testing.assert_allclose(found.along[u], expected, rtol=0, atol=1e-11 * np.abs(by_unit).max())
        # Planted: the step of all units, the own one in it, is another.
        assert (
            np.abs(found.along[u] - by_unit[u, 6 * ((u + 1) % count) : 6 * ((u + 1) % count) + 6]).max()
            > 1e-6 * np.abs(expected).max()
        )
    if storage is Storage.STREAMED:
        assert found.kernel is None
    else:
        assert found.kernel is not None
        np.testing.assert_allclose(
            found.kernel, by_unit[:, 6 * count :], rtol=0, atol=1e-5 * np.abs(found.kernel).max()
        )


@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "coupled"])
@pytest.mark.parametrize("amsgrad", [True, False], ids=["amsgrad", "plain"])
def test_the_response_of_the_gradients_part_is_its_derivative(decoupled: bool, amsgrad: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, 9, generator=generator, dtype=torch.float64)
    v = 0.1 * draw() ** 2
    moments = {"a": AdamMoments(3, draw(), v, 2.0 * draw() ** 2)}
    state = AdamState((AdamGroup(("a",), 0.3, 0.9, 0.6, 1e-2, 0.2, amsgrad, False, decoupled),), moments)
    theta, y, factor = {"a": draw()}, draw(), 0.7

    def gradient(ascent: Tensor) -> Tensor:
        return adamw_step(theta, state, {"a": factor * ascent}).gradient["a"]

    steps, eps = StepsOfOthers(theta, state, {"a": y}, factor, [2, 1]), 1e-6
    torch.testing.assert_close(
        steps.response("a", slice(0, 9)), (gradient(y + eps) - gradient(y - eps)) / (2 * eps), rtol=1e-6, atol=1e-8
    )
    # Every part from the others' mean, a piece at a time.
    x, own = torch.stack([draw(), draw()]), torch.stack([draw(), draw()])
    pieces = sum(steps.along("a", part, x[:, part], own[:, part], range(2)) for part in (slice(0, 4), slice(4, 9)))
    for u, size in enumerate((2, 1)):
        others = {"a": factor * (3 * y - own[u]) / (3 - size)}
        step = adamw_step(theta, state, others)
        updated = (step.momentum, step.gradient, step.weight_decay)
        for k, parts in enumerate((updated, parts_with_v_at_t(theta, state, others))):
            expected = [float(x[u] @ part["a"]) for part in parts]
            np.testing.assert_allclose(pieces[u, 3 * k : 3 * k + 3].numpy(), expected, rtol=1e-12)  # type: ignore[index]


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 2, 1, 1]], ids=["equal", "unequal"])
def test_predictions_are_means_over_prompts_with_the_error_of_their_sum(sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    units, counts = len(sizes), np.array(sizes, dtype=float)
    along, kernel = rng.normal(size=(units, 6)), rng.normal(size=(units, units))
    found = predict_parts(along, kernel, sizes)
    pairs = counts * (counts.sum() - counts)
    means = [
        -(weights / weights.sum()) @ (along[:, k] / counts) for k, weights in enumerate([counts, pairs, counts] * 2)
    ]
    np.testing.assert_allclose([*found.values, *found.values_v_at_t], means, rtol=1e-12)
    if sizes != [1] * 6:
        assert found.total.se is None
        assert "equal size" in found.total.why_not
        assert found.of(momentum=1.0).se is not None
        return
    off = kernel - np.diag(np.diagonal(kernel))
    centred = np.zeros_like(kernel)
    for u in range(units):
        for w in range(units):
            if u != w:
                centred[u, w] = kernel[u, w] - off[u].sum() / 5 - off[:, w].sum() / 5 + off.sum() / 30
    shared = sum(centred[u, w] * centred[w, u] for u in range(units) for w in range(units)) / 30**2
    assert found.shared_noise == pytest.approx(shared, rel=1e-12)
    rows = -along[:, :3].sum(1)
    variance = rows.var(ddof=1) / units + shared
    assert found.total.se == pytest.approx(np.sqrt(max(0.0, variance)), rel=1e-12)
    half_width = 2.570581836 * found.total.se  # Student's quantile of five degrees of freedom
    assert found.total.ci95 == pytest.approx((found.total.value - half_width, found.total.value + half_width))
    streamed = predict_parts(along, None, sizes).of(gradient=1.0)
    assert streamed.ci95 is None
    assert "needs the matrix" in streamed.why_not


@functools.cache
def enumerated() -> tuple[EnumerablePolicy, AdamState, list[tuple[Tensor, Tensor]]]:
    """A policy with six contexts, a state of Adam, and S and ∇S of every response to every context."""
    policy = EnumerablePolicy(contexts=6, tokens=3, seed=3)
    generator = torch.Generator().manual_seed(5)
    moments = {
        name: AdamMoments(
            4,
            0.02 * torch.randn(p.shape, generator=generator, dtype=torch.float64),
            1e-6 * (0.2 + torch.rand(p.shape, generator=generator, dtype=torch.float64)),
        )
        for name, p in policy.named_parameters()
    }
    group = AdamGroup(tuple(moments), 1e-3, 0.9, 0.99, 1e-8, 0.1, False, False, True)
    return policy, AdamState((group,), moments), [enumerable.score_gradients(policy, c, 3) for c in range(6)]


def flat(policy: EnumerablePolicy, values: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([values[name].flatten() for name, _ in policy.named_parameters()]).numpy()


def drawn(seed: int, prompts: int, adam: AdamState, samples: int = 4) -> tuple[StepPrediction, np.ndarray, np.ndarray]:
    """A batch from the enumerated policy: its prediction, the parts' exact ∇H · Δ, and two planted bugs in the gradient's."""
    policy, _, tables = enumerated()
    rng = np.random.default_rng(seed)
    xs, ys = [], []
    for _ in range(prompts):
        scores, gradients = tables[int(rng.integers(6))]
        p = scores.exp().numpy()
        chosen = rng.choice(len(p), size=samples, p=p / p.sum())
        s, g = scores.numpy()[chosen], gradients.numpy()[chosen]
        reward = (chosen % 3 == 0).astype(float)
        xs.append(((s - (s.sum() - s) / (samples - 1)) / samples) @ g)
        ys.append(((reward - reward.mean()) / samples) @ g)
    x, y = np.array(xs), np.array(ys)
    shapes = {name: p.shape for name, p in policy.named_parameters()}
    ends = np.cumsum([0, *(shape.numel() for shape in shapes.values())])
    places = {name: slice(ends[k], ends[k + 1]) for k, name in enumerate(shapes)}
    ascent = {name: torch.from_numpy(y.mean(0)[places[name]]).view(shape) for name, shape in shapes.items()}
    others = StepsOfOthers(dict(policy.named_parameters()), adam, ascent, 1.0, [1] * prompts)
    along, response = np.zeros((prompts, 6)), np.zeros(ends[-1])
    for name, place in places.items():
        every = slice(0, place.stop - place.start)
        of_x, of_y = torch.from_numpy(x[:, place]), torch.from_numpy(y[:, place])
        along += others.along(name, every, of_x, of_y, range(prompts)).numpy()
        response[place] = others.response(name, every).numpy()
    found = predict_parts(along, (x * response) @ y.T, [1] * prompts)

    step = adamw_step(dict(policy.named_parameters()), adam, ascent)
    parts = np.stack([flat(policy, dict(part)) for part in (step.momentum, step.gradient, step.weight_decay)])
    same_batch = -float((x @ parts[1]).mean())
    # To first order in the own update alone.
    linear = -np.mean([x[n] @ (parts[1] + response * (y.mean(0) - y[n]) / (prompts - 1)) for n in range(prompts)])
    return found, parts @ entropy_gradient(), np.array([same_batch, float(linear)])


@functools.cache
def entropy_gradient() -> np.ndarray:
    policy = enumerated()[0]
    total = sum(enumerable.exact_entropy(policy, c, 3) for c in range(6)) / 6
    return enumerable.flat_gradient(total, policy).numpy()  # type: ignore[arg-type, no-any-return]


def with_little_v() -> AdamState:
    """The same moments with a v that is a small share of v⁺: the step is near the sign of the gradient."""
    _, adam, _ = enumerated()
    return replace(adam, moments={name: replace(m, exp_avg_sq=1e-5 * m.exp_avg_sq) for name, m in adam.moments.items()})


@pytest.mark.parametrize(("prompts", "little"), [(40, False), (16, False), (8, False), (8, True)])
def test_every_part_is_unbiased_and_covers_the_exact_change_as_often_as_its_error_says(
    prompts: int, little: bool
) -> None:
    """Each step's own ∇H · part, by enumeration. X is skew here, so that t intervals of its plain mean cover 93 %.

    At eight units the gradient's interval covers 85 % where v is little.

    Planted: with the own update kept the gradient's part is biased; left out to first order alone too, where v is little.
    """
    adam = with_little_v() if little else enumerated()[1]
    batches = 500
    t = t_quantile(prompts)
    inside = dict.fromkeys((*PARTS, "total"), 0)
    misses, kept, linear, variances = [], [], [], []
    for seed in range(batches):
        found, truth, planted = drawn(seed, prompts, adam)
        for k, name in enumerate(PARTS):
            estimate = found.of(**{name: 1.0})
            assert estimate.se is not None
            inside[name] += abs(estimate.value - truth[k]) < t * estimate.se
        assert found.total.se is not None
        inside["total"] += abs(found.total.value - truth.sum()) < t * found.total.se
        misses.append(found.values - truth)
        kept.append(planted[0] - truth[1])
        linear.append(planted[1] - truth[1])
        variances.append(found.of(gradient=1.0).se ** 2)  # type: ignore[operator]
    for name, count in inside.items():
        assert (0.83 if prompts == 8 else 0.88) < count / batches < 0.995, (name, count / batches)
    spread = np.std(misses, axis=0)
    bias = np.mean(misses, axis=0)
    assert (np.abs(bias) < 4 * spread / np.sqrt(batches) + 0.1 * little * spread).all(), bias / spread
    assert abs(np.mean(kept)) > 3 * np.std(kept) / np.sqrt(batches)
    if little:
        assert abs(np.mean(linear)) > 3 * abs(bias[1])
    else:
        # A mean of few others is noisier than J at Ȳ says.
        least = {40: 0.93, 16: 0.85, 8: 0.7}[prompts]
        assert least < np.sqrt(np.mean(variances)) / spread[1] < 1.15


def test_the_exact_change_along_each_part_is_its_finite_difference() -> None:
    policy, adam, _ = enumerated()
    ascent = {name: 1e-3 * torch.randn_like(p).detach() for name, p in policy.named_parameters()}
    step = adamw_step(dict(policy.named_parameters()), adam, ascent)
    for part in (step.momentum, step.gradient, step.weight_decay):
        ends = []
        for sign in (1e-4, -1e-4):
            with virtual_step(policy, part, sign):
                ends.append(float(sum(enumerable.exact_entropy(policy, c, 3) for c in range(6)).detach()) / 6)  # type: ignore[union-attr]
        difference = (ends[0] - ends[1]) / 2e-4
        assert difference == pytest.approx(float(flat(policy, dict(part)) @ entropy_gradient()), rel=1e-6)


def live(settings: Settings = DEFAULTS, *, adam: AdamState | None = None, prompts: int = 8) -> ProbeResult:
    model, state, _ = setting()
    return probe(model, state if adam is None else adam, support.random_batch(prompts, 3), settings)


@pytest.mark.parametrize("estimator", list(Estimator))
def test_the_gradients_part_with_v_at_t_is_its_factor_of_delta_h1(estimator: Estimator) -> None:
    report = live(Settings(estimator=estimator, max_grad_norm=MAX_GRAD_NORM)).report
    adamw, first = report.adamw, report.first_order
    assert adamw.clip_factor == pytest.approx(MAX_GRAD_NORM / (adamw.gradient_norm + 1e-6))
    assert adamw.clip_factor < 1
    factor = (1 - 0.9) / (1 - 0.9**6)
    assert adamw.gradient_factor == pytest.approx(factor, rel=1e-12)
    assert first.delta_h1_se_this_step is not None
    assert adamw.u_statistic == pytest.approx(factor * adamw.clip_factor * first.delta_h1, rel=1e-10)
    assert adamw.u_statistic_se == pytest.approx(factor * adamw.clip_factor * first.delta_h1_se_this_step, rel=1e-10)
    assert adamw.parts["gradient"].v_at_t == pytest.approx(adamw.u_statistic, rel=1e-9)
    assert adamw.parts["gradient"].value != pytest.approx(adamw.u_statistic, rel=1e-4)
    assert adamw.total == pytest.approx(sum(adamw.parts[name].value for name in PARTS), rel=1e-12)
    assert adamw.v_at_t == pytest.approx(sum(adamw.parts[name].v_at_t for name in PARTS), rel=1e-12)


def test_where_this_gradient_is_a_trace_of_v_the_error_is_that_of_delta_h1s_this_step() -> None:
    """The noise that X and Y share included, where it adds to the rows'."""
    model, adam, _ = setting()
    large = {name: replace(m, exp_avg_sq=1e12 * m.exp_avg_sq + 1e6) for name, m in adam.moments.items()}
    groups = tuple(replace(group, beta2=1.0 - 1e-9) for group in adam.groups)
    shared = []
    for seed in range(4):
        report = probe(model, AdamState(groups, large), support.random_batch(8, 3, seed=seed)).report
        part, first = report.adamw.parts["gradient"], report.first_order
        assert first.se_this_step is not None
        assert report.adamw.u_statistic is not None
        assert report.adamw.u_statistic_se is not None
        of_rows = np.std(first.row_x, ddof=1) / np.sqrt(8)
        shared.append(first.se_this_step / of_rows)
        # v decays by nothing from step 5 to 6, and its bias correction is that of one step more.
        assert part.value == pytest.approx(math.sqrt(6 / 5) * report.adamw.u_statistic, rel=1e-6, abs=0)
        assert part.se == pytest.approx(math.sqrt(6 / 5) * report.adamw.u_statistic_se, rel=1e-6)
    assert min(shared) < 1 < 1.02 < max(shared)


def test_parameters_in_chunks_are_parameters_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = looked(exact_units(7), EntropyTarget(), Storage.STORED)
    monkeypatch.setattr("entropy_probe.gradients.products.CHUNK", 2 * 7 * 11)
    parts = looked(exact_units(7), EntropyTarget(), Storage.STORED)
    assert whole.looked is not None
    assert parts.looked is not None
    for name in ("along", "kernel"):
        expected = getattr(whole.looked, name)
        np.testing.assert_allclose(getattr(parts.looked, name), expected, rtol=0, atol=1e-13 * np.abs(expected).max())


def test_streamed_vectors_give_the_same_parts() -> None:
    stored = live(Settings(blocks=4)).report
    # So little memory that one pair of vectors a block does not fit.
    streamed = live(Settings(mode=Mode.EXACT, memory_bytes=2e4, microbatch_size=3)).report
    exact = live(Settings(mode=Mode.EXACT)).report
    assert streamed.units.storage == "streamed"
    for name in PARTS:
        assert streamed.adamw.parts[name].value == pytest.approx(exact.adamw.parts[name].value, rel=1e-9)
        assert streamed.adamw.parts[name].v_at_t == pytest.approx(exact.adamw.parts[name].v_at_t, rel=1e-9)
    # Decoupled weight decay does not ask which unit a response is in, and momentum with v at t does not.
    assert stored.adamw.parts["weight_decay"].value == pytest.approx(exact.adamw.parts["weight_decay"].value, rel=1e-9)
    assert stored.adamw.parts["momentum"].v_at_t == pytest.approx(exact.adamw.parts["momentum"].v_at_t, rel=1e-9)
    assert stored.adamw.parts["gradient"].value != pytest.approx(exact.adamw.parts["gradient"].value, rel=1e-3)
    assert "streaming" in streamed.adamw.parts["gradient"].null_reasons["se"]
    assert "streaming" in streamed.adamw.null_reasons["se"]
    assert "it has no error: needs the matrix of unit dots" in streamed.headline
    assert exact.adamw.ci95 == pytest.approx(
        [exact.adamw.total + sign * t_quantile(8) * (exact.adamw.se or 0.0) for sign in (-1, 1)], rel=1e-12
    )
    assert streamed.adamw.parts["momentum"].se == pytest.approx(exact.adamw.parts["momentum"].se, rel=1e-9)
    streamed.to_dict()


def test_parameters_of_one_learning_rate_with_steps_of_their_own_have_no_common_factor() -> None:
    _, adam, _ = setting()
    name = next(iter(adam.moments))
    mixed = AdamState(adam.groups, {**adam.moments, name: replace(adam.moments[name], step=9)})
    assert gradient_factors(mixed, mixed.moments) is None
    assert gradient_factors(mixed, [name]) is not None
    report = live(adam=mixed).report
    assert report.adamw.gradient_factor is None
    assert report.adamw.u_statistic is None
    assert "number of steps" in report.adamw.null_reasons["u_statistic"]
    assert report.adamw.parts["gradient"].se is not None
    report.to_dict()
    rates = AdamState((replace(adam.groups[0], learning_rate=3e-4, beta1=0.5), *adam.groups[1:]), adam.moments)
    apart = live(adam=rates).report.adamw
    assert apart.gradient_factor == pytest.approx([0.5 / (1 - 0.5**6), 0.1 / (1 - 0.9**6)])
    assert apart.u_statistic == pytest.approx(apart.parts["gradient"].v_at_t, rel=1e-9)


def test_two_units_have_parts_without_errors() -> None:
    report = live(Settings(blocks=2)).report
    assert report.adamw.se is None
    assert report.adamw.parts["momentum"].se is None
    assert "three units" in report.adamw.null_reasons["se"]
    assert report.adamw.ci95 is None
    assert "three units" in report.adamw.null_reasons["ci95"]
    assert "it has no error: two units" in report.headline
    assert "Without an error" in report.adamw.sentence
    report.to_dict()


def test_the_realised_step_is_the_pure_one_and_the_clones_are_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = live().report.realized
    monkeypatch.setattr(
        "entropy_probe.optimizers.adam.adamw_deltas",
        lambda parameters, adam, ascent, max_grad_norm, sharding: optimizer_step(parameters, adam, ascent),
    )
    for virtual, clone in zip(rows, live().report.realized, strict=True):
        assert virtual.method == "virtual"
        assert virtual.delta_h == pytest.approx(clone.delta_h, rel=1e-8)
        assert virtual.predicted == pytest.approx(clone.predicted, rel=1e-9)
        assert virtual.step_norm == pytest.approx(clone.step_norm, rel=1e-9)


def test_the_realised_step_is_clipped_and_says_so() -> None:
    free, clipped = live().report, live(Settings(max_grad_norm=MAX_GRAD_NORM)).report
    rows = {row.step: row for row in clipped.realized if row.estimator == "rao-blackwell"}
    others = {row.step: row for row in free.realized if row.estimator == "rao-blackwell"}
    assert rows["preconditioned"].delta_h == others["preconditioned"].delta_h
    assert rows["adamw"].step_norm != pytest.approx(others["adamw"].step_norm, rel=1e-3)
    assert rows["adamw"].note.endswith("gradient clipped at 0.05")
    assert others["adamw"].note.endswith("no gradient clipping")
    assert "neither settings nor rows say" in free.adamw.null_reasons["max_grad_norm"]
    assert (free.adamw.max_grad_norm_source, clipped.adamw.max_grad_norm_source) == ("unknown", "given")
    assert clipped.config.max_grad_norm == clipped.adamw.max_grad_norm == MAX_GRAD_NORM
    # The row's linear term holds the diagonal, the prediction does not; without the gradient they would be one.
    assert rows["adamw"].predicted == pytest.approx(clipped.adamw.total, rel=0.5)


def test_the_clip_that_the_rows_recorded_is_taken_and_a_given_one_that_contradicts_it_is_told_of() -> None:
    model, adam, _ = setting()
    rows = support.random_rollouts(8, 3)

    def found(recorded: float, settings: Settings) -> tuple[float | None, str, float, float | None, list[str]]:
        batch = group_rollouts([replace(r, extra={"max_grad_norm": recorded}) for r in rows])
        report = probe(model, adam, batch, settings).report
        adamw, said = report.adamw, [w.seen for w in report.warnings if w.code == "gradient_clipping"]
        return adamw.max_grad_norm, adamw.max_grad_norm_source, adamw.clip_factor, report.config.max_grad_norm, said

    given = found(1e6, Settings(max_grad_norm=0.05))
    assert found(0.05, Settings()) == (0.05, "recorded", given[2], 0.05, [])
    assert given[2] < 1
    assert found(0.05, Settings(max_grad_norm=0.05)) == (0.05, "given", given[2], 0.05, [])
    assert found(0.0, Settings()) == (None, "recorded", 1.0, 0.0, [])
    *off, said = found(0.05, Settings(max_grad_norm=0))
    assert off == [None, "given", 1.0, 0.0]
    assert "clips gradients at norm 0.05" in said[0]
    assert "is not clipped" in said[0]


SENTENCES = [
    ((-3.0, -1.0, 0.0), 0.5, ["momentum"], True, "momentum", "Most of the fall by the optimizer's own step is momentum from"),
    ((3.0, 1.0, 0.0), 0.5, ["momentum"], True, "gradient", "Most of the rise by the optimizer's own step is this batch's"),
    ((-2.0, -2.0, 0.0), 0.5, [], True, None, "lowers entropy; which part does most of it cannot be told"),
    ((-3.0, 2.0, 0.0), 2.0, ["momentum"], False, None, "the errors; momentum from earlier steps alone lowers it"),
    ((-1.0, 1.0, 0.0), 9.0, [], False, None, "Neither the optimizer's own step nor any part"),
    ((0.0, 0.0, 0.0), 0.0, [], False, None, "changes nothing"),
    ((-1.0, 0.0, 0.0), None, [], False, None, "Without an error"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "se", "resolved", "total_resolved", "most", "said"), SENTENCES)
def test_the_sentence_says_no_more_than_the_errors_allow(
    values: Sequence[float], se: float | None, resolved: list[str], total_resolved: bool, most: str | None, said: str
) -> None:
    parts = dict(zip(PARTS, values, strict=True))
    assert said in step_sentence(parts, sum(values), se, resolved, total_resolved=total_resolved, most=most)


def predicted(values: Sequence[float], deviations: np.ndarray) -> StepPrediction:
    return StepPrediction(np.array(values), np.array(values), deviations, 0.0, "")


def test_a_part_is_most_of_the_step_only_where_its_excess_over_half_is_resolved() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(30, 3))
    noise -= noise.mean(0)
    assert predicted((-3.0, -1.0, 0.0), 0.01 * noise).most() == "momentum"
    assert predicted((3.0, 1.0, 0.0), 0.01 * noise).most() == "momentum"
    assert predicted((-2.0, -2.0, 0.0), 0.01 * noise).most() is None
    assert predicted((-3.0, -1.0, 0.0), noise).most() is None
    # The total is known well where parts err together against each other; then the excess is not.
    together = np.stack([noise[:, 0], -noise[:, 0], 0 * noise[:, 0]], axis=1)
    opposed = predicted((-3.0, -1.0, 0.0), together)
    assert opposed.total.excludes_zero
    assert opposed.most() is None


def test_the_command_shows_and_writes_the_section(tmp_path: Path) -> None:
    from entropy_probe.data.bundled_run import demo_files
    from entropy_probe.data.rollouts import read_batch, write_rollouts

    files = demo_files()
    rollouts, out = tmp_path / "rollouts.jsonl", tmp_path / "report.json"
    write_rollouts([row for group in read_batch(files.rollouts).groups[:10] for row in group.responses], rollouts)
    found = support.run_command(
        "run", files.checkpoint, "--rollouts", rollouts, "--max-grad-norm", "0.1", "--what-if-learning-rate", "0.001",
        "--what-if-max-grad-norm", "1", "--what-if-no-negatives", "--what-if-fall", "0.1", "--json", out,
    )  # fmt: skip
    assert found.code == 0, found.err
    report = json.loads(out.read_text())
    assert list(report["adamw"]["parts"]) == [*PARTS, "gradient_reward", "gradient_kl", "gradient_bonus"]
    assert [row["name"] for row in report["what_if"]["rows"]] == [
        "no_momentum", "without_negative_advantages", "learning_rate", "max_grad_norm",
    ]  # fmt: skip
    assert report["what_if"]["fall"]["nats"] == 0.1
    assert report["adamw"]["sentence"] in found.out
    for line in (
        "momentum from earlier steps",
        "what if: without negative advantages",
        "what if: a fall of 0.1",
        "clipped at 0.1",
    ):
        assert line in found.out, line


def test_the_terminal_shows_each_number_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    found = live(Settings(max_grad_norm=0.5, what_if_fall=0.25)).report
    values = {
        "momentum": (-0.5, 0.0125, -0.375),
        "gradient": (0.25, 0.025, 0.3125),
        "weight_decay": (0.125, 0.0, 0.125),
    }
    rows = [
        WhatIfRow("no_momentum", None, None, None, 0.75, 0.05, {}),
        WhatIfRow("learning_rate", 0.002, -4.5, 0.35, -6.5, 0.45, {}),
        WhatIfRow("without_negative_advantages", None, None, None, None, None, {"delta_h1": "were streamed"}),
    ]
    adamw = replace(
        found.adamw,
        parts={name: AdamWPart(*numbers) for name, numbers in values.items()},
        total=-0.125, se=0.055, gradient_norm=0.8125, sentence="A sentence.",
    )  # fmt: skip
    fall = FallSection(0.25, 3.5, [2.5, 4.5])
    shown = replace(found, adamw=adamw, what_if=WhatIfSection(rows, fall))
    print_report(shown, Console(width=160))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "A sentence.",
        "momentum from earlier steps −0.500 ± 0.013 -0.375 with v before this gradient",
        "this batch's gradient +0.250 ± 0.025 +0.3125 with v before this gradient",
        "weight decay +0.125",
        "total −0.125 ± 0.055 nats per response; gradient norm 0.8125, clipped at 0.5",
        "what if: no momentum this step +0.750 ± 0.050",
        "what if: learning rate 0.002 δH₁ −4.50 ± 0.35; this step −6.50 ± 0.45",
        "what if: without negative advantages none: were streamed",
        "what if: a fall of 0.25 3.5 × the learning rate 95 % 2.5 to 4.5",
    ):
        assert line in lines, line


@pytest.mark.parametrize("option", ["max_grad_norm", "what_if_learning_rate", "what_if_max_grad_norm", "what_if_fall"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_number_that_cannot_be_meant_is_refused(option: str, value: float) -> None:
    meant = option == "max_grad_norm" and value == 0  # no clipping
    with nullcontext() if meant else pytest.raises(InputError, match=f"{option} is "):
        Settings(**{option: value})  # type: ignore[arg-type]
