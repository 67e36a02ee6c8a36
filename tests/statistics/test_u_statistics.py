"""U_cross, row means, delete-one and standard errors against double loops, equal and unequal units."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import oracle
from drawn_kernels import dots_of, found_for, replicates
from entropy_probe.statistics.intervals import interval
from entropy_probe.statistics.jackknife import delete_one, jackknife_variance
from entropy_probe.statistics.u_statistics import cross_statistics
from entropy_probe.statistics.unit_dots import UnitDots
from entropy_probe.statistics.variance import interval_variance


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=2, max_size=7), seed=st.integers(0, 10_000))
def test_u_cross_row_means_and_delete_one_equal_the_double_loop(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    xs, ys = rng.normal(size=(sum(sizes), 5)), rng.normal(size=(sum(sizes), 5))
    u_cross, r, left = oracle.double_loop(xs, ys, sizes)
    found = cross_statistics(dots_of(xs, ys, sizes))
    assert found.u_cross == pytest.approx(u_cross, abs=1e-12)
    np.testing.assert_allclose(found.row_means, r, atol=1e-12)
    if len(sizes) > 2:
        np.testing.assert_allclose(
            delete_one(found.u_cross, found.row_means, np.array(sizes, dtype=float)), left, atol=1e-11
        )


def test_keeping_the_diagonal_would_be_seen() -> None:
    rng = np.random.default_rng(0)
    xs, ys = rng.normal(size=(6, 5)), rng.normal(size=(6, 5))
    kernel = xs @ ys.T
    planted = kernel.mean()
    assert abs(planted - oracle.double_loop(xs, ys)[0]) > 1e-3


def test_equal_units_give_the_guides_formulas() -> None:
    rng = np.random.default_rng(1)
    xs, ys = rng.normal(size=(9, 4)), rng.normal(size=(9, 4))
    found = cross_statistics(dots_of(xs, ys, [1] * 9))
    units = 9
    assert found.u_cross == pytest.approx(
        units / (units - 1) * found.bars_dot - found.diag_sum / (units * (units - 1)), abs=1e-12
    )
    assert found.bars_dot == pytest.approx(xs.mean(0) @ ys.mean(0), abs=1e-12)
    assert found.diag_sum == pytest.approx(sum(x @ y for x, y in zip(xs, ys, strict=True)), abs=1e-12)
    r = found.row_means
    assert found.se_plugin == pytest.approx(math.sqrt(4 * ((r - r.mean()) ** 2).sum() / (units - 1) / units))
    assert found.zeta1_plugin == pytest.approx(((r - r.mean()) ** 2).sum() / (units - 1))
    assert found.se_plugin_guide == pytest.approx(
        math.sqrt(4 * units / (4 * (units - 1)) * ((r - r.mean()) ** 2).sum() / units)
    )
    assert found.zeta1_jackknife == pytest.approx(units * found.se_jackknife**2 / 4)
    assert found.se == pytest.approx(math.sqrt(found.variance))
    # For equal units the two standard errors are one number twice.
    assert found.se_jackknife == pytest.approx(found.se_plugin * (units - 1) / (units - 2), rel=1e-12)


def test_unequal_units_keep_the_identities_of_the_method() -> None:
    rng = np.random.default_rng(2)
    sizes = [3, 3, 2, 2, 1]
    xs, ys = rng.normal(size=(11, 4)), rng.normal(size=(11, 4))
    found = cross_statistics(dots_of(xs, ys, sizes))
    s, units, prompts = np.array(sizes), 5, 11
    pairs = prompts**2 - (s**2).sum()
    assert found.u_cross == pytest.approx(
        (prompts**2 * found.bars_dot - (prompts / units) ** 2 * found.diag_sum) / pairs
    )
    omega = s * (prompts - s) / pairs
    assert (omega * found.row_means).sum() == pytest.approx(found.u_cross)
    assert found.se_plugin == pytest.approx(
        math.sqrt(4 * units / (units - 1) * (omega**2 * (found.row_means - found.u_cross) ** 2).sum())
    )
    assert found.se_this_step is None
    assert "equal" in found.null_reasons["se_this_step"]
    assert found.interval_method is not None
    assert "jackknife" in found.interval_method


def test_halves_say_who_moves_whom() -> None:
    xs, ys = np.diag([1.0, 1.0, 1.0, 1.0]), np.zeros((4, 4))
    ys[0] = [0.0, 6.0, 3.0, 0.0]  # unit 0's update lowers the entropy of units 1 and 2; nobody else updates
    found = cross_statistics(dots_of(xs, ys, [1] * 4))
    np.testing.assert_allclose(found.row_y, [3.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(found.row_x, [0.0, 2.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("units", "nulls"),
    [
        (
            2,
            {
                "se_plugin",
                "se_jackknife",
                "se_plugin_guide",
                "se_this_step",
                "zeta1_plugin",
                "zeta1_jackknife",
                "variance",
                "ci95",
            },
        ),
        (3, {"variance", "ci95"}),
        (4, set()),
    ],
)
def test_few_units_give_nulls_with_reasons(units: int, nulls: set[str]) -> None:
    rng = np.random.default_rng(3)
    found = cross_statistics(dots_of(rng.normal(size=(units, 3)), rng.normal(size=(units, 3)), [1] * units))
    for name in ("se_plugin", "se_jackknife", "se_plugin_guide", "se_this_step", "zeta1_plugin", "zeta1_jackknife",
                 "variance", "ci95"):  # fmt: skip
        assert (getattr(found, name) is None) == (name in nulls), name
        assert (name in found.null_reasons) == (name in nulls), name


@pytest.mark.parametrize(
    ("signal", "noise", "low", "high"), [(1.0, 0.3, 0.94, 0.965), (0.1, 1.0, 0.94, 0.99)], ids=["linear", "degenerate"]
)
def test_the_interval_covers_the_truth_as_often_as_it_says(
    signal: float, noise: float, low: float, high: float
) -> None:
    kernels, truth = replicates(16, 3000, signal, noise, seed=7)
    found = found_for(kernels)
    covered = np.mean([f.ci95[0] <= truth <= f.ci95[1] for f in found if f.ci95 is not None])
    assert low - 0.01 <= covered <= high + 0.01

    t = stats.t.ppf(0.975, 15)
    guide = np.mean([abs(f.u_cross - truth) <= t * f.se_plugin_guide for f in found])
    assert guide > 0.99  # the guide's formula is the standard deviation of r: an interval that never misses


def test_standard_errors_shrink_with_units_and_the_guides_does_not() -> None:
    sizes = (16, 64)
    kernels = {u: replicates(u, 300, 1.0, 0.4, seed=9)[0] for u in sizes}
    means = {u: found_for(kernels[u]) for u in sizes}

    def ratio(name: str) -> float:
        return float(np.mean([getattr(f, name) for f in means[64]]) / np.mean([getattr(f, name) for f in means[16]]))

    assert ratio("se_plugin") == pytest.approx(0.5, abs=0.06)
    assert ratio("se_jackknife") == pytest.approx(0.5, abs=0.06)
    assert ratio("se_plugin_guide") == pytest.approx(1.0, abs=0.1)


def test_the_self_test_residual_is_rounding_and_sees_a_wrong_sum() -> None:
    rng = np.random.default_rng(11)
    xs, ys = rng.normal(size=(6, 5)), rng.normal(size=(6, 5))
    kernel = xs @ ys.T
    good = UnitDots.from_kernel(kernel, [1] * 6, float(xs.sum(0) @ ys.sum(0)))
    assert cross_statistics(good).self_test_residual < 1e-14
    bad = UnitDots.from_kernel(kernel, [1] * 6, float(xs.sum(0) @ ys.sum(0)) + 0.01)
    assert cross_statistics(bad).self_test_residual > 1e-5


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


@pytest.mark.parametrize("side", ["x_dot_sum", "y_dot_sum"])
def test_the_self_test_residual_is_the_gap_of_either_side_over_the_size_of_the_terms(side: str) -> None:
    good = UnitDots.from_kernel(np.random.default_rng(18).normal(size=(6, 6)), [1] * 6)
    bad = dataclasses.replace(good, **{side: getattr(good, side) + 0.5 * np.eye(6)[2]})
    scale = 0.5 * (np.abs(bad.x_dot_sum).sum() + np.abs(bad.y_dot_sum).sum())
    assert cross_statistics(bad).self_test_residual == pytest.approx(0.5 / scale, rel=1e-9)
