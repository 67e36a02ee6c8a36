"""The unbiased variance and Hoeffding's parts, against loops over distinct units and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from drawn_kernels import found_for, kernels, replicates, statistics
from entropy_probe.statistics.jackknife import jackknife_variance
from entropy_probe.statistics.u_statistics import cross_statistics
from entropy_probe.statistics.unit_dots import UnitDots
from entropy_probe.statistics.variance import decompose, interval_variance, unbiased_variance, variance_at


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


def test_the_interval_variance_never_falls_below_the_degenerate_part() -> None:
    kernels, _ = replicates(6, 200, 0.0, 1.0, seed=10)
    for kernel in kernels:
        found = cross_statistics(UnitDots.from_kernel(kernel, [1] * 6))
        jackknife = jackknife_variance(found.u_cross, found.row_means, np.ones(6))
        unbiased = unbiased_variance(kernel.copy(), found.u_cross)
        assert interval_variance(kernel.copy(), found.u_cross, jackknife) >= max(unbiased, 0.0)


def test_the_floor_under_the_interval_variance_is_what_the_jackknife_doubles() -> None:
    kernel = 3.0 + np.random.default_rng(16).normal(size=(6, 6))
    unbiased = unbiased_variance(kernel, 0.0)  # a U_cross of 0 makes it negative
    assert unbiased < 0
    tau_squared = 100.0 * abs(unbiased)
    jackknife = unbiased + tau_squared * (4 / (6 * 4) - 2 / (6 * 5))
    assert interval_variance(kernel, 0.0, jackknife) == pytest.approx(2 * tau_squared / (6 * 5), rel=1e-10)
    assert interval_variance(kernel, 0.0, unbiased - 1.0) == 0.0


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
