"""Shares of the loss's terms in the gradient's part: the slow reference step by step, sums, ranks, coverage, words."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import enumerable
import support
from entropy_probe import Settings, probe
from entropy_probe.checkpoints import sharding_of
from entropy_probe.data.rollouts import Rollout, RolloutBatch
from entropy_probe.data.units import Mode, Units, block_units, exact_units
from entropy_probe.gradients import (
    Looked,
    Sides,
    Storage,
    Wanted,
    loss_gradient,
    response_dots,
    unit_gradients,
)
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.adamw_step import adamw_step
from entropy_probe.optimizers.clipping import clip_factor, gradient_norm
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.optimizers.state import AdamGroup, AdamMoments, AdamState
from entropy_probe.optimizers.step_parts import PARTS, predict_parts
from entropy_probe.optimizers.steps_of_others import StepsOfOthers
from entropy_probe.ranks.collectives import Ranks
from entropy_probe.report import Report
from entropy_probe.report.sentences import term_sentences
from entropy_probe.statistics.estimate import Estimate
from entropy_probe.statistics.quantiles import t_quantile
from entropy_probe.targets.base import Sample, TokenPair
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.entropy import EntropyTarget
from enumerable import EnumerablePolicy
from oracle import parts_with_v_at_t
from rank_processes import on_ranks
from step_setting import coefficients, setting

MAX_GRAD_NORM = 0.05
SCORE, RAO_BLACKWELL = EntropyTarget(Estimator.SCORE), EntropyTarget(Estimator.RAO_BLACKWELL)
SHARES = ("gradient_reward", "gradient_kl", "gradient_bonus")
UNITS = {"exact": exact_units(7), "blocks": block_units(7, 3)}


@functools.cache
def update() -> tuple[TokenPair, dict[str, TokenPair]]:
    """Y's coefficients, and those of a KL term and of a bonus in them."""
    batch = setting()[2]
    generator = torch.Generator().manual_seed(11)
    kl = 0.05 * torch.randn(batch.tokens, generator=generator, dtype=torch.float64)
    bonus = 0.03 * torch.rand(batch.tokens, generator=generator, dtype=torch.float64)
    reward = TokenPair(coefficients(batch)).at_tokens(batch.lengths).log_probs
    terms = {"kl": TokenPair(kl), "bonus": TokenPair(torch.zeros_like(kl), bonus)}
    return TokenPair(reward + kl, bonus), terms


def looked(units: Units, target: EntropyTarget, storage: Storage, ranks: Ranks | None = None, size: int = 5) -> Looked:
    model, adam, batch = setting()
    whole, terms = update()

    def look(ascent: Mapping[str, Tensor], of_terms: Sequence[Mapping[str, Tensor]]) -> StepsOfOthers:
        factor = clip_factor(gradient_norm(ascent), MAX_GRAD_NORM)
        assert factor < 1.0
        return StepsOfOthers(dict(model.named_parameters()), adam, ascent, factor, units.sizes, terms=of_terms)

    p = {name: torch.ones_like(q) for name, q in model.named_parameters()}
    policy = Policy(model, microbatch_size=size)
    if ranks is not None:
        policy = replace(policy, sharding=sharding_of(model, ranks))
    found = unit_gradients(
        policy, batch, units, Sides(target, whole, terms=terms), Geometry.fixed(p), wanted=Wanted(storage, look=look)
    ).looked
    assert found is not None
    return found


@functools.cache
def truth(which: str, target: EntropyTarget) -> tuple[np.ndarray, np.ndarray]:
    """XS_u along every term's share of the others' gradient part, v after and before it, [U, 4]; and its matrices, [2, U, U].

    By the slow reference: the other prompts' own gradients, torch's step from them, and every response's dot.
    """
    model, adam, batch = setting()
    units, (whole, terms) = UNITS[which], update()
    policy = Policy(model, microbatch_size=5)
    unit_of = np.array(units.of_rows(batch.group_sizes))
    sizes = np.array(units.sizes)

    def sums(pair: TokenPair, rows: np.ndarray) -> dict[str, Tensor]:
        kept = np.flatnonzero(rows).tolist()
        return loss_gradient(policy, [batch.responses[row] for row in kept], pair.of_rows(kept, batch))

    def ascents(rows: np.ndarray, prompts: int) -> list[dict[str, Tensor]]:
        return [{n: y / prompts for n, y in sums(pair, rows).items()} for pair in (whole, *terms.values())]

    everything = ascents(np.ones(len(unit_of), dtype=bool), 7)
    factor = clip_factor(gradient_norm(everything[0]), MAX_GRAD_NORM)

    def shares(
        ascent: Mapping[str, Tensor], of_terms: Sequence[Mapping[str, Tensor]], *, at_t: bool
    ) -> list[dict[str, Tensor]]:
        """The gradient's part times Ȳᵏ/Ȳ, which elementwise is W Ȳᵏ."""
        clipped = {name: factor * y for name, y in ascent.items()}
        if at_t:
            part: Mapping[str, Tensor] = parts_with_v_at_t(policy.trainable(), adam, clipped)[1]
        else:
            part = adamw_step(policy.trainable(), adam, clipped).gradient
        return [
            {name: torch.where(y == 0, 0.0, part[name] * of_term[name] / y) for name, y in ascent.items()}
            for of_term in of_terms
        ]

    count = len(sizes)
    asked: list[dict[str, Tensor]] = []
    for u in range(count):
        others, *of_terms = ascents(unit_of != u, int(7 - sizes[u]))
        asked += [*shares(others, of_terms, at_t=False), *shares(others, of_terms, at_t=True)]
    eps = 1e-4
    for w in range(count):
        own = [sums(pair, unit_of == w) for pair in (whole, *terms.values())]
        ends = []
        for sign in (1, -1):
            moved, *of_terms = (
                {n: y + sign * eps * mine[n] if n in mine else y for n, y in of_all.items()}
                for of_all, mine in zip(everything, own, strict=True)
            )
            ends.append(shares(moved, of_terms, at_t=False))
        asked += [{n: (up[n] - down[n]) / (2 * eps) for n in up} for up, down in zip(*ends, strict=True)]
    measured = policy.measure(batch.responses, entropies=True)
    x = target.coefficients(Sample.of(batch, measured))
    dots = response_dots(policy, batch, asked, [x])[:, 0].numpy()
    by_unit = np.array([dots[unit_of == u].sum(0) for u in range(count)])
    along = np.array([by_unit[u, 4 * u : 4 * u + 4] for u in range(count)])
    kernels = by_unit[:, 4 * count :].reshape(count, count, 2).transpose(2, 0, 1)
    return along, kernels


def assert_true(found: Looked, which: str, target: EntropyTarget) -> None:
    along, kernels = truth(which, target)
    np.testing.assert_allclose(found.along[:, 6:8], along[:, :2], rtol=0, atol=1e-11 * np.abs(along).max())
    np.testing.assert_allclose(found.along[:, 8:], along[:, 2:], rtol=0, atol=1e-11 * np.abs(along).max())
    if found.kernel is not None:
        assert found.term_kernels is not None
        np.testing.assert_allclose(found.term_kernels, kernels, rtol=0, atol=1e-5 * np.abs(kernels).max())


@pytest.mark.parametrize("which", UNITS)
@pytest.mark.parametrize("storage", list(Storage))
@pytest.mark.parametrize("target", [SCORE, RAO_BLACKWELL], ids=["score", "rao-blackwell"])
def test_every_unit_meets_the_shares_of_the_others_step(which: str, storage: Storage, target: EntropyTarget) -> None:
    found = looked(UNITS[which], target, storage)
    assert_true(found, which, target)
    assert (found.kernel is None) == (found.term_kernels is None) == (storage is Storage.STREAMED)


def test_planted_a_share_with_a_v_of_its_own_term_or_with_the_whole_ones_response_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = StepsOfOthers.along

    def own_v(
        self: StepsOfOthers,
        name: str,
        part: slice,
        x: Tensor,
        y: Tensor,
        units: Sequence[int],
        terms: Sequence[Tensor] = (),
    ) -> Tensor:
        found = right(self, name, part, x, y, units, terms)
        for k, (ascent, of_term) in enumerate(zip(self.terms, terms, strict=True)):
            alone = replace(self, ascent=ascent, terms=())
            found[:, 6 + k] = right(alone, name, part, x, of_term, units)[:, 1]
        return found

    with monkeypatch.context() as patch:
        patch.setattr(StepsOfOthers, "along", own_v)
        found = looked(UNITS["exact"], SCORE, Storage.STORED)
    with pytest.raises(AssertionError):
        assert_true(found, "exact", SCORE)
    monkeypatch.setattr(
        StepsOfOthers,
        "term_responses",
        lambda self, name, part: [(self.response(name, part), torch.zeros_like(self.response(name, part)))] * 2,
    )
    found = looked(UNITS["exact"], SCORE, Storage.STORED)
    with pytest.raises(AssertionError):
        assert_true(found, "exact", SCORE)


@pytest.mark.parametrize("storage", list(Storage))
@pytest.mark.parametrize("target", [SCORE, RAO_BLACKWELL], ids=["score", "rao-blackwell"])
def test_two_ranks_find_the_same_shares(storage: Storage, target: EntropyTarget) -> None:
    truth("exact", target)

    def work(ranks: Ranks) -> None:
        assert_true(looked(UNITS["exact"], target, storage, ranks, size=4), "exact", target)

    on_ranks(2, work)


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 2, 1, 1]], ids=["equal", "unequal"])
def test_shares_add_up_and_have_the_errors_of_their_rows_and_matrix(sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    units = len(sizes)
    along, kernel, of_terms = (
        rng.normal(size=(units, 10)),
        rng.normal(size=(units, units)),
        rng.normal(size=(2, units, units)),
    )
    found = predict_parts(along, kernel, sizes, ("kl", "bonus"), of_terms)
    assert list(found.terms) == ["reward", "kl", "bonus"]
    values = [term.estimate.value for term in found.terms.values()]
    assert sum(values) == pytest.approx(found.values[1], rel=1e-12)
    assert sum(term.v_at_t for term in found.terms.values()) == pytest.approx(found.values_v_at_t[1], rel=1e-12)
    # A term alone is a step whose gradient's part it is.
    columns = {"reward": along[:, 1] - along[:, 6] - along[:, 7], "kl": along[:, 6], "bonus": along[:, 7]}
    matrices = {"reward": kernel - of_terms.sum(0), "kl": of_terms[0], "bonus": of_terms[1]}
    for name, column in columns.items():
        alone = predict_parts(np.stack([along[:, 0], column, *along[:, 2:6].T], axis=1), matrices[name], sizes)
        expected, term = alone.of(gradient=1.0), found.terms[name].estimate
        assert term.value == pytest.approx(expected.value, rel=1e-12)
        assert term.se == (None if expected.se is None else pytest.approx(expected.se, rel=1e-12))
        assert term.why_not == expected.why_not
    assert not predict_parts(along[:, :6], kernel, sizes).terms
    streamed = predict_parts(along, None, sizes, ("kl", "bonus")).terms["kl"].estimate
    assert streamed.value == pytest.approx(found.terms["kl"].estimate.value, rel=1e-12)
    assert "streaming" in streamed.why_not


CONTEXTS, LIMIT = 6, 3


@functools.cache
def enumerated() -> tuple[
    EnumerablePolicy, AdamState, list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]], np.ndarray
]:
    """A policy, a state of Adam, of every context S, ∇S, a reference's S and Σ_t ∇H_t of every response, and ∇H."""
    policy, reference = (
        EnumerablePolicy(contexts=CONTEXTS, tokens=3, seed=3),
        EnumerablePolicy(contexts=CONTEXTS, tokens=3, seed=8),
    )
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
    tables = []
    for context in range(CONTEXTS):
        scores, gradients = enumerable.score_gradients(policy, context, LIMIT)
        of_entropies = np.array(
            [terms.entropy_gradients.sum(0).numpy() for terms in enumerable.token_terms(policy, context, LIMIT)]
        )
        beside = enumerable.response_scores(reference, context, LIMIT).detach().numpy()
        tables.append((scores.numpy(), gradients.numpy(), beside, of_entropies))
    total = sum(enumerable.exact_entropy(policy, c, LIMIT) for c in range(CONTEXTS)) / CONTEXTS
    gradient = enumerable.flat_gradient(total, policy).numpy()  # type: ignore[arg-type]
    return policy, AdamState((group,), moments), tables, gradient


def drawn(
    seed: int, prompts: int, times: int, samples: int = 4
) -> tuple[dict[str, Estimate], dict[str, float], dict[str, float]]:
    """A batch from the enumerated policy: shares, the exact ∇H · share of this very step, and a planted estimate of it."""
    policy, adam, tables, entropy_gradient = enumerated()
    moments = {name: replace(m, exp_avg_sq=times * m.exp_avg_sq) for name, m in adam.moments.items()}
    adam = replace(adam, moments=moments)
    rng = np.random.default_rng(seed)
    xs, ys, kls, bonuses = [], [], [], []
    for _ in range(prompts):
        scores, gradients, beside, of_entropies = tables[int(rng.integers(CONTEXTS))]
        p = np.exp(scores)
        chosen = rng.choice(len(p), size=samples, p=p / p.sum())
        s, g = scores[chosen], gradients[chosen]
        reward = (chosen % 3 == 0).astype(float)
        xs.append(((s - (s.sum() - s) / (samples - 1)) / samples) @ g)
        kls.append((-0.2 * (s - beside[chosen]) / samples) @ g)
        bonuses.append(0.1 * of_entropies[chosen].mean(0))
        ys.append(((reward - reward.mean()) / samples) @ g + kls[-1] + bonuses[-1])
    x, vectors = np.array(xs), [np.array(v) for v in (ys, kls, bonuses)]
    shapes = {name: q.shape for name, q in policy.named_parameters()}
    ends = np.cumsum([0, *(shape.numel() for shape in shapes.values())])
    places = {name: slice(ends[k], ends[k + 1]) for k, name in enumerate(shapes)}
    ascent, *terms = (
        {name: torch.from_numpy(v.mean(0)[places[name]]).view(shape) for name, shape in shapes.items()} for v in vectors
    )
    others = StepsOfOthers(dict(policy.named_parameters()), adam, ascent, 1.0, [1] * prompts, terms=terms)
    along, kernel, of_terms = np.zeros((prompts, 10)), np.zeros((prompts, prompts)), np.zeros((2, prompts, prompts))
    weight = np.zeros(ends[-1])
    for name, place in places.items():
        every = slice(0, place.stop - place.start)
        of_x = torch.from_numpy(x[:, place])
        y, *own = (torch.from_numpy(v[:, place]) for v in vectors)
        along += others.along(name, every, of_x, y, range(prompts), own).numpy()
        kernel += ((of_x * others.response(name, every)) @ y.T).numpy()
        for k, (on_term, on_whole) in enumerate(others.term_responses(name, every)):
            of_terms[k] += ((of_x * on_term) @ own[k].T + (of_x * on_whole) @ y.T).numpy()
            weight[place] = on_term.numpy()
    found = predict_parts(along, kernel, [1] * prompts, ("kl", "bonus"), of_terms)
    means = {"kl": vectors[1].mean(0), "bonus": vectors[2].mean(0)}
    means["reward"] = vectors[0].mean(0) - means["kl"] - means["bonus"]
    exact = {name: float(entropy_gradient @ (weight * mean)) for name, mean in means.items()}
    same_batch = {name: -float(x.mean(0) @ (weight * mean)) for name, mean in means.items()}
    return {name: term.estimate for name, term in found.terms.items()}, exact, same_batch


@pytest.mark.parametrize(("prompts", "times"), [(64, 1), (40, 1), (16, 100)])
def test_every_share_is_unbiased_and_covers_the_exact_change_as_often_as_its_error_says(
    prompts: int, times: int
) -> None:
    """Each step's own ∇H · W Ȳᵏ, by enumeration, with v so many times as large.

    At 16 prompts, where half of v⁺ is this gradient's own square (times = 1), the reward's interval covers 85 %, as few others'
    means are noisier than J at Ȳ says; the KL term's and the bonus' 91 and 89 %, and the whole gradient's 92 %.

    Planted: with the own update kept, the reward's share is biased.
    """
    batches, t = 500, t_quantile(prompts)
    drawings = [drawn(seed, prompts, times) for seed in range(batches)]
    for name in ("reward", "kl", "bonus"):
        misses = np.array([found[name].value - exact[name] for found, exact, _ in drawings])
        errors = np.array([found[name].se for found, _, _ in drawings])
        inside = np.mean(np.abs(misses) < t * errors)
        assert 0.89 < inside < 0.985, (name, inside)
        assert abs(misses.mean()) < 4 * misses.std() / np.sqrt(batches), name
        assert 0.87 < np.sqrt((errors**2).mean()) / misses.std() < 1.13, name
    kept = np.array([planted["reward"] - exact["reward"] for _, exact, planted in drawings])
    assert abs(kept.mean()) > 3 * kept.std() / np.sqrt(batches)


def rows_of(**extra: float) -> list[Rollout]:
    """Rows of a trainer whose loss has a KL term or a bonus."""
    return [
        replace(
            row,
            ref_logprobs=tuple(-1.0 - 0.3 * place for place in range(len(row.response_ids))),
            extra={**row.extra, **extra},
        )
        for row in support.random_rollouts(8, 3)
    ]


def report_of(rows: list[Rollout] | RolloutBatch, **settings: object) -> Report:
    model, adam, _ = setting()
    return probe(model, adam, rows, Settings(noise=False, **settings)).report  # type: ignore[arg-type]


def test_the_report_has_the_share_of_every_term_of_the_loss() -> None:
    stored = report_of(rows_of(beta=0.3, entropy_coef=0.2))
    parts = stored.adamw.parts
    assert list(parts) == [*PARTS, *SHARES]
    for field in ("value", "v_at_t"):
        values = [getattr(parts[name], field) for name in SHARES]
        scale = max(abs(value) for value in values)
        assert abs(sum(values) - getattr(parts["gradient"], field)) < 1e-12 * scale
    assert all(parts[name].se is not None and not parts[name].null_reasons for name in SHARES)
    streamed = report_of(rows_of(beta=0.3, entropy_coef=0.2), mode=Mode.EXACT, memory_bytes=2e4, microbatch_size=3)
    assert streamed.units.storage == "streamed"
    for name in SHARES:
        part = streamed.adamw.parts[name]
        assert part.value == pytest.approx(parts[name].value, rel=1e-9)
        assert part.v_at_t == pytest.approx(parts[name].v_at_t, rel=1e-9)
        assert "streaming" in part.null_reasons["se"]
    streamed.to_dict()


def test_a_term_that_the_loss_has_not_is_null_and_says_so() -> None:
    parts = report_of(rows_of(beta=0.3)).adamw.parts
    assert parts["gradient_kl"].value is not None
    assert parts["gradient_bonus"].value is None
    assert parts["gradient_bonus"].null_reasons == dict.fromkeys(
        ("value", "se", "v_at_t"), "the loss has no entropy bonus"
    )
    report = report_of(rows_of())
    parts = report.adamw.parts
    assert parts["gradient_reward"] == parts["gradient"]
    assert parts["gradient_kl"].null_reasons["value"] == "the loss has no KL term"
    assert "KL" not in report.adamw.sentence
    assert report.to_dict()["adamw"]["parts"]["gradient_kl"]["value"] is None


def test_their_vectors_are_planned_for() -> None:
    """X, Y, and the terms'; two targets share the score estimator's backward, and take one where X weighs tokens."""
    one, both = {"beta": 0.3}, {"beta": 0.3, "entropy_coef": 0.2}
    for extra, score, rao_blackwell in ((one, 5, 3), (both, 6, 4)):
        for estimator, vectors in ((Estimator.SCORE, score), (Estimator.RAO_BLACKWELL, rao_blackwell)):
            reason = report_of(rows_of(**extra), estimator=estimator).units.reason
            assert f"sets of {vectors} vectors" in reason


RESOLVED = Estimate(-0.3, 0.05, (-0.4, -0.2))
WORDS = [
    (Estimate(0.1, 0.02, (0.06, 0.14)), RESOLVED,
     "The KL term holds back 33 % of the fall by the reward term (+0.100 ± 0.020 nats beside −0.300 ± 0.050)."),
    (Estimate(-0.1, 0.02, (-0.14, -0.06)), RESOLVED, "The KL term adds 33 % to the fall by the reward term"),
    (Estimate(0.6, 0.02, (0.56, 0.64)), RESOLVED, "The KL term does more than undo the fall by the reward term"),
    (Estimate(0.1, 0.02, (0.06, 0.14)), Estimate(0.3, 0.3, (-0.3, 0.9)),
     "The KL term by itself raises entropy by 0.100 ± 0.020 nats."),
    (Estimate(0.1, 0.1, (-0.1, 0.3)), RESOLVED, None),
    (Estimate(0.1, why_not="streamed"), RESOLVED, None),
]  # fmt: skip


@pytest.mark.parametrize(("term", "reward", "said"), WORDS)
def test_a_sentence_is_said_where_the_errors_tell(term: Estimate, reward: Estimate, said: str | None) -> None:
    found = term_sentences({"reward": reward, "kl": term})
    assert found == [] if said is None else len(found) == 1 and found[0].startswith(said)
    assert term_sentences({}) == []
