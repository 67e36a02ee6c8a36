"""Identities of the U-statistic at equal blocks, of its interval and of sums of dots."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from test_u_statistics import dots_of

import oracle
from entropy_probe.statistics.intervals import interval
from entropy_probe.statistics.jackknife import jackknife_variance
from entropy_probe.statistics.u_statistics import cross_statistics
from entropy_probe.statistics.unit_dots import UnitDots
from entropy_probe.statistics.variance import interval_variance, unbiased_variance


def test_se_this_step_equals_its_double_loop() -> None:
    rng = np.random.default_rng(13)
    units = 6
    kernel = 2.0 + rng.normal(size=(units, units))
    found = cross_statistics(UnitDots.from_kernel(kernel, [1] * units))
    x, y, u = found.row_x, found.row_y, found.u_cross
    given = sum((x[i] - u) ** 2 for i in range(units)) / (units * (units - 1))
    shared = sum(
        (kernel[i, j] - x[i] - y[j] + u) * (kernel[j, i] - x[j] - y[i] + u)
        for i in range(units) for j in range(units) if i != j
    ) / (units * (units - 1)) ** 2  # fmt: skip
    assert abs(shared) > 0.01 * given
    assert found.se_this_step == pytest.approx(math.sqrt(given + shared), rel=1e-10)


def test_blocks_of_one_size_are_as_many_units() -> None:
    kernel = np.random.default_rng(14).normal(size=(7, 7))
    single = cross_statistics(UnitDots.from_kernel(kernel, [1] * 7))
    blocks = cross_statistics(UnitDots.from_kernel(9.0 * kernel, [3] * 7))
    for name in ("u_cross", "se_plugin", "se_jackknife", "se_plugin_guide", "se_this_step", "variance", "bars_dot"):
        assert getattr(blocks, name) == pytest.approx(getattr(single, name), rel=1e-10), name
    assert blocks.interval_method == single.interval_method
    assert blocks.diag_sum == pytest.approx(single.diag_sum, rel=1e-10)


@pytest.mark.parametrize(
    ("sizes", "method"), [([1] * 8, "unbiased"), ([2, 2, 1, 1, 1], "jackknife")], ids=["equal", "unequal"]
)
def test_the_interval_is_the_chosen_one_or_the_jackknifes_t(sizes: list[int], method: str) -> None:
    kernel = np.random.default_rng(15).normal(size=(len(sizes), len(sizes)))
    found = cross_statistics(UnitDots.from_kernel(kernel, sizes))
    variance = jackknife_variance(found.u_cross, found.row_means, np.array(sizes, dtype=float))
    if method == "unbiased":
        variance = interval_variance(kernel, found.u_cross, variance)
    assert method in str(found.interval_method)
    assert found.variance == pytest.approx(variance, rel=1e-12)
    assert found.ci95 is not None
    half_width = 2.7764451 * math.sqrt(variance)  # t of 4 degrees of freedom
    expected = interval(kernel) if method == "unbiased" else (found.u_cross - half_width, found.u_cross + half_width)
    assert found.ci95 == pytest.approx(expected, rel=1e-6)


def test_the_floor_under_the_interval_variance_is_what_the_jackknife_doubles() -> None:
    kernel = 3.0 + np.random.default_rng(16).normal(size=(6, 6))
    unbiased = unbiased_variance(kernel, 0.0)  # a U_cross of 0 makes it negative
    assert unbiased < 0
    tau_squared = 100.0 * abs(unbiased)
    jackknife = unbiased + tau_squared * (4 / (6 * 4) - 2 / (6 * 5))
    assert interval_variance(kernel, 0.0, jackknife) == pytest.approx(2 * tau_squared / (6 * 5), rel=1e-10)
    assert interval_variance(kernel, 0.0, unbiased - 1.0) == 0.0


def test_the_jackknife_variance_is_the_spread_of_the_delete_one_values_about_their_own_mean() -> None:
    rng = np.random.default_rng(17)
    sizes = [4, 2, 1, 1]
    xs, ys = rng.normal(size=(8, 3)), rng.normal(size=(8, 3))
    _, _, left = oracle.double_loop(xs, ys, sizes)
    expected = 3 / 4 * sum((value - sum(left) / 4) ** 2 for value in left)
    found = cross_statistics(dots_of(xs, ys, sizes))
    assert found.se_jackknife == pytest.approx(math.sqrt(expected), rel=1e-10)
    assert found.zeta1_jackknife == pytest.approx(4 * expected / 4, rel=1e-10)


@pytest.mark.parametrize("side", ["x_dot_sum", "y_dot_sum"])
def test_the_self_test_residual_is_the_gap_of_either_side_over_the_size_of_the_terms(side: str) -> None:
    good = UnitDots.from_kernel(np.random.default_rng(18).normal(size=(6, 6)), [1] * 6)
    bad = dataclasses.replace(good, **{side: getattr(good, side) + 0.5 * np.eye(6)[2]})
    scale = 0.5 * (np.abs(bad.x_dot_sum).sum() + np.abs(bad.y_dot_sum).sum())
    assert cross_statistics(bad).self_test_residual == pytest.approx(0.5 / scale, rel=1e-9)


def test_dots_scale_and_add_field_by_field() -> None:
    rng = np.random.default_rng(19)
    xs, ys = rng.normal(size=(5, 8)), rng.normal(size=(5, 8))
    left, right = (UnitDots.from_kernel(xs[:, part] @ ys[:, part].T, [1] * 5) for part in (slice(3), slice(3, 8)))
    whole = UnitDots.from_kernel(xs @ ys.T, [1] * 5)
    scaled = UnitDots.from_kernel(2.5 * xs @ ys.T, [1] * 5)
    for name in ("x_dot_sum", "y_dot_sum", "diagonal", "sum_dot", "kernel"):
        np.testing.assert_allclose(getattr(left + right, name), getattr(whole, name), rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(getattr(whole.scaled(2.5), name), getattr(scaled, name), rtol=1e-12, err_msg=name)
