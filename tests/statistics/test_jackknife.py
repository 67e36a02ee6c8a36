"""Delete-one values and the jackknife variance, against double loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

import oracle
from drawn_kernels import dots_of, found_for, replicates
from entropy_probe.statistics.jackknife import jackknife_variance
from entropy_probe.statistics.u_statistics import cross_statistics


def test_the_jackknife_doubles_the_degenerate_part() -> None:
    kernels, truth = replicates(8, 6000, 0.0, 1.0, seed=6)
    found = found_for(kernels)
    actual = np.mean([(f.u_cross - truth) ** 2 for f in found])
    jackknife = np.mean([jackknife_variance(f.u_cross, f.row_means, np.ones(8)) for f in found])
    expected = (4 / (8 * 6)) / (2 / (8 * 7))  # the coefficients of τ² in E[V_jack] and in Var U
    assert jackknife / actual == pytest.approx(expected, rel=0.08)


def test_the_jackknife_variance_is_the_spread_of_the_delete_one_values_about_their_own_mean() -> None:
    rng = np.random.default_rng(17)
    sizes = [4, 2, 1, 1]
    xs, ys = rng.normal(size=(8, 3)), rng.normal(size=(8, 3))
    _, _, left = oracle.double_loop(xs, ys, sizes)
    expected = 3 / 4 * sum((value - sum(left) / 4) ** 2 for value in left)
    found = cross_statistics(dots_of(xs, ys, sizes))
    assert found.se_jackknife == pytest.approx(math.sqrt(expected), rel=1e-10)
    assert found.zeta1_jackknife == pytest.approx(4 * expected / 4, rel=1e-10)
