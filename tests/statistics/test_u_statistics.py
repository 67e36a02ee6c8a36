"""U_cross, row means, delete-one and standard errors against double loops, equal and unequal units."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import oracle
from entropy_probe.statistics.jackknife import delete_one, jackknife_variance
from entropy_probe.statistics.u_statistics import cross_statistics
from entropy_probe.statistics.unit_dots import UnitDots
from entropy_probe.statistics.variance import interval_variance, unbiased_variance


def unit_sums(vectors: np.ndarray, sizes: list[int]) -> np.ndarray:
    return np.add.reduceat(vectors, np.concatenate([[0], np.cumsum(sizes)[:-1]]), axis=0)


def dots_of(xs: np.ndarray, ys: np.ndarray, sizes: list[int]) -> UnitDots:
    return UnitDots.from_kernel(unit_sums(xs, sizes) @ unit_sums(ys, sizes).T, sizes)


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


def test_unequal_units_keep_the_identities_of_the_design() -> None:
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


def test_unbiased_variance_equals_sums_over_distinct_indices() -> None:
    rng = np.random.default_rng(4)
    units = 6
    kernel = rng.normal(size=(units, units))
    h = 0.5 * (kernel + kernel.T)
    distinct = [
        h[i, j] * h[k, m]
        for i in range(units) for j in range(units) for k in range(units) for m in range(units)
        if len({i, j, k, m}) == 4
    ]  # fmt: skip
    u_cross = sum(h[i, j] for i in range(units) for j in range(units) if i != j) / (units * (units - 1))
    assert unbiased_variance(kernel, u_cross) == pytest.approx(u_cross**2 - np.mean(distinct), rel=1e-10)


def replicates(
    units: int, draws: int, signal: float, noise: float, seed: int, pairing: float = 0.0
) -> tuple[np.ndarray, float]:
    """Kernels of Gaussian units X = signal e + noise, Y likewise, partly sharing their noise; and the true U."""
    rng = np.random.default_rng(seed)
    dim = 6
    mean = np.zeros(dim)
    mean[0] = signal
    shared = rng.normal(size=(draws, units, dim))
    xs = mean + noise * (pairing * shared + math.sqrt(1 - pairing**2) * rng.normal(size=(draws, units, dim)))
    ys = mean + noise * (pairing * shared + math.sqrt(1 - pairing**2) * rng.normal(size=(draws, units, dim)))
    return np.einsum("dup,dwp->duw", xs, ys), signal**2


def found_for(kernels: np.ndarray) -> list:
    return [cross_statistics(UnitDots.from_kernel(kernel, [1] * len(kernel))) for kernel in kernels]


@pytest.mark.long
@pytest.mark.parametrize(("signal", "noise"), [(1.0, 0.3), (0.1, 1.0)], ids=["linear part dominates", "degenerate"])
def test_v_unb_is_unbiased_for_the_variance_of_u_cross(signal: float, noise: float) -> None:
    kernels, truth = replicates(8, 6000, signal, noise, seed=5)
    found = found_for(kernels)
    values = np.array([f.u_cross for f in found])
    variances = np.array([unbiased_variance(k.copy(), f.u_cross) for k, f in zip(kernels, found, strict=True)])
    assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(len(values))
    spread = (values - truth) ** 2
    assert abs(variances.mean() - spread.mean()) < 4 * (spread - variances).std() / math.sqrt(len(values))


def test_the_jackknife_doubles_the_degenerate_part() -> None:
    kernels, truth = replicates(8, 6000, 0.0, 1.0, seed=6)
    found = found_for(kernels)
    actual = np.mean([(f.u_cross - truth) ** 2 for f in found])
    jackknife = np.mean([jackknife_variance(f.u_cross, f.row_means, np.ones(8)) for f in found])
    expected = (4 / (8 * 6)) / (2 / (8 * 7))  # the coefficients of τ² in E[V_jack] and in Var U
    assert jackknife / actual == pytest.approx(expected, rel=0.08)


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


def test_se_this_step_covers_what_this_update_does() -> None:
    signal, noise, units = 1.0, 0.6, 16
    rng = np.random.default_rng(8)
    covered = []
    mean = np.zeros(6)
    mean[0] = signal
    for _ in range(3000):
        shared = rng.normal(size=(units, 6))
        xs = mean + noise * (0.7 * shared + math.sqrt(1 - 0.49) * rng.normal(size=(units, 6)))
        ys = mean + noise * (0.7 * shared + math.sqrt(1 - 0.49) * rng.normal(size=(units, 6)))
        found = cross_statistics(UnitDots.from_kernel(xs @ ys.T, [1] * units))
        assert found.se_this_step is not None
        covered.append(
            abs(found.u_cross - mean @ ys.mean(axis=0)) <= stats.t.ppf(0.975, units - 1) * found.se_this_step
        )
    assert 0.93 <= np.mean(covered) <= 0.97


def test_this_step_variance_equals_its_double_loop() -> None:
    rng = np.random.default_rng(13)
    units = 7
    kernel = rng.normal(size=(units, units))
    found = cross_statistics(UnitDots.from_kernel(kernel, [1] * units))
    u, x, y = found.u_cross, found.row_x, found.row_y

    def centred(i: int, j: int) -> float:
        return float(kernel[i, j] - x[i] - y[j] + u)

    own = sum((x[i] - u) ** 2 for i in range(units)) / (units * (units - 1))
    shared = sum(centred(i, j) * centred(j, i) for i in range(units) for j in range(units) if i != j)
    total = own + shared / (units * (units - 1)) ** 2
    assert abs(shared) / (units * (units - 1)) ** 2 > 0.02 * own
    assert found.se_this_step == pytest.approx(math.sqrt(max(0.0, total)), rel=1e-12)


def test_standard_errors_shrink_with_units_and_the_guides_does_not() -> None:
    sizes = (16, 64)
    kernels = {u: replicates(u, 300, 1.0, 0.4, seed=9)[0] for u in sizes}
    means = {u: found_for(kernels[u]) for u in sizes}

    def ratio(name: str) -> float:
        return float(np.mean([getattr(f, name) for f in means[64]]) / np.mean([getattr(f, name) for f in means[16]]))

    assert ratio("se_plugin") == pytest.approx(0.5, abs=0.06)
    assert ratio("se_jackknife") == pytest.approx(0.5, abs=0.06)
    assert ratio("se_plugin_guide") == pytest.approx(1.0, abs=0.1)


def test_the_interval_variance_never_falls_below_the_degenerate_part() -> None:
    kernels, _ = replicates(6, 200, 0.0, 1.0, seed=10)
    for kernel in kernels:
        found = cross_statistics(UnitDots.from_kernel(kernel, [1] * 6))
        jackknife = jackknife_variance(found.u_cross, found.row_means, np.ones(6))
        unbiased = unbiased_variance(kernel.copy(), found.u_cross)
        assert interval_variance(kernel.copy(), found.u_cross, jackknife) >= max(unbiased, 0.0)


def test_the_self_test_residual_is_rounding_and_sees_a_wrong_sum() -> None:
    rng = np.random.default_rng(11)
    xs, ys = rng.normal(size=(6, 5)), rng.normal(size=(6, 5))
    kernel = xs @ ys.T
    good = UnitDots.from_kernel(kernel, [1] * 6, float(xs.sum(0) @ ys.sum(0)))
    assert cross_statistics(good).self_test_residual < 1e-14
    bad = UnitDots.from_kernel(kernel, [1] * 6, float(xs.sum(0) @ ys.sum(0)) + 0.01)
    assert cross_statistics(bad).self_test_residual > 1e-5


def test_streamed_dots_give_the_same_numbers_without_the_matrix() -> None:
    rng = np.random.default_rng(12)
    xs, ys = rng.normal(size=(6, 5)), rng.normal(size=(6, 5))
    stored = UnitDots.from_kernel(xs @ ys.T, [1] * 6)
    streamed = UnitDots.streamed(
        [1] * 6, xs @ ys.sum(0), ys @ xs.sum(0), (xs * ys).sum(1), float(xs.sum(0) @ ys.sum(0))
    )
    a, b = cross_statistics(stored), cross_statistics(streamed)
    assert b.u_cross == pytest.approx(a.u_cross)
    assert b.se_jackknife == pytest.approx(a.se_jackknife)
    assert b.se_this_step is None
    assert b.variance == pytest.approx(b.se_jackknife**2)
