"""The bootstrap intervals that the coverage study tried, against loops over resampled pairs."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from drawn_kernels import coverage, kernels, one, statistics, symmetric

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from bootstraps import Bootstrap, bootstrap, bootstrap_interval


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


def test_the_percentile_bootstrap_is_too_wide_for_degenerate_kernels() -> None:
    found = kernels(16, 150, 0.0, 1.0, 2, dim=20)
    assert coverage((bootstrap_interval(k, Bootstrap.BOOTSTRAP) for k in found), 0.0) > 0.97
