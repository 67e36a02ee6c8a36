"""SNIS in log space, ESS, the clustered error and Pareto smoothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from arviz_stats.base import array_stats
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from entropy_probe.statistics.importance_sampling import (
    Weighting,
    effective_sample_size,
    entropy_change,
    entropy_estimate,
    importance_weights,
    linear_term,
    pareto_k_limit,
    pareto_smooth,
)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=6), seed=st.integers(0, 1000))
def test_delta_h_and_ess_equal_plain_sums(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = -rng.gamma(2.0, 1.0, size=sum(sizes))
    after = scores + 0.5 * rng.normal(size=sum(sizes))
    found = entropy_change(scores, after, sizes)
    delta_h, ess = oracle.snis_change(scores, after, sizes)
    assert found.delta_h == pytest.approx(delta_h, abs=1e-12)
    assert found.weights.ess == pytest.approx(ess, rel=1e-12)
    assert found.weights.weights.sum() == pytest.approx(1.0)


def test_log_space_survives_scores_that_plain_sums_do_not() -> None:
    scores = np.array([-5000.0, -5001.0, -5002.0, -5003.0])
    found = entropy_change(scores, scores + np.array([800.0, 801.0, 799.0, 800.0]), [2, 2])
    assert math.isfinite(found.delta_h)
    assert found.weights.ess > 1
    with pytest.raises(OverflowError):
        oracle.snis_change(scores, scores + 800.0, [2, 2])


def test_scores_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(ValueError, match="not finite"):
        entropy_change(np.array([-1.0, -2.0]), np.array([-1.0, np.nan]), [1, 1])


def test_the_clustered_error_is_the_spread_over_fresh_prompts() -> None:
    """Responses of a prompt share its level, so an error that takes them as independent is far too small."""
    rng = np.random.default_rng(0)
    prompts, responses, shift = 40, 8, 0.2
    deltas, errors, naive, entropies, entropy_errors = [], [], [], [], []
    for _ in range(1500):
        level = rng.normal(size=(prompts, 1))
        scores = -3.0 + level + 0.1 * rng.normal(size=(prompts, responses))
        after = scores + shift * level * (1.0 + 0.1 * rng.normal(size=(prompts, responses)))
        found = entropy_change(scores.ravel(), after.ravel(), [responses] * prompts)
        deltas.append(found.delta_h)
        errors.append(found.se)
        naive.append(entropy_change(scores.ravel(), after.ravel(), [1] * (prompts * responses)).se)
        estimate, error = entropy_estimate(-scores.ravel(), [responses] * prompts)
        entropies.append(estimate)
        entropy_errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(deltas), rel=0.1)
    assert np.mean(entropy_errors) == pytest.approx(np.std(entropies), rel=0.1)
    assert np.mean(naive) < 0.6 * np.std(deltas)


def test_pareto_shape_is_recovered_and_smoothing_is_arvizs() -> None:
    rng = np.random.default_rng(1)
    for shape in (0.3, 0.8):
        log_weights = np.log1p(rng.pareto(1 / shape, size=4000))
        k_hat, smoothed, reason = pareto_smooth(log_weights)
        assert reason is None
        assert k_hat == pytest.approx(shape, abs=0.15)
        assert smoothed is not None
        assert smoothed.sum() == pytest.approx(1.0)
        expected, _ = array_stats.psislw(-log_weights)
        np.testing.assert_allclose(smoothed, np.exp(expected) / np.exp(expected).sum(), rtol=1e-10)
    # The other sign would fit the small weights.
    assert float(array_stats.psislw(log_weights)[1]) < 0.3


def test_too_few_or_equal_weights_give_no_shape_and_a_reason() -> None:
    assert pareto_smooth(np.zeros(24))[2] == "24 responses; a tail of 5 (25 responses) is the least that can be fitted"
    assert "equal" in str(pareto_smooth(np.zeros(100))[2])
    found = importance_weights(np.zeros(100), np.zeros(100), np.full(100, 0.01))
    assert found.pareto_k is None
    assert found.ess == pytest.approx(100.0)


def test_the_clustered_error_equals_its_formula_at_four_prompts() -> None:
    rng = np.random.default_rng(3)
    sizes = [2, 3, 1, 4]
    scores = -rng.gamma(2.0, 1.0, size=10)
    after = scores + 0.3 * rng.normal(size=10)
    found = entropy_change(scores, after, sizes)
    total, start = 0.0, 0
    for size in sizes:
        part = range(start, start + size)
        total += (
            sum(
                found.weights.weights[i] * (-after[i] - found.entropy_after)
                - 1 / (4 * size) * (-scores[i] - found.entropy_before)
                for i in part
            )
            ** 2
        )
        start += size
    assert found.se == pytest.approx(math.sqrt(4 / 3 * total), rel=1e-12)


def test_a_step_of_zero_has_the_whole_sample_whatever_the_group_sizes() -> None:
    sizes = [2, 2, 40, 40]
    rng = np.random.default_rng(4)
    scores = -rng.gamma(2.0, 1.0, size=84)
    found = entropy_change(scores, scores + 1e-9 * rng.normal(size=84), sizes)
    assert found.weights.ess < 20
    assert found.weights.ess_fraction == pytest.approx(1.0)
    assert not found.weights.is_low


def test_the_tail_is_that_of_the_ratios_and_not_of_the_group_sizes() -> None:
    rng = np.random.default_rng(5)
    scores = -rng.gamma(2.0, 1.0, size=240)
    after = scores + 0.1 * rng.normal(size=240)
    equal, unequal = (entropy_change(scores, after, sizes).weights for sizes in ([60] * 4, [10, 10, 110, 110]))
    assert equal.pareto_k == unequal.pareto_k
    assert unequal.smoothed is not None
    assert unequal.smoothed.sum() == pytest.approx(1.0)
    assert unequal.smoothed[:20].sum() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("count", "limit"), [(25, 0.284647), (100, 0.5), (1000, 2 / 3), (2154, 0.7), (10**6, 0.7)])
def test_the_limit_of_the_tails_shape_grows_with_the_number_of_weights(count: int, limit: float) -> None:
    """As arviz has it: 0.7 from 2200 weights on."""
    assert pareto_k_limit(count) == pytest.approx(limit, abs=1e-4)
    rng = np.random.default_rng(7)
    if count <= 1000:
        scores = rng.normal(size=count)
        assert entropy_change(scores, scores, [count // 5] * 5).weights.pareto_k_limit == pareto_k_limit(count)


def test_unequal_groups_weigh_prompts_equally() -> None:
    scores = np.array([-1.0, -1.0, -1.0, -1.0, -5.0])
    assert entropy_estimate(-scores, [4, 1])[0] == pytest.approx(3.0)
    assert entropy_change(scores, scores, [4, 1]).delta_h == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(
    ("weighting", "other_sampler"), [*((weighting, False) for weighting in Weighting), (Weighting.GLOBAL, True)]
)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("by_tokens", [False, True])
def test_the_linear_term_is_the_derivative_of_every_measure(
    weighting: Weighting, per_token: bool, by_tokens: bool, other_sampler: bool
) -> None:
    rng = np.random.default_rng(3)
    sizes = [3, 2, 4]
    scores, v, d_scores, d_v = -rng.gamma(2.0, 1.0, size=9), rng.gamma(2.0, 1.0, size=9), *rng.normal(size=(2, 9))
    lengths = rng.integers(1, 6, size=9).astype(float) if per_token else None
    log_weights = rng.normal(size=9) if other_sampler else None

    def change(eps: float) -> float:
        entropies = (v, v + eps * d_v) if by_tokens else None
        found = entropy_change(
            scores,
            scores + eps * d_scores,
            sizes,
            entropies=entropies,
            lengths=lengths,
            weighting=weighting,
            log_weights=log_weights,
        )
        return found.delta_h

    term = linear_term(
        scores,
        sizes,
        entropies=v if by_tokens else None,
        lengths=lengths,
        weighting=weighting,
        log_weights=log_weights,
    )
    linear = float(term.on_scores @ d_scores)
    if term.on_entropies is not None:
        linear += float(term.on_entropies @ d_v)
    assert linear == pytest.approx((change(1e-6) - change(-1e-6)) / 2e-6, rel=1e-6)
    assert (term.on_entropies is not None) is by_tokens


def test_weights_of_each_prompt_sum_to_its_share_and_are_not_smoothed() -> None:
    rng = np.random.default_rng(4)
    scores = -rng.gamma(2.0, 1.0, size=60)
    after = scores + rng.normal(size=60)
    found = entropy_change(scores, after, [20] * 3, weighting=Weighting.PER_PROMPT)
    assert found.weights.weights.reshape(3, 20).sum(axis=1) == pytest.approx([1 / 3] * 3)
    assert found.delta_h_smoothed is None
    assert entropy_change(scores, after, [20] * 3).delta_h_smoothed is not None


def test_rows_of_another_sampler_give_the_entropies_of_both_policies() -> None:
    """All outcomes once, as a uniform sampler has them on average: SNIS with their weights is then exact."""
    rng = np.random.default_rng(9)
    scores, after = (np.log(p / p.sum()) for p in rng.random(size=(2, 12)))
    log_weights = scores + 3.0  # log π − log uniform, up to a constant
    found = entropy_change(scores, after, [3, 3, 3, 3], log_weights=log_weights)
    assert found.entropy_before == pytest.approx(-float(np.exp(scores) @ scores), rel=1e-12)
    assert found.entropy_after == pytest.approx(-float(np.exp(after) @ after), rel=1e-12)
    # Planted: the sampler taken for θ.
    assert abs(entropy_change(scores, after, [3, 3, 3, 3]).delta_h - found.delta_h) > 0.01
    ess, fraction = effective_sample_size(log_weights, [3, 3, 3, 3])
    assert ess == pytest.approx(np.exp(scores).sum() ** 2 / (np.exp(scores) ** 2).sum(), rel=1e-12)
    assert fraction == pytest.approx(ess / 12, rel=1e-12)
    assert effective_sample_size(np.zeros(5), [4, 1])[1] == pytest.approx(1.0)


def test_the_error_of_another_samplers_rows_is_their_spread() -> None:
    rng = np.random.default_rng(10)
    prompts, responses = 60, 4
    deltas, errors = [], []
    for _ in range(800):
        level = rng.normal(size=(prompts, 1))
        log_weights = 0.5 * rng.normal(size=(prompts, responses))
        scores = -3.0 + level + 0.3 * log_weights
        after = scores + 0.3 * level + 0.1 * rng.normal(size=(prompts, responses))
        sizes = [responses] * prompts
        found = entropy_change(scores.ravel(), after.ravel(), sizes, log_weights=log_weights.ravel())
        deltas.append(found.delta_h)
        errors.append(found.se)
    assert np.mean(errors) == pytest.approx(np.std(deltas), rel=0.08)
