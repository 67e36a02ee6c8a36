"""Intervals against their formulas written out, and by coverage."""

from __future__ import annotations

import importlib
import itertools
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import support
from drawn_kernels import coverage, kernels, one, statistics, symmetric
from entropy_probe import InputError, Settings, probe, state_of_optimizer
from entropy_probe.common.choices import member
from entropy_probe.data.units import Mode
from entropy_probe.report import Report
from entropy_probe.statistics import intervals
from entropy_probe.statistics.intervals import DEFAULT_METHOD, IntervalMethod, RegisteredInterval, interval
from entropy_probe.statistics.skewness import row_mean_shape
from entropy_probe.statistics.u_statistics import cross_statistics
from entropy_probe.statistics.unit_dots import UnitDots
from entropy_probe.statistics.variance import decompose

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from bootstraps import Bootstrap, bootstrap_interval

METHODS = [*IntervalMethod, *Bootstrap]


def ends(kernel: np.ndarray, method: IntervalMethod | Bootstrap, level: float = 0.95) -> tuple[float, float]:
    """Of a method of the package, or of the coverage study alone."""
    if isinstance(method, IntervalMethod):
        return interval(kernel, method, level=level)
    return bootstrap_interval(kernel, method, level=level)


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
    # A bootstrap draws other units; its ends agree to the noise of 999 resamples.
    low, high = ends(kernel, Bootstrap.BOOTSTRAP)
    assert ends(turned, Bootstrap.BOOTSTRAP) == pytest.approx((low, high), abs=0.1 * (high - low))


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


@pytest.mark.parametrize(
    ("signal", "noise", "dim", "units", "low", "high"),
    [(1.0, 0.5, 6, 8, 0.92, 0.97), (1.0, 0.5, 6, 16, 0.94, 0.96), (0.1, 1.0, 20, 16, 0.93, 0.99)],
    ids=["linear, 8", "linear, 16", "degenerate, 16"],
)
def test_the_default_covers_the_truth(
    signal: float, noise: float, dim: int, units: int, low: float, high: float
) -> None:
    draws = 1000
    covered = coverage(map(interval, kernels(units, draws, signal, noise, 1, dim=dim)), signal**2)
    # Three binomial standard errors beside the range that docs/coverage.md measures with more draws.
    assert low - 3 * math.sqrt(low * (1 - low) / draws) <= covered <= high + 3 * math.sqrt(high * (1 - high) / draws)


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


def test_an_interval_that_these_units_cannot_have_is_refused_and_not_another_one_taken() -> None:
    with pytest.raises(InputError, match="hold 1 to 2 prompts: take normal, t, jackknife_t"):
        probed(interval="unbiased_t", blocks=4)
    with pytest.raises(InputError, match="vectors are streamed"):
        probed(interval="skewed_t", mode=Mode.EXACT, memory_bytes=1e3)
    assert "jackknife" in str(probed(mode=Mode.EXACT, memory_bytes=1e3).first_order.interval_method)
    with pytest.raises(InputError, match="interval is 'bootstrap'; known are normal, t, jackknife_t"):
        Settings(interval="bootstrap")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", list(IntervalMethod))
def test_an_interval_has_the_name_of_its_file_and_its_formula_is_there(method: IntervalMethod) -> None:
    assert type(method.formula).__module__ == f"entropy_probe.statistics.intervals.{method.value}"
    assert method.name == method.value.upper()
    assert str(method) == method.value
    assert pickle.loads(pickle.dumps(method)) is IntervalMethod(method.value) is method


def test_every_file_of_intervals_is_one_that_can_be_asked_for() -> None:
    files = {path.stem for path in Path(intervals.__file__).parent.glob("*.py")}
    assert files - {"__init__", "base", "methods"} == set(IntervalMethod)


TOY = """
from dataclasses import dataclass

from entropy_probe.statistics.intervals.base import Spread


@dataclass(frozen=True)
class Extremes:
    described: str = "smallest to largest row mean"
    needs_matrix: bool = False

    def of(self, spread: Spread, level: float) -> tuple[float, float]:
        return float(spread.row_means.min()), float(spread.row_means.max())
"""


def test_a_new_interval_is_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_extremes.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("toy_extremes")

    class Methods(RegisteredInterval):
        NORMAL = "normal", IntervalMethod.NORMAL.formula
        EXTREMES = "extremes", module.Extremes()

    asked = member("interval", "extremes", Methods)
    kernel, sizes = one(), [3, 2, 2, 1, 1, 1, 1, 1, 1]
    found = cross_statistics(UnitDots.from_kernel(kernel, sizes), asked)
    assert found.ci95 == (found.row_means.min(), found.row_means.max())
    assert found.interval_method == "smallest to largest row mean"
    rows = statistics(kernel).row_means
    assert interval(kernel, asked) == pytest.approx((rows.min(), rows.max()), rel=1e-12)
    with pytest.raises(InputError, match="known are normal, extremes"):
        member("interval", "unbiased_t", Methods)
