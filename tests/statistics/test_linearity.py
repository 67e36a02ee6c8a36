"""Linear range, curvature and power laws on curves whose answers are known, with and without rounding noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import linregress

from entropy_probe import InputError
from entropy_probe.statistics.linearity import (
    SweepRange,
    curvature_at_zero,
    fit_power_law,
    linear_until,
    second_difference,
)

GRID = SweepRange(0.1, 10.0, 9).factors


def quadratic(slope: float, curvature: float) -> Callable[[float], float]:
    return lambda alpha: slope * alpha + 0.5 * curvature * alpha**2


def test_factors_are_evenly_spaced_in_their_logarithm_and_one_is_among_them() -> None:
    factors = SweepRange.parse("0.1:10:9").factors
    assert (factors[0], factors[4], factors[-1]) == pytest.approx((0.1, 1.0, 10.0), rel=1e-14)
    np.testing.assert_allclose(np.diff(np.log(factors)), math.log(10) / 4, rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "LOW:HIGH:COUNT"),
        ("1", "LOW:HIGH:COUNT"),
        ("0.1:10", "LOW:HIGH:COUNT"),
        ("0.1:10:9:2", "LOW:HIGH:COUNT"),
        ("a:10:9", "LOW:HIGH:COUNT"),
        ("0.1:10:9.5", "LOW:HIGH:COUNT"),
        ("0:10:9", "0 < LOW < HIGH"),
        ("-1:10:9", "0 < LOW < HIGH"),
        ("10:0.1:9", "0 < LOW < HIGH"),
        ("1:1:9", "0 < LOW < HIGH"),
        ("nan:10:9", "0 < LOW < HIGH"),
        ("0.1:inf:9", "0 < LOW < HIGH"),
        ("0.1:10:1", "2 to 1000"),
        ("0.1:10:-3", "2 to 1000"),
        ("0.1:10:1001", "2 to 1000"),
    ],
)
def test_nonsense_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        SweepRange.parse(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("slope", [-0.03, 2.0])
@pytest.mark.parametrize("share", [0.02, 0.5, 3.0, -0.7])
def test_the_end_of_the_linear_range_of_a_parabola_is_where_it_is(slope: float, share: float) -> None:
    """½ C α² = 0.1 L α at α = 0.2 L/C, between grid points, below all of them, of either sign."""
    found = linear_until(quadratic(slope, 0.2 * slope / share), slope, GRID)
    assert found.until == pytest.approx(abs(share), rel=1e-3)
    assert not found.is_bound
    assert found.reason is None


def test_a_curve_that_comes_back_counts_up_to_its_first_departure() -> None:
    def curve(alpha: float) -> float:
        return alpha * (1.0 + 0.3 * math.exp(-((math.log(alpha / 1.5)) ** 2)))

    until = linear_until(curve, 1.0, GRID).until
    assert until is not None
    assert until < 1.0
    assert curve(until) / until == pytest.approx(1.1, rel=1e-3)
    assert abs(curve(10.0) / 10.0 - 1.0) < 0.1


def test_a_curve_that_is_linear_everywhere_says_that_the_end_is_beyond() -> None:
    found = linear_until(quadratic(1.0, 1e-6), 1.0, GRID)
    assert (found.until, found.is_bound) == (GRID[-1], True)


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_a_linear_term_that_is_off_by_two_percent_is_nowhere_within_one(factor: float) -> None:
    found = linear_until(quadratic(1.0, 0.02 * (1 - factor)), factor, GRID, tolerance=0.01)
    assert found.until is None
    assert found.reason is not None
    assert "differ by more than 1 %" in found.reason


def test_a_linear_term_of_zero_and_one_within_the_noise_have_no_linear_range() -> None:
    zero = linear_until(quadratic(0.0, 1.0), 0.0, GRID)
    assert (zero.until, zero.reason) == (None, "the linear term is zero")
    noise = linear_until(lambda alpha: 1e-9 * alpha, 1e-9, GRID, floor=1e-6)
    assert noise.until is None
    assert "within the noise floor of 1.0e-06" in (noise.reason or "")


def test_noise_at_small_factors_is_no_departure() -> None:
    def curve(alpha: float) -> float:
        return quadratic(1.0, 0.1)(alpha) + 1e-2 * math.sin(1e3 * alpha)

    assert linear_until(curve, 1.0, [0.01, *GRID], floor=1e-2).until == pytest.approx(2.0, abs=0.3)
    # Without the floor the smallest factors would depart.
    shorter = linear_until(curve, 1.0, [0.01, *GRID]).until
    assert shorter is None or shorter < 0.2


def test_the_second_difference_is_exact_up_to_the_third_power() -> None:
    assert second_difference(lambda a: 0.25 + 3 * a + 2 * a**2 + 5 * a**3, 0.5) == pytest.approx(4.0, rel=1e-14)


def test_the_curvature_of_a_smooth_curve_is_found_within_its_own_error() -> None:
    found = curvature_at_zero(lambda a: 1.0 - math.exp(-2.0 * a), 0.5, 1e-13)
    assert abs(found.value + 4.0) <= found.error < 1e-3
    assert found.resolved
    assert found.second_order(0.1) == pytest.approx(-0.02, rel=1e-3)


@pytest.mark.parametrize("floor", [1e-4, 1e-7, 1e-10])
def test_rounding_noise_stays_within_the_stated_error_and_widens_the_difference(floor: float) -> None:
    steps = []
    for seed in range(50):
        rng = np.random.default_rng(seed)

        def curve(alpha: float, rng: np.random.Generator = rng) -> float:
            noise = floor * rng.uniform(-1, 1) if alpha else 0.0
            return math.sin(alpha) + math.cos(alpha) - 1.0 + noise

        found = curvature_at_zero(curve, 1.0, floor)
        assert abs(found.value + 1.0) <= found.error
        steps.append(found.h)
    assert min(steps) >= 0.5 * floor**0.25
    # Planted: a fixed small difference would be all noise.
    rng = np.random.default_rng(0)
    assert (
        abs(second_difference(lambda a: math.sin(a) + floor * rng.uniform(-1, 1) * (a != 0), 1e-3 * floor**0.25)) > 1.0
    )


def test_a_curvature_within_its_error_is_not_resolved() -> None:
    rng = np.random.default_rng(1)
    assert not curvature_at_zero(lambda a: a + 1e-6 * rng.uniform(-1, 1) * (a != 0), 0.01, 1e-6).resolved


def test_a_power_law_has_its_exponent_and_the_r_squared_of_a_regression() -> None:
    x = np.geomspace(0.01, 1.0, 9)
    exact = fit_power_law(x, 3.0 * x**1.7)
    assert exact.exponent == pytest.approx(1.7, rel=1e-12)
    assert exact.r_squared == pytest.approx(1.0, abs=1e-12)
    noisy = x**2 * np.exp(0.1 * np.random.default_rng(0).normal(size=9))
    found, truth = fit_power_law(x, noisy), linregress(np.log(x), np.log(noisy))
    assert found.exponent == pytest.approx(truth.slope, rel=1e-12)
    assert found.r_squared == pytest.approx(truth.rvalue**2, rel=1e-12)
    assert 0.99 < found.r_squared < 1.0


@pytest.mark.parametrize("y", [[1.0, 2.0], [1.0, 0.0, 2.0], [1.0, -1.0, 2.0]])
def test_a_power_law_of_too_few_or_other_than_positive_values_is_refused(y: list[float]) -> None:
    with pytest.raises(ValueError, match="three positive points"):
        fit_power_law([1.0, 2.0, 3.0][: len(y)], y)
