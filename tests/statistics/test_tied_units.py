"""What W̄ ties: every row's error is the derivative of the whole estimate, its common mean weight included."""

from __future__ import annotations

import math

import numpy as np
import pytest

from entropy_probe.common.arrays import FloatArray
from entropy_probe.optimizers.step_parts import predict_parts
from entropy_probe.statistics.tied_units import tied_by_weights, tied_kernel
from entropy_probe.statistics.two_batches import fold_statistics, folds_of, two_batch_statistics
from entropy_probe.statistics.u_statistics import cross_statistics
from entropy_probe.statistics.unit_dots import UnitDots

SIZES = ([1] * 6, [3] * 5, [4, 4, 3, 3, 2])


def drawn(units: int, seed: int = 0) -> tuple[FloatArray, FloatArray]:
    """XS_u · YS_w without 1/W̄, and W_u."""
    rng = np.random.default_rng(seed)
    return 1.0 + rng.normal(size=(units, units)), np.exp(0.5 * rng.normal(size=units))


def estimate(raw: FloatArray, weights: FloatArray, sizes: FloatArray, counts: FloatArray) -> float:
    """U_cross / W̄ where unit u counts ``counts[u]`` times; written out."""
    units = range(len(sizes))
    pairs = [(u, w) for u in units for w in units if u != w]
    above = sum(counts[u] * counts[w] * raw[u, w] for u, w in pairs)
    below = sum(counts[u] * counts[w] * sizes[u] * sizes[w] for u, w in pairs)
    return float(above / below / ((counts * sizes) @ weights / (counts @ sizes)))


def derivative(raw: FloatArray, weights: FloatArray, sizes: FloatArray, unit: int, step: float = 1e-5) -> float:
    ends = []
    for sign in (1.0, -1.0):
        counts = np.ones(len(sizes))
        counts[unit] += sign * step
        ends.append(estimate(raw, weights, sizes, counts))
    return (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize("given", SIZES)
def test_rows_are_derivatives_of_the_whole_estimate(given: list[int]) -> None:
    sizes = np.array(given, dtype=float)
    raw, weights = drawn(len(sizes))
    mean = float(sizes @ weights / sizes.sum())
    dots = UnitDots.from_kernel(raw / mean, given)
    found = cross_statistics(dots, weights=weights / mean)
    omega = sizes * (sizes.sum() - sizes) / (sizes.sum() ** 2 - (sizes**2).sum())
    assert found.u_cross == pytest.approx(estimate(raw, weights, sizes, np.ones(len(sizes))), rel=1e-12)
    assert float(omega @ found.row_means) == pytest.approx(found.u_cross, rel=1e-12)
    expected = [derivative(raw, weights, sizes, unit) for unit in range(len(sizes))]
    np.testing.assert_allclose(2 * omega * (found.row_means - found.u_cross), expected, rtol=1e-6, atol=1e-9)
    # Planted: W̄ forgotten.
    plain = cross_statistics(dots)
    assert np.abs(2 * omega * (plain.row_means - plain.u_cross) - expected).max() > 0.1 * np.abs(expected).max()
    np.testing.assert_array_equal(plain.row_y, found.row_y)


def test_the_tied_kernel_has_the_rows_and_columns_that_it_should() -> None:
    units = 7
    raw, weights = drawn(units, 3)
    kernel = raw / weights.mean()
    u_cross = (kernel.sum() - np.trace(kernel)) / (units * (units - 1))
    ties = tied_by_weights(u_cross, weights / weights.mean(), np.ones(units))
    np.testing.assert_allclose(ties, u_cross * (weights / weights.mean() - 1), rtol=1e-12)
    found = tied_kernel(kernel, ties)
    for u in range(units):
        others = [w for w in range(units) if w != u]
        assert found[u, others].mean() == pytest.approx(kernel[u, others].mean() - ties[u], rel=1e-12)
        assert found[others, u].mean() == pytest.approx(kernel[others, u].mean(), rel=1e-12)


def test_weights_of_one_tie_nothing() -> None:
    raw, _ = drawn(6)
    dots = UnitDots.from_kernel(raw, [1] * 6)
    plain, ones = cross_statistics(dots), cross_statistics(dots, weights=np.ones(6))
    np.testing.assert_array_equal(plain.row_means, ones.row_means)
    assert (plain.se_this_step, plain.ci95, plain.variance) == (ones.se_this_step, ones.ci95, ones.variance)


@pytest.mark.parametrize("given", SIZES)
def test_the_gradients_part_of_the_step_is_tied_as_the_row_of_x_is(given: list[int]) -> None:
    sizes = np.array(given, dtype=float)
    raw, weights = drawn(len(sizes), 1)
    mean = float(sizes @ weights / sizes.sum())
    kernel = raw / mean
    along = np.zeros((len(sizes), 6))
    # A step that is Ȳ itself: XS_u · Ȳ_−u.
    along[:, 1] = (kernel.sum(1) - np.diagonal(kernel)) / (sizes.sum() - sizes)
    along[:, 0] = kernel[:, 0]  # any fixed direction
    found = predict_parts(along, kernel, given, weights=weights / mean)
    assert np.allclose(found.deviations.sum(0), 0.0, atol=1e-12)
    statistics = cross_statistics(UnitDots.from_kernel(kernel, given), weights=weights / mean)
    omega = sizes * (sizes.sum() - sizes) / (sizes.sum() ** 2 - (sizes**2).sum())
    np.testing.assert_allclose(found.deviations[:, 1], -omega * (statistics.row_x - statistics.u_cross), rtol=1e-10)
    # Of a direction that is fixed, Σ X / Σ W: its derivative in every unit's count.
    share = sizes / sizes.sum()
    value = float(along[:, 0].sum() / sizes.sum())
    expected = -(along[:, 0] / sizes.sum() - share * value * weights / mean)
    np.testing.assert_allclose(found.deviations[:, 0], expected, rtol=1e-10, atol=1e-14)


def test_two_batches_are_tied_on_the_evaluations_side() -> None:
    rng = np.random.default_rng(5)
    rows, columns = 200, 300
    weights = np.exp(0.4 * rng.normal(size=rows))
    # X_n proportional to W_n: normalised, the rows have no noise at all.
    raw = weights[:, None] * (2.0 + 0.01 * rng.normal(size=(rows, columns)))
    kernel, relative = raw / weights.mean(), weights / weights.mean()
    found, loose = two_batch_statistics(kernel, relative), two_batch_statistics(kernel)
    assert found.mean == pytest.approx(loose.mean, rel=1e-12)
    assert found.se < 0.05 * loose.se


def test_the_error_over_folds_is_that_of_leaving_a_prompt_out_of_the_mean_weight_too() -> None:
    rng = np.random.default_rng(6)
    prompts = 40
    weights = np.exp(0.4 * rng.normal(size=prompts))
    raw = weights[:, None] * (1.0 + rng.normal(size=prompts)[None, :] + 0.3 * rng.normal(size=(prompts, prompts)))
    folds = folds_of(prompts, 4)
    kernel, relative = raw / weights.mean(), weights / weights.mean()
    found, loose = fold_statistics(kernel, folds, relative), fold_statistics(kernel, folds)
    assert (found.estimate.value, found.by_fold) == (loose.estimate.value, loose.by_fold)
    left = []
    for out in range(prompts):
        kept = [n for n in range(prompts) if n != out]
        part = raw[np.ix_(kept, kept)] / weights[kept].mean()
        left.append(fold_statistics(part, [folds[n] for n in kept]).estimate.value)
    exact = math.sqrt((prompts - 1) / prompts * float(((np.array(left) - np.mean(left)) ** 2).sum()))
    assert found.estimate.se == pytest.approx(exact, rel=0.05)
    assert loose.estimate.se is not None
    assert abs(loose.estimate.se / exact - 1) > 0.1
