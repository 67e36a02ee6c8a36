"""What each part of the optimizer's step does to the entropy: loops, other backends, enumeration, finite differences."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import enumerable
import oracle
import support
from entropy_probe import AdamState, InputError, ProbeResult, Settings, probe, state_of_optimizer
from entropy_probe.adam_preconditioner import AdamGroup, AdamMoments
from entropy_probe.adam_step import (
    StepDirections,
    adamw_step,
    clip_factor,
    gradient_factors,
    gradient_norm,
    gradient_weights,
    optimizer_step,
)
from entropy_probe.gradients import Storage, UnitGradients, reference, response_dots, unit_gradients
from entropy_probe.policy import Policy
from entropy_probe.probe import resolve_advantages, resolve_length_weights
from entropy_probe.report.schema import AdamWPart, FallSection, WhatIfRow, WhatIfSection
from entropy_probe.report.text import print_report, step_sentence
from entropy_probe.rollouts import RolloutBatch, group_rollouts
from entropy_probe.scores import EntropyTarget, EntropyUnit, Estimator, entropy_coefficients, entropy_ratio
from entropy_probe.step_parts import PARTS, StepPrediction, predict_parts
from entropy_probe.u_statistics import UnitDots, cross_statistics
from entropy_probe.units import Mode, Units, block_units, exact_units
from entropy_probe.virtual_step import virtual_step
from enumerable import EnumerablePolicy

MAX_GRAD_NORM = 0.05
DEFAULTS = Settings()


def coefficients(batch: RolloutBatch) -> Tensor:
    return resolve_advantages(batch, None)[0] * resolve_length_weights(batch, Settings())


@functools.cache
def setting() -> tuple[nn.Module, AdamState, RolloutBatch]:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    adam = state_of_optimizer(support.trained_optimizer(model, steps=5, learning_rate=1e-4), model)
    return model, adam, support.random_batch(7, [3, 4, 2, 3, 3, 4, 2])


def looked(units: Units, target: EntropyTarget, storage: Storage) -> tuple[UnitGradients, StepDirections]:
    model, adam, batch = setting()
    asked: list[StepDirections] = []

    def look(ascent: dict[str, Tensor]) -> StepDirections:
        factor = clip_factor(gradient_norm(ascent), MAX_GRAD_NORM)
        asked.append(StepDirections(dict(model.named_parameters()), adam, ascent, factor))
        return asked[0]

    p = {name: torch.ones_like(q) for name, q in model.named_parameters()}
    policy = Policy(model, microbatch_size=5)
    found = unit_gradients(
        policy, batch, units, target, coefficients(batch), p, dict.fromkeys(p, 1.0), storage=storage, look=look  # type: ignore[arg-type]
    )  # fmt: skip
    return found, asked[0]


TARGETS = [EntropyTarget(e, u) for e in Estimator for u in EntropyUnit]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.estimator}-{t.unit}")
@pytest.mark.parametrize("storage", list(Storage))
@pytest.mark.parametrize("units", [exact_units(7), block_units(7, 3)], ids=["exact", "blocks"])
def test_the_dots_that_are_asked_for_are_those_of_the_reference_and_of_the_responses(
    units: Units, storage: Storage, target: EntropyTarget
) -> None:
    model, adam, batch = setting()
    found, directions = looked(units, target, storage)
    assert found.looked is not None
    policy, a = Policy(model, microbatch_size=5), coefficients(batch)
    assert directions.clip_factor < 1.0

    steps = [
        adamw_step(policy.trainable(), adam, found.ascent, max_grad_norm=MAX_GRAD_NORM, updated_v=updated_v)
        for updated_v in (True, False)
    ]
    responses = {n: directions.of(n, slice(0, q.numel()))[1] for n, q in policy.trainable().items()}
    of_ascent = [{n: r[k].view(y.shape) * y for (n, r), y in zip(responses.items(), found.ascent.values(), strict=True)}
                 for k in range(3)]  # fmt: skip

    # J as the preconditioner of the slow backend, where it is positive: its diagonal is X_u · J Y_u.
    for k, shift in ((1, 0.0), (3, 0.0), (0, 1.0), (2, 1.0)):
        largest = max(float(r[k].abs().max()) for r in responses.values())
        weights = {
            n: r[k].view(q.shape) + shift * largest
            for (n, r), q in zip(responses.items(), policy.trainable().values(), strict=True)
        }
        if min(float(w.min()) for w in weights.values()) < 0:
            continue
        slow = reference.unit_gradients(policy, batch, units, target, a, weights, dict.fromkeys(weights, 1.0)).total
        flat = {n: torch.full_like(w, shift * largest) for n, w in weights.items()}
        plain = reference.unit_gradients(policy, batch, units, target, a, flat, dict.fromkeys(flat, 1.0)).total
        np.testing.assert_allclose(
            found.looked.own[:, k], slow.diagonal - plain.diagonal, rtol=0, atol=1e-11 * np.abs(slow.kernel).max()
        )

    # Every direction by the responses' own dots with it, summed over a unit's.
    lengths = [len(r.response_ids) for r in batch.responses]
    measured = policy.measure(batch.responses, entropies=True)
    assert measured.entropies is not None
    entropies = torch.stack([h.sum() for h in torch.split(measured.entropies, lengths)])
    of = -measured.scores if target.estimator is Estimator.SCORE else entropies
    ratio = entropy_ratio(of, lengths, batch.group_sizes)
    x = entropy_coefficients(target, measured.scores, measured.entropies, lengths, batch.group_sizes, ratio)
    asked = [part for step in steps for part in (step.momentum, step.gradient, step.weight_decay)] + of_ascent
    dots = response_dots(policy, batch, asked, [x])[:, 0].numpy()
    unit_of = np.array(units.of_rows(batch.group_sizes))
    for u in range(len(units.ranges)):
        np.testing.assert_allclose(
            found.looked.along[u], dots[unit_of == u].sum(0), rtol=0, atol=1e-11 * np.abs(dots).max()
        )


@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "coupled"])
@pytest.mark.parametrize("amsgrad", [True, False], ids=["amsgrad", "plain"])
def test_the_responses_of_the_parts_are_their_derivatives_by_the_gradient(decoupled: bool, amsgrad: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, 9, generator=generator, dtype=torch.float64)
    v = 0.1 * draw() ** 2
    moments = {"a": AdamMoments(3, draw(), v, 2.0 * draw() ** 2)}
    state = AdamState((AdamGroup(("a",), 0.3, 0.9, 0.6, 1e-2, 0.2, amsgrad, False, decoupled),), moments)
    theta, y, factor = {"a": draw()}, draw(), 0.7

    def parts(ascent: Tensor, *, updated_v: bool) -> Tensor:
        step = adamw_step(theta, state, {"a": factor * ascent}, updated_v=updated_v)
        return torch.stack([step.momentum["a"], step.gradient["a"], step.weight_decay["a"]])

    directions, responses = StepDirections(theta, state, {"a": y}, factor).of("a", slice(0, 9))
    eps = 1e-6
    slopes = [(parts(y + eps, updated_v=u) - parts(y - eps, updated_v=u)) / (2 * eps) for u in (True, False)]
    torch.testing.assert_close(responses[:3], slopes[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(responses[3], slopes[1][1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(directions[:3], parts(y, updated_v=True), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(directions[3:6], parts(y, updated_v=False), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(directions[6:], responses[:3] * y, rtol=1e-12, atol=1e-15)
    halves = [StepDirections(theta, state, {"a": y}, factor).of("a", part) for part in (slice(0, 4), slice(4, 9))]
    for whole, pieces in zip((directions, responses), zip(*halves, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces, dim=1), whole)


def test_the_dots_are_those_of_one_response_at_a_time() -> None:
    model, adam, batch = setting()
    found, _ = looked(exact_units(7), EntropyTarget(), Storage.STORED)
    assert found.looked is not None
    xs, _ = oracle.prompt_vectors(oracle.one_at_a_time(model, batch), batch)
    step = adamw_step(dict(model.named_parameters()), adam, found.ascent, max_grad_norm=MAX_GRAD_NORM)
    for k, part in enumerate((step.momentum, step.gradient, step.weight_decay)):
        flat = torch.cat([part[n].flatten() for n, p in model.named_parameters() if p.requires_grad]).numpy()
        np.testing.assert_allclose(found.looked.along[:, k], xs @ flat, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 2, 1, 1]], ids=["equal", "unequal"])
def test_predictions_are_means_over_prompts_and_leave_the_own_update_out(sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    prompts, dimension = 6, 5
    x, y = rng.normal(size=(2, prompts, dimension))
    momentum, decay, weight, slope = rng.normal(size=(4, dimension))
    mean = y.mean(0)
    unit = np.repeat(np.arange(len(sizes)), sizes)
    summed, updates = (np.array([z[unit == u].sum(0) for u in range(len(sizes))]) for z in (x, y))
    zero = np.zeros(dimension)
    # Momentum depends on Ȳ by ``slope``, the gradient is W Ȳ, weight decay does not depend on it.
    parts = [momentum, weight * mean, decay]
    directions = [*parts, *(2 * part for part in parts), slope * mean, weight * mean, zero]
    own = np.stack([(summed * j * updates).sum(1) for j in (slope, weight, zero, 2 * weight)], axis=1)
    found = predict_parts(summed @ np.stack(directions).T, own, sizes, None)

    pairs = [(n, m) for n in range(prompts) for m in range(prompts) if unit[n] != unit[m]]
    gradient = -np.mean([x[n] @ (weight * y[m]) for n, m in pairs])
    others = [y[unit != unit[n]].mean(0) for n in range(prompts)]
    by_hand = [-x[n] @ (momentum + slope * (others[n] - mean)) for n in range(prompts)]
    assert found.values[0] == pytest.approx(np.mean(by_hand), rel=1e-12)
    assert found.values[1] == pytest.approx(gradient, rel=1e-12)
    assert found.values[2] == pytest.approx(-np.mean(x @ decay), rel=1e-12)
    np.testing.assert_allclose(
        found.values_v_at_t, 2 * np.array([-np.mean(x @ momentum), *found.values[1:]]), rtol=1e-12
    )
    # Planted: with a prompt's own update they are other numbers.
    assert abs(found.values[1] + np.mean(x @ parts[1])) > 1e-2
    assert abs(found.values[0] + np.mean(x @ momentum)) > 1e-2
    # The error of the total from the units' totals, and not from independent parts.
    if sizes == [1] * 6:
        rows = np.array([by_hand[n] - x[n] @ (decay + weight * others[n]) for n in range(prompts)])
        assert found.total.se == pytest.approx(rows.std(ddof=1) / np.sqrt(prompts), rel=1e-12)
        independent = np.sqrt(sum(found.of(**{name: 1.0}).se ** 2 for name in PARTS))  # type: ignore[operator]
        assert abs(independent / found.total.se - 1) > 0.05  # type: ignore[operator]


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


def drawn(seed: int, prompts: int, samples: int = 4) -> tuple[StepPrediction, np.ndarray, np.ndarray]:
    """A batch from the enumerated policy: its prediction, the parts' exact ∇H · Δ, and two planted bugs in the gradient's."""
    policy, adam, tables = enumerated()
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
    split = np.split(y.mean(0), np.cumsum([shape.numel() for shape in shapes.values()])[:-1])
    ascent = {name: torch.from_numpy(part).view(shapes[name]) for name, part in zip(shapes, split, strict=True)}
    directions = StepDirections(dict(policy.named_parameters()), adam, ascent, 1.0)
    asked = [directions.of(name, slice(0, shape.numel())) for name, shape in shapes.items()]
    v, w = (torch.cat(parts, dim=1).numpy() for parts in zip(*asked, strict=True))
    weights = gradient_weights(adam, 1.0)
    assert weights is not None
    kernel = (x * w[3]) @ y.T
    found = predict_parts(
        x @ v.T,
        np.stack([((x * response) * y).sum(1) for response in w], axis=1),
        [1] * prompts,
        cross_statistics(UnitDots.from_kernel(kernel, [1] * prompts)),
    )
    same_batch = -float((x @ v[1]).mean())
    mean = y.mean(0)
    weight = np.divide(v[1], mean, out=np.zeros_like(mean), where=mean != 0)
    left_out = -np.mean([x[n] @ (weight * (prompts * mean - y[n])) / (prompts - 1) for n in range(prompts)])
    return found, v[:3] @ entropy_gradient(), np.array([same_batch, float(left_out)])


@functools.cache
def entropy_gradient() -> np.ndarray:
    policy = enumerated()[0]
    total = sum(enumerable.exact_entropy(policy, c, 3) for c in range(6)) / 6
    return enumerable.flat_gradient(total, policy).numpy()  # type: ignore[arg-type, no-any-return]


def test_every_part_is_unbiased_and_covers_the_exact_change_as_often_as_its_error_says() -> None:
    """Each step's own ∇H · part, by enumeration. X is skew here, so that t intervals of its plain mean cover 93 %.

    Planted: with the own update kept, and with it kept in v⁺ alone, the gradient's part is biased.
    """
    batches, prompts = 500, 40
    inside = dict.fromkeys((*PARTS, "total"), 0)
    misses, kept, kept_in_v, errors = [], [], [], []
    for seed in range(batches):
        found, truth, same_batch = drawn(seed, prompts)
        for k, name in enumerate(PARTS):
            estimate = found.of(**{name: 1.0})
            assert estimate.se is not None
            inside[name] += abs(estimate.value - truth[k]) < 2.02 * estimate.se
        assert found.total.se is not None
        inside["total"] += abs(found.total.value - truth.sum()) < 2.02 * found.total.se
        misses.append(found.values - truth)
        kept.append(same_batch[0] - truth[1])
        kept_in_v.append(same_batch[1] - truth[1])
        errors.append(found.of(gradient=1.0).se)
    for name, count in inside.items():
        assert 0.90 < count / batches < 0.99, (name, count / batches)
    spread = np.std(misses, axis=0)
    assert (np.abs(np.mean(misses, axis=0)) < 4 * spread / np.sqrt(batches)).all()
    for planted in (kept, kept_in_v):
        assert abs(np.mean(planted)) > 3 * np.std(planted) / np.sqrt(batches)
    # The noise that X and Y share is that of the matrix with v at t: up to a quarter too large where v⁺ differs much from v.
    assert 0.95 < np.mean(errors) / spread[1] < 1.3


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
    assert adamw.total == pytest.approx(sum(part.value for part in adamw.parts.values()), rel=1e-12)
    assert adamw.v_at_t == pytest.approx(sum(part.v_at_t for part in adamw.parts.values()), rel=1e-12)


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
    assert "streamed" in streamed.what_if.rows[1].null_reasons["delta_h1"]
    streamed.to_dict()


def test_parameters_of_one_learning_rate_with_steps_of_their_own_have_no_common_factor() -> None:
    _, adam, _ = setting()
    name = next(iter(adam.moments))
    mixed = AdamState(adam.groups, {**adam.moments, name: replace(adam.moments[name], step=9)})
    assert gradient_factors(mixed) is None
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
    assert "Too few units" in report.adamw.sentence
    report.to_dict()


def test_the_realised_step_is_the_pure_one_and_the_clones_are_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = live().report.realized
    monkeypatch.setattr(
        "entropy_probe.realized_rows.adamw_step",
        lambda parameters, adam, ascent, max_grad_norm: CloneStep(optimizer_step(parameters, adam, ascent)),
    )
    for virtual, clone in zip(rows, live().report.realized, strict=True):
        assert virtual.method == "virtual"
        assert virtual.delta_h == pytest.approx(clone.delta_h, rel=1e-8)
        assert virtual.predicted == pytest.approx(clone.predicted, rel=1e-9)
        assert virtual.step_norm == pytest.approx(clone.step_norm, rel=1e-9)


class CloneStep:
    def __init__(self, deltas: dict[str, Tensor]) -> None:
        self.deltas = deltas


def test_the_realised_step_is_clipped_and_says_so() -> None:
    free, clipped = live().report, live(Settings(max_grad_norm=MAX_GRAD_NORM)).report
    rows = {row.step: row for row in clipped.realized if row.estimator == "rao-blackwell"}
    others = {row.step: row for row in free.realized if row.estimator == "rao-blackwell"}
    assert rows["preconditioned"].delta_h == others["preconditioned"].delta_h
    assert rows["adamw"].step_norm != pytest.approx(others["adamw"].step_norm, rel=1e-3)
    assert rows["adamw"].note.endswith("gradient clipped at 0.05")
    assert others["adamw"].note.endswith("no gradient clipping")
    assert "--max-grad-norm" in free.adamw.null_reasons["max_grad_norm"]
    assert clipped.config.max_grad_norm == clipped.adamw.max_grad_norm == MAX_GRAD_NORM
    # The row's linear term holds the diagonal, the prediction does not; without the gradient they would be one.
    assert rows["adamw"].predicted == pytest.approx(clipped.adamw.total, rel=0.5)


def test_rollouts_of_a_trainer_that_clips_this_gradient_are_told_of() -> None:
    model, adam, _ = setting()
    rows = support.random_rollouts(8, 3)

    def warned(recorded: float, settings: Settings) -> list[str]:
        batch = group_rollouts([replace(r, extra={"max_grad_norm": recorded}) for r in rows])
        report = probe(model, adam, batch, settings).report
        return [w.advice for w in report.warnings if w.code == "gradient_clipping"]

    assert warned(0.05, Settings()) == ["Give --max-grad-norm 0.05"]
    assert warned(0.05, Settings(max_grad_norm=0.05)) == []
    assert warned(0.0, Settings()) == []
    assert warned(1e6, Settings()) == []


SENTENCES = [
    ((-3.0, -1.0, 0.0), 0.5, ["momentum"], True, "momentum", "Most of the fall by the optimizer's own step is momentum from"),
    ((3.0, 1.0, 0.0), 0.5, ["momentum"], True, "gradient", "Most of the rise by the optimizer's own step is this batch's"),
    ((-2.0, -2.0, 0.0), 0.5, [], True, None, "lowers entropy; which part does most of it cannot be told"),
    ((-3.0, 2.0, 0.0), 2.0, ["momentum"], False, None, "the errors; momentum from earlier steps alone lowers it"),
    ((-1.0, 1.0, 0.0), 9.0, [], False, None, "Neither the optimizer's own step nor any part"),
    ((0.0, 0.0, 0.0), 0.0, [], False, None, "changes nothing"),
    ((-1.0, 0.0, 0.0), None, [], False, None, "Too few units"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "se", "resolved", "total_resolved", "most", "said"), SENTENCES)
def test_the_sentence_says_no_more_than_the_errors_allow(
    values: Sequence[float], se: float | None, resolved: list[str], total_resolved: bool, most: str | None, said: str
) -> None:
    parts = dict(zip(PARTS, values, strict=True))
    assert said in step_sentence(parts, sum(values), se, resolved, total_resolved=total_resolved, most=most)


def predicted(values: Sequence[float], deviations: np.ndarray) -> StepPrediction:
    return StepPrediction(np.array(values), np.array(values), deviations, 0.0)


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
    assert opposed.is_resolved(opposed.total)
    assert opposed.most() is None


def test_the_command_shows_and_writes_the_section(tmp_path: Path) -> None:
    from entropy_probe.demo import demo_files
    from entropy_probe.rollouts import read_batch, write_rollouts

    files = demo_files()
    rollouts, out = tmp_path / "rollouts.jsonl", tmp_path / "report.json"
    write_rollouts([row for group in read_batch(files.rollouts).groups[:10] for row in group.responses], rollouts)
    found = support.run_command(
        "run", files.checkpoint, "--rollouts", rollouts, "--max-grad-norm", "0.1", "--what-if-learning-rate", "0.001",
        "--what-if-max-grad-norm", "1", "--what-if-fall", "0.1", "--json", out,
    )  # fmt: skip
    assert found.code == 0, found.err
    report = json.loads(out.read_text())
    assert set(report["adamw"]["parts"]) == set(PARTS)
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
    with pytest.raises(InputError, match=option.replace("_", "-")):
        Settings(**{option: value})  # type: ignore[arg-type]
