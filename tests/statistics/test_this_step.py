"""The error of what this very update does."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from entropy_probe.statistics.u_statistics import cross_statistics
from entropy_probe.statistics.unit_dots import UnitDots


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
