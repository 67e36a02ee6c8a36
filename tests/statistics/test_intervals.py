"""Intervals, Hoeffding's parts and the units needed, against loops and by coverage."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from bootstraps import Bootstrap, bootstrap, bootstrap_interval

import support
from entropy_probe import InputError, Settings, probe, state_of_optimizer
from entropy_probe.data.units import Mode
from entropy_probe.report import Report
from entropy_probe.statistics.intervals import DEFAULT_METHOD, IntervalMethod, interval
from entropy_probe.statistics.needed_units import MOST_UNITS, needed_units
from entropy_probe.statistics.shortfall import known_shortfall
from entropy_probe.statistics.skewness import row_mean_shape
from entropy_probe.statistics.u_statistics import CrossStatistics, cross_statistics
from entropy_probe.statistics.unit_dots import UnitDots
from entropy_probe.statistics.variance import decompose, variance_at

METHODS = [*IntervalMethod, *Bootstrap]


def ends(kernel: np.ndarray, method: IntervalMethod | Bootstrap, level: float = 0.95) -> tuple[float, float]:
    """Of a method of the package, or of the coverage study alone."""
    if isinstance(method, IntervalMethod):
        return interval(kernel, method, level=level)
    return bootstrap_interval(kernel, method, level=level)


def kernels(
    units: int, draws: int, signal: float, noise: float, seed: int, *, dim: int = 6, sigma: float = 0.0
) -> np.ndarray:
    """Kernels [draws, U, U] of X = s (signal e + noise z), Y likewise, half of their noise shared; truth signal²."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(draws, units, dim))
    size = np.exp(sigma * rng.normal(size=(draws, units, 1)) - 0.5 * sigma**2)
    mean = signal * np.eye(dim)[0]
    xs, ys = (
        size * (mean + noise * (0.5 * shared + math.sqrt(0.75) * rng.normal(size=shared.shape))) for _ in range(2)
    )
    return np.einsum("dup,dwp->duw", xs, ys)


def one(units: int = 9, seed: int = 0) -> np.ndarray:
    return kernels(units, 1, 1.0, 0.8, seed)[0]


def statistics(kernel: np.ndarray) -> CrossStatistics:
    return cross_statistics(UnitDots.from_kernel(kernel, [1] * len(kernel)))


def told(kernel: np.ndarray) -> str | None:
    return known_shortfall(decompose(kernel).row_means)


def symmetric(kernel: np.ndarray) -> np.ndarray:
    h = 0.5 * (kernel + kernel.T)
    np.fill_diagonal(h, 0.0)
    return h


@pytest.mark.parametrize("seed", range(30))
def test_parts_give_the_reported_variance_back(seed: int) -> None:
    # Both sides of the floor: signal and noise only.
    kernel = kernels(7, 1, 1.0 if seed % 2 else 0.0, 1.0, seed)[0]
    found = statistics(kernel)
    zeta1, tau_squared = decompose(kernel).parts
    assert zeta1 >= 0.0
    assert tau_squared >= 0.0
    assert variance_at(7, zeta1, tau_squared) == pytest.approx(found.variance, rel=1e-12)


@pytest.mark.parametrize("signal", [0.0, 1.0])
def test_parts_are_near_hoeffdings(signal: float) -> None:
    draws, dim = 300, 6
    parts = np.mean([decompose(k).parts for k in kernels(24, draws, signal, 1.0, 3)], axis=0)
    # g = ½ (X·μ + Y·μ) − μ², Cov(X, Y) = ¼ I; h has variance ½ (E(X·Y')² + E X·Y' Y·X') − μ⁴ for independent units.
    zeta1 = signal**2 * 0.25 * 2 * (1 + 0.25)
    total = 0.5 * (dim + 2 * signal**2 + dim * 0.25**2 + 2 * 0.25 * signal**2)
    # Clipping at zero lifts ζ̂₁ where ζ₁ = 0.
    assert parts[0] == pytest.approx(zeta1, rel=0.1, abs=0.1)
    assert parts[1] == pytest.approx(total - 2 * zeta1, rel=0.1)


def test_the_symmetric_intervals_are_those_of_the_standard_errors() -> None:
    kernel = one()
    found, t = statistics(kernel), stats.t.ppf(0.975, 8)
    for method, quantile, error in (
        (IntervalMethod.NORMAL, stats.norm.ppf(0.975), found.se_plugin),
        (IntervalMethod.T, t, found.se_plugin),
        (IntervalMethod.JACKKNIFE_T, t, found.se_jackknife),
    ):
        expected = (found.u_cross - quantile * error, found.u_cross + quantile * error)
        assert interval(kernel, method) == pytest.approx(expected, rel=1e-12)
    assert found.se is not None
    unbiased = (found.u_cross - t * found.se, found.u_cross + t * found.se)
    assert interval(kernel, IntervalMethod.UNBIASED_T) == pytest.approx(unbiased, rel=1e-12)
    assert found.ci95 == interval(kernel)
    left = [statistics(np.delete(np.delete(kernel, u, 0), u, 1)).u_cross for u in range(9)]
    low, high = interval(kernel, IntervalMethod.JACKKNIFE_T)
    assert (high - low) / 2 / t == pytest.approx(math.sqrt(8 / 9 * ((left - np.mean(left)) ** 2).sum()), rel=1e-10)


@pytest.mark.parametrize("method", list(IntervalMethod))
def test_the_statistics_have_the_interval_that_was_asked_for_and_name_it(method: IntervalMethod) -> None:
    """V stays what it is: the noise and the units needed are parts of it."""
    kernel = one()
    found, default = (cross_statistics(UnitDots.from_kernel(kernel, [1] * 9), m) for m in (method, None))
    assert found.ci95 == pytest.approx(interval(kernel, method), rel=1e-12)
    assert found.interval_method == method.described
    assert (found.ci95 == default.ci95) is (method is DEFAULT_METHOD)
    assert (found.variance, found.parts) == (default.variance, default.parts)
    assert len({m.described for m in IntervalMethod}) == len(IntervalMethod)


@pytest.mark.parametrize("sizes", [[1] * 9, [3, 2, 2, 1, 1, 1, 1, 1, 1]], ids=["streamed", "unequal"])
def test_without_the_matrix_of_equal_units_the_intervals_are_those_of_the_errors(sizes: list[int]) -> None:
    whole = UnitDots.from_kernel(one(), sizes)
    dots = UnitDots.streamed(sizes, whole.x_dot_sum, whole.y_dot_sum, whole.diagonal, whole.sum_dot)
    for method, quantile, name in (
        (IntervalMethod.NORMAL, stats.norm.ppf(0.975), "se_plugin"),
        (IntervalMethod.T, stats.t.ppf(0.975, 8), "se_plugin"),
        (IntervalMethod.JACKKNIFE_T, stats.t.ppf(0.975, 8), "se_jackknife"),
        (None, stats.t.ppf(0.975, 8), "se_jackknife"),
    ):
        found = cross_statistics(dots, method)
        half = quantile * getattr(found, name)
        assert found.ci95 == pytest.approx((found.u_cross - half, found.u_cross + half), rel=1e-12)
    for method in (IntervalMethod.UNBIASED_T, IntervalMethod.SKEWED_T):
        with pytest.raises(AssertionError, match="refuses a method without its matrix"):
            cross_statistics(dots, method)


def skewed_by_loop(kernel: np.ndarray, *, triangles: bool = True, shared_kurtosis: bool = True) -> tuple[float, float]:
    """The default interval of h ≥ 4 units, written out; without its triangles or its linear share as planted bugs."""
    found, units, h = statistics(kernel), len(kernel), symmetric(kernel)
    assert found.se is not None
    assert found.parts is not None
    gamma, kappa = stats.skew(found.row_means, bias=False), stats.kurtosis(found.row_means, bias=False)
    assert row_mean_shape(found.row_means) == pytest.approx((gamma, kappa))
    share = 4 * found.parts[0] / units / found.variance if shared_kurtosis else 1.0
    r, mean = found.row_means, found.u_cross
    psi = [[h[u, w] - r[u] - r[w] + mean for w in range(units)] for u in range(units)]
    cycles = [psi[u][v] * psi[v][w] * psi[w][u] for u, v, w in itertools.permutations(range(units), 3)]
    third = 16 * gamma * r.std() ** 3 / units**2 + (8 * np.mean(cycles) / units**3 if triangles else 0.0)
    skewness = third / found.se**3
    t = stats.t.ppf(0.975, units - 1)
    freedom = max(2.0, 2 * (units - 1) / (2 + share**2 * max(kappa, 0) * (units - 1) / units))
    half = stats.t.ppf(0.975, freedom) * found.se
    further = min(1.5, abs(skewness) * (2 * t * t + 1) / 6) * found.se
    return mean - half - (further if skewness < 0 else 0), mean + half + (further if skewness > 0 else 0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_skewed_interval_is_its_formula(sign: float) -> None:
    """Heavy units, both parts in V: and each of two ways to leave something out is seen."""
    kernel = sign * kernels(9, 1, 0.6, 0.6, 0, sigma=0.6)[0]
    found = interval(kernel, IntervalMethod.SKEWED_T)
    assert found == pytest.approx(skewed_by_loop(kernel), rel=1e-10)
    for planted in ({"triangles": False}, {"shared_kurtosis": False}):
        wrong = skewed_by_loop(kernel, **planted)
        assert max(abs(a - b) for a, b in zip(wrong, found, strict=True)) > 1e-3 * (found[1] - found[0])


def test_skewness_of_the_degenerate_part_lengthens_the_side_that_it_is_on() -> None:
    """h = z_u z_w has the skewness of a χ²: without the triangles the truth lies above far more often than nominal."""
    z = 0.3 + np.random.default_rng(8).normal(size=(1000, 24, 1))
    products = z * z.transpose(0, 2, 1)
    assert np.mean([interval(k)[1] < 0.09 for k in products]) < 0.025
    assert np.mean([skewed_without_triangles(k) < 0.09 for k in products]) > 0.1


def skewed_without_triangles(kernel: np.ndarray) -> float:
    found = statistics(kernel)
    assert found.se is not None
    third = 16 * stats.skew(found.row_means, bias=False) * found.row_means.std() ** 3 / len(kernel) ** 2
    t = stats.t.ppf(0.975, len(kernel) - 1)
    return found.u_cross + found.se * (t + min(1.5, max(0.0, third / found.se**3 * (2 * t * t + 1) / 6)))


@pytest.mark.parametrize("method", METHODS)
def test_intervals_scale_and_turn_with_the_kernel_and_forget_the_diagonal(method: IntervalMethod | Bootstrap) -> None:
    kernel = kernels(9, 1, 1.0, 0.4, 2, sigma=1.0)[0]
    low, high = ends(kernel, method)
    assert ends(3.0 * kernel, method) == pytest.approx((3.0 * low, 3.0 * high), rel=1e-9)
    assert ends(-kernel, method) == pytest.approx((-high, -low), rel=1e-9)
    assert ends(kernel.T, method) == pytest.approx((low, high), rel=1e-9)
    assert ends(kernel + np.diag(np.arange(9.0)), method) == pytest.approx((low, high), rel=1e-9)
    wider = ends(kernel, method, level=0.99)
    assert wider[0] < low < high < wider[1]


def test_the_order_of_units_does_not_matter() -> None:
    kernel = one()
    order = np.random.default_rng(0).permutation(9)
    turned = kernel[np.ix_(order, order)]
    for method in IntervalMethod:
        assert interval(turned, method) == pytest.approx(interval(kernel, method), rel=1e-10)
    assert told(turned) == told(kernel)
    # A bootstrap draws other units; its ends agree to the noise of 999 resamples.
    low, high = ends(kernel, Bootstrap.BOOTSTRAP)
    assert ends(turned, Bootstrap.BOOTSTRAP) == pytest.approx((low, high), abs=0.1 * (high - low))


def resamples_by_loop(kernel: np.ndarray, replicates: int, seed: int, *, keep_copies: bool = False) -> np.ndarray:
    """U* by listing the drawn units and looping over ordered pairs of them."""
    units = len(kernel)
    counts = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=replicates)
    found = []
    for n in counts:
        if n.max() == units:
            continue
        drawn = [u for u in range(units) for _ in range(n[u])]
        pairs = [
            kernel[a, b] for i, a in enumerate(drawn) for j, b in enumerate(drawn) if i != j and (keep_copies or a != b)
        ]
        found.append(np.mean(pairs))
    return np.array(found)


def test_the_bootstrap_equals_a_loop_over_pairs_and_keeping_copies_of_a_unit_would_be_biased() -> None:
    kernel = one(6) + 6.0 * np.eye(6)  # X̃_u · Ỹ_u larger than products across units, as shared responses make it
    u_cross = statistics(kernel).u_cross
    u_star, variances = bootstrap(symmetric(kernel), 2000, 5)
    loop = resamples_by_loop(kernel, 2000, 5)
    np.testing.assert_allclose(u_star, loop, rtol=1e-10)
    assert u_star.var() == pytest.approx(loop.var(), rel=1e-10)
    noise = u_star.std() / math.sqrt(2000)
    assert abs(u_star.mean() - u_cross) < 5 * noise
    # Planted bug: two copies of a unit paired with each other bring X̃_u · Ỹ_u in.
    planted = resamples_by_loop(kernel, 2000, 5, keep_copies=True)
    bias = (np.diagonal(kernel).mean() - u_cross) / 6
    assert planted.mean() - u_cross == pytest.approx(bias, abs=5 * noise)
    assert abs(bias) > 10 * noise
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(u_star, planted, rtol=1e-10)
    # SE* of one resample, unit by unit.
    n = np.random.default_rng(5).multinomial(6, np.full(6, 1 / 6), size=2000)[0]
    h = symmetric(kernel)
    r = [sum(n[w] * h[u, w] for w in range(6)) / (6 - n[u]) for u in range(6)]
    assert variances[0] == pytest.approx(4 * sum(n[u] * (r[u] - u_star[0]) ** 2 for u in range(6)) / 30, rel=1e-10)


@pytest.mark.parametrize(
    ("u_cross", "zeta1", "tau_squared"), [(1.0, 2.0, 5.0), (-0.5, 0.3, 9.0), (0.7, 0.0, 40.0), (5.0, 0.1, 0.1)]
)
def test_needed_units_are_those_of_a_loop(u_cross: float, zeta1: float, tau_squared: float) -> None:
    def error(units: int) -> float:
        return math.sqrt(4 * zeta1 / units + 2 * tau_squared / (units * (units - 1)))

    expected = next(u for u in range(4, 10_000) if stats.t.ppf(0.975, u - 1) * error(u) < abs(u_cross))
    assert needed_units(u_cross, zeta1, tau_squared, exclude_zero=True) == expected
    for target in (0.05, 0.2, 100.0):
        expected = next(u for u in range(4, 10_000) if error(u) <= target)
        assert needed_units(u_cross, zeta1, tau_squared, target_se=target) == expected


def test_needed_units_at_the_edges() -> None:
    assert needed_units(0.0, 1.0, 1.0, exclude_zero=True) is None
    assert needed_units(0.0, 0.0, 0.0, exclude_zero=True) is None
    assert needed_units(1e-6, 1.0, 1.0, exclude_zero=True) is None
    assert needed_units(0.0, 1.0, 1.0, target_se=1e-9) is None
    assert needed_units(1.0, MOST_UNITS / 4, 0.0, target_se=1.0) == MOST_UNITS
    assert needed_units(1.0, 0.0, 0.0, exclude_zero=True) == 4
    for wrong in ({}, {"exclude_zero": True, "target_se": 1.0}, {"target_se": 0.0}, {"target_se": math.nan}):
        with pytest.raises(ValueError, match=r"exactly one|above 0"):
            needed_units(1.0, 1.0, 1.0, **wrong)


@pytest.mark.parametrize("method", METHODS)
def test_constant_and_zero_kernels_have_intervals_of_one_point(method: IntervalMethod | Bootstrap) -> None:
    assert ends(np.zeros((5, 5)), method) == (0.0, 0.0)
    assert ends(np.ones((5, 5)), method) == pytest.approx((1.0, 1.0), abs=1e-7)


def test_bad_arguments_are_refused() -> None:
    for function in (interval, decompose):
        for shape in ((3, 3), (4, 5)):
            with pytest.raises(ValueError, match="square one of 4 units"):
                function(np.ones(shape))
    with pytest.raises(ValueError, match="level"):
        interval(np.ones((5, 5)), level=1.0)


def coverage(found: np.ndarray, truth: float, method: IntervalMethod | Bootstrap) -> float:
    return float(np.mean([low <= truth <= high for low, high in (ends(k, method) for k in found)]))


@pytest.mark.parametrize(
    ("signal", "noise", "dim", "units", "low", "high"),
    [(1.0, 0.5, 6, 8, 0.92, 0.97), (1.0, 0.5, 6, 16, 0.94, 0.96), (0.1, 1.0, 20, 16, 0.93, 0.99)],
    ids=["linear, 8", "linear, 16", "degenerate, 16"],
)
def test_the_default_covers_the_truth(
    signal: float, noise: float, dim: int, units: int, low: float, high: float
) -> None:
    draws = 1000
    covered = coverage(kernels(units, draws, signal, noise, 1, dim=dim), signal**2, DEFAULT_METHOD)
    # Three binomial standard errors beside the range that docs/coverage.md measures with more draws.
    assert low - 3 * math.sqrt(low * (1 - low) / draws) <= covered <= high + 3 * math.sqrt(high * (1 - high) / draws)


def test_the_percentile_bootstrap_is_too_wide_for_degenerate_kernels() -> None:
    found = kernels(16, 150, 0.0, 1.0, 2, dim=20)
    assert coverage(found, 0.0, Bootstrap.BOOTSTRAP) > 0.97


def test_a_shortfall_is_told_where_the_interval_falls_short_and_not_where_it_does_not() -> None:
    heavy = kernels(32, 400, 1.0, 0.5, 3, sigma=1.0)
    assert coverage(heavy, 1.0, DEFAULT_METHOD) < 0.93
    of_heavy = [told(k) for k in heavy]
    assert np.mean([text is not None for text in of_heavy]) > 0.7
    assert any("skewness" in text for text in of_heavy if text is not None)
    light = kernels(32, 400, 1.0, 0.5, 4)
    assert np.mean([told(k) is not None for k in light]) < 0.1
    assert "31 units" in str(told(light[0][:31, :31]))


def probed(**settings: Any) -> Report:
    model = support.tiny_model()
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-4), model)
    return probe(model, adam, support.random_batch(6, 3), Settings(noise=False, **settings)).report


def test_a_probe_reports_the_interval_that_was_asked_for_and_says_which() -> None:
    first = {name: probed(interval=name).first_order for name in ("t", "jackknife_t")}
    t = stats.t.ppf(0.975, 5)
    for name, error in (("t", "se_plugin"), ("jackknife_t", "se_jackknife")):
        half = 1e-4 * t * getattr(first[name], error)
        expected = [first[name].delta_h1 - half, first[name].delta_h1 + half]
        assert first[name].delta_h1_ci95 == pytest.approx(expected, rel=1e-9)
        assert first[name].interval_method == IntervalMethod(name).described
    assert probed(interval=IntervalMethod.T).config.interval == "t"
    assert probed().config.interval is None


def test_a_shortfall_says_of_which_method_it_is_known_where_another_was_asked_for() -> None:
    dots = UnitDots.from_kernel(one(), [1] * 9)
    own, said = (str(cross_statistics(dots, method).shortfall) for method in (None, IntervalMethod.T))
    assert "9 units" in own
    assert "default" not in own
    assert f"default method, {IntervalMethod.SKEWED_T.described}; this is {IntervalMethod.T.described}" in said


def test_an_interval_that_these_units_cannot_have_is_refused_and_not_another_one_taken() -> None:
    with pytest.raises(InputError, match="hold 1 to 2 prompts: take normal, t, jackknife_t"):
        probed(interval="unbiased_t", blocks=4)
    with pytest.raises(InputError, match="vectors are streamed"):
        probed(interval="skewed_t", mode=Mode.EXACT, memory_bytes=1e3)
    assert "jackknife" in str(probed(mode=Mode.EXACT, memory_bytes=1e3).first_order.interval_method)
    with pytest.raises(InputError, match="interval is 'bootstrap'; known are normal, t, jackknife_t"):
        Settings(interval="bootstrap")  # type: ignore[arg-type]
