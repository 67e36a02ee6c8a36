"""Rows of another policy: by enumeration unbiased but for 1/W̄, whose bias falls as 1/B; and what would be biased."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import enumerable
from entropy_probe.data.groups import less_weighted_others
from entropy_probe.data.importance import Importance
from entropy_probe.errors import InputError
from entropy_probe.targets.base import Ratio, Sample, Target, TokenPair
from entropy_probe.targets.choices import EntropyUnit, Estimator
from entropy_probe.targets.entropy import EntropyTarget
from entropy_probe.targets.length import Length
from entropy_probe.targets.of_responses import TargetOfResponses
from entropy_probe.targets.reward import Reward
from samplers import LIMIT, TwoPolicies, reward_of

FORMS = [
    (EntropyTarget(estimator, unit), by_prefix)
    for estimator in Estimator
    for unit in EntropyUnit
    for by_prefix in (False, True)
    if estimator is Estimator.RAO_BLACKWELL or not by_prefix
]
RAO_BLACKWELL = EntropyTarget(Estimator.RAO_BLACKWELL)
SCORE = EntropyTarget(Estimator.SCORE)


def name_of(value: object) -> str:
    return f"{value.estimator}, {value.unit}" if isinstance(value, EntropyTarget) else str(value)


def off_by(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize(("target", "by_prefix"), FORMS, ids=name_of)
def test_the_mean_of_x_times_w_is_minus_the_gradient_of_the_entropy(
    target: EntropyTarget, by_prefix: bool, samples: int
) -> None:
    both = TwoPolicies(tokens=3 if samples == 2 else 2)
    truth, ratio = both.truth(target)
    assert off_by(both.expected(target, ratio, samples=samples, by_prefix=by_prefix), truth) < 1e-12


def test_one_response_a_prompt_has_no_baseline_and_no_bias() -> None:
    both = TwoPolicies()
    truth, _ = both.truth(RAO_BLACKWELL)
    for by_prefix in (False, True):
        assert off_by(both.expected(RAO_BLACKWELL, samples=1, by_prefix=by_prefix), truth) < 1e-12


def unweighted(target: Target, sample: Sample, ratio: Ratio | None) -> TokenPair:
    return target.coefficients(replace(sample, importance=None), ratio)


def own_response_in_the_baseline(target: Target, sample: Sample, ratio: Ratio | None) -> TokenPair:
    assert sample.importance is not None
    assert sample.scores is not None
    weights = sample.importance.weights
    mean = weights @ sample.scores / weights.sum()
    return TokenPair(weights * (sample.scores - mean) / len(weights))


def unweighted_baseline_inside(target: Target, sample: Sample, ratio: Ratio | None) -> TokenPair:
    """Not biased: any function of the others will do."""
    right = target.coefficients(replace(sample, importance=None), ratio)
    assert sample.importance is not None
    return TokenPair(right.log_probs * sample.importance.weights)


def over_the_prompts_own_mean(target: Target, sample: Sample, ratio: Ratio | None) -> TokenPair:
    assert sample.importance is not None
    return target.coefficients(sample, ratio).scaled(1.0 / float(sample.importance.weights.mean()))


@pytest.mark.parametrize(
    ("planted", "least"),
    [(unweighted, 0.2), (own_response_in_the_baseline, 0.2), (over_the_prompts_own_mean, 0.02)],
)
def test_planted_errors_are_biased(planted: Callable[..., TokenPair], least: float) -> None:
    both = TwoPolicies()
    truth, _ = both.truth(SCORE)
    assert off_by(both.expected(SCORE, coefficients=planted), truth) > least
    # The way in which they are put in is sound.
    assert off_by(both.expected(SCORE, coefficients=unweighted_baseline_inside), truth) < 1e-12


def test_rao_blackwell_with_weights_in_one_of_its_two_places_is_biased() -> None:
    both = TwoPolicies()
    truth, _ = both.truth(RAO_BLACKWELL)
    assert off_by(both.expected(RAO_BLACKWELL, coefficients=unweighted), truth) > 0.1

    def on_log_probs_alone(target: Target, sample: Sample, ratio: Ratio | None) -> TokenPair:
        right, plain = target.coefficients(sample, ratio), unweighted(target, sample, ratio)
        return TokenPair(right.log_probs, plain.entropies)

    def on_entropies_alone(target: Target, sample: Sample, ratio: Ratio | None) -> TokenPair:
        right, plain = target.coefficients(sample, ratio), unweighted(target, sample, ratio)
        return TokenPair(plain.log_probs, right.entropies)

    for planted in (on_log_probs_alone, on_entropies_alone):
        assert off_by(both.expected(RAO_BLACKWELL, by_prefix=True, coefficients=planted), truth) > 0.04


@pytest.mark.parametrize(("target", "by_prefix"), [(SCORE, False), (RAO_BLACKWELL, False), (RAO_BLACKWELL, True)])
def test_the_bias_of_a_common_mean_weight_falls_as_one_over_the_prompts(target: EntropyTarget, by_prefix: bool) -> None:
    one, two, four, eight = TwoPolicies(tokens=2, distance=0.3).biases(target, 8, by_prefix=by_prefix)
    # One prompt's is that of every prompt normalised by itself, however many there are.
    assert one > two > four > eight
    assert eight / four == pytest.approx(0.5, abs=0.06)
    assert one > 3 * eight


@pytest.mark.parametrize(("target", "by_prefix"), FORMS, ids=name_of)
def test_weights_of_one_change_nothing(target: EntropyTarget, by_prefix: bool) -> None:
    both = TwoPolicies()
    rows = [(0, i) for i in (1, 4, 6, 2, 0)]
    _, ratio = both.truth(target)
    sample = both.sample(rows, [2, 3], by_prefix=by_prefix)
    assert sample.importance is not None
    ones = Importance(tuple(torch.zeros_like(r) for r in sample.importance.log_ratios), 0.0, by_prefix)
    found = target.coefficients(replace(sample, importance=ones), ratio)
    plain = target.coefficients(replace(sample, importance=None), ratio)
    torch.testing.assert_close(found.log_probs, plain.log_probs, rtol=1e-13, atol=1e-15)
    if plain.entropies is not None:
        torch.testing.assert_close(found.entropies, plain.entropies, rtol=1e-13, atol=1e-15)


def test_coefficients_by_prefix_are_those_of_the_formula_written_out() -> None:
    both = TwoPolicies(seed=3, distance=1.0)
    chosen, sizes = [(0, i) for i in (1, 4, 6, 2, 0)], [2, 3]
    log_mean = 0.3
    sample = both.sample(chosen, sizes, by_prefix=True, log_mean=log_mean)
    found = RAO_BLACKWELL.coefficients(sample)
    assert found.entropies is not None
    expected, of_gradients = [], []
    for first, size in ((0, 2), (2, 3)):
        members = chosen[first : first + size]
        longest = max(len(both.responses[i]) for _, i in members)

        def weight(n: int, i: int, s: int) -> float:
            return float(both.log_ratios[n][i][:s].sum().exp())

        def entropy(n: int, i: int, s: int) -> float:
            own = both.terms[n][i].entropies
            return float(own[s]) if s < len(own) else 0.0

        for g, (n, i) in enumerate(members):
            others = [member for j, member in enumerate(members) if j != g]
            for t in range(len(both.responses[i])):
                total = 0.0
                for s in range(t + 1, longest):
                    mean = sum(weight(*o, s) * entropy(*o, s) for o in others) / sum(weight(*o, s) for o in others)
                    total += weight(n, i, s) * (entropy(n, i, s) - mean)
                expected.append(-total / size / np.exp(log_mean))
                of_gradients.append(-weight(n, i, t) / size / np.exp(log_mean))
    np.testing.assert_allclose(found.log_probs.numpy(), expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found.entropies.numpy(), of_gradients, rtol=1e-12)


@pytest.mark.parametrize(("target", "by_prefix"), FORMS, ids=name_of)
def test_entropy_and_length_of_the_policy_from_the_samplers_rows(target: EntropyTarget, by_prefix: bool) -> None:
    both = TwoPolicies()
    entropy = float(enumerable.exact_entropy(both.policy, 0, LIMIT).detach())
    rows = [(0, i) for i in range(len(both.responses))]
    values, exposure = target.counted(both.sample(rows, [len(rows)], by_prefix=by_prefix))
    assert float(both.probabilities[0] @ values) == pytest.approx(entropy, rel=1e-12)
    assert exposure is not None
    _, ratio = both.truth(EntropyTarget(Estimator.SCORE, EntropyUnit.PER_TOKEN))
    assert ratio is not None
    length = 1.0 if target.unit is EntropyUnit.PER_RESPONSE else ratio.mean_length
    assert float(both.probabilities[0] @ exposure) == pytest.approx(length, rel=1e-12)
    if target.unit is EntropyUnit.PER_TOKEN:
        # 1/W̄ is common to numerator and denominator.
        together = both.sample(rows * 2, [len(rows)] * 2, by_prefix=by_prefix)
        assert target.ratio(together) is not None


@pytest.mark.parametrize("target", [Reward(), Length()], ids=lambda target: target.name)
def test_the_gradient_of_reward_and_length_from_the_samplers_rows(target: TargetOfResponses) -> None:
    both = TwoPolicies()
    scores = enumerable.response_scores(both.policy, 0, LIMIT)
    values = [reward_of(r) if target.name == "reward" else float(len(r)) for r in both.responses]
    truth = enumerable.flat_gradient((scores.exp() * torch.tensor(values, dtype=torch.float64)).sum(), both.policy)
    assert off_by(both.expected(target), truth) < 1e-12
    assert off_by(both.expected(target, coefficients=unweighted), truth) > 0.1


def test_equal_values_have_coefficients_of_exactly_zero() -> None:
    both = TwoPolicies()
    sample = replace(both.sample([(0, 1), (0, 4), (0, 6)], [3], by_prefix=False), rewards=torch.full((3,), 0.1))
    assert Reward().weights(sample).tolist() == [0.0, 0.0, 0.0]


def test_one_weight_far_above_the_others_leaves_their_mean_exact() -> None:
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    found = less_weighted_others(values, torch.tensor([600.0, 0.0, 0.0], dtype=torch.float64), [3])
    assert found.tolist() == [-2.0, 1.0, 3.0]
    with pytest.raises(InputError, match="has one response"):
        less_weighted_others(values, values, [1, 2])


def test_parts_of_a_batch_keep_the_mean_weight_of_the_whole() -> None:
    ratios = [torch.tensor([0.1, 0.4]), torch.tensor([-0.3]), torch.tensor([0.2]), torch.tensor([0.5, -0.1, 0.1])]
    whole = Importance.of([r.double() for r in ratios], [1, 3])
    assert float(whole.of_prompts([1, 3]).mean()) == pytest.approx(1.0, rel=1e-14)
    part = whole.of_rows([1, 2, 3])
    assert part.log_mean == whole.log_mean
    torch.testing.assert_close(part.weights, whole.weights[1:])
    torch.testing.assert_close(part.before, whole.before[2:])
    assert whole.before[0] == pytest.approx(float(np.exp(-whole.log_mean)))


def moved_by(both: TwoPolicies, step: float) -> TwoPolicies:
    """The same with π a step further in a fixed direction; what draws stays."""
    found = TwoPolicies(both.seed, both.contexts, both.tokens, both.distance)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for table in found.policy.parameters():
            table += step * torch.randn(table.shape, generator=generator, dtype=table.dtype)
    return found


@pytest.mark.parametrize("unit", list(EntropyUnit))
def test_the_change_by_prefix_is_that_of_the_entropies_and_its_derivative_its_linear_term(unit: EntropyUnit) -> None:
    both = TwoPolicies(distance=0.7)
    target = EntropyTarget(Estimator.RAO_BLACKWELL, unit)
    # Each response as often as q draws it, dealt to two prompts: means over them are E_q but for the rounding of counts.
    counts = (both.probabilities[0] * 20000).round().long().tolist()
    rows = [(0, i) for i, count in enumerate(counts) for _ in range(count)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    rows, half = [rows[k] for k in order], len(rows) // 2
    sizes = [half, len(rows) - half]
    first = both.sample(rows, sizes, by_prefix=True).importance
    assert first is not None
    importance = Importance.of(first.log_ratios, sizes, by_prefix=True)

    def at(step: float) -> Sample:
        moved = moved_by(both, step)
        sample = moved.sample(rows, sizes, by_prefix=True)
        log_probs = torch.cat([moved.log_probs[n][i] for n, i in rows])
        return replace(sample, importance=importance, log_probs=log_probs)

    def truth(step: float) -> float:
        moved = moved_by(both, step)
        entropy = enumerable.exact_entropy(moved.policy, 0, LIMIT)
        if unit is EntropyUnit.PER_TOKEN:
            lengths = torch.tensor([float(len(r)) for r in both.responses])
            entropy = entropy / (enumerable.response_scores(moved.policy, 0, LIMIT).exp() * lengths).sum()
        return float(entropy.detach())

    start = at(0.0)
    found = target.change(start, at(0.3))
    assert found.entropy_before == pytest.approx(truth(0.0), rel=2e-3)
    assert found.entropy_after == pytest.approx(truth(0.3), rel=2e-3)
    assert found.delta_h == pytest.approx(truth(0.3) - truth(0.0), rel=1e-2)
    assert abs(found.delta_h) > 0.03
    # Planted: the weights of θ at θ⁺.
    stale = ratio_of(target, at(0.3)) - ratio_of(target, start)
    assert abs(stale / found.delta_h - 1) > 0.02

    pair = target.derivative(start)
    assert pair.entropies is not None
    ends = [at(step) for step in (1e-5, -1e-5)]
    d_log_probs, d_entropies = (
        (known(getattr(ends[0], name)) - known(getattr(ends[1], name))) / 2e-5
        for name in ("log_probs", "token_entropies")
    )
    linear = float(pair.log_probs @ d_log_probs + pair.entropies @ d_entropies)
    up, down = (target.change(start, end).delta_h for end in ends)
    assert linear == pytest.approx((up - down) / 2e-5, rel=1e-6)


def ratio_of(target: EntropyTarget, sample: Sample) -> float:
    values, counts = target.counted(sample)
    assert counts is not None
    return float(values.sum() / counts.sum())


def known(values: Tensor | None) -> Tensor:
    assert values is not None
    return values
