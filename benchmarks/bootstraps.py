"""Bootstrap intervals of U_cross, which the coverage study tried and the package does not offer (``docs/coverage.md``)."""

from __future__ import annotations

from enum import StrEnum

import numpy as np

from entropy_probe.common.arrays import FloatArray
from entropy_probe.statistics.u_statistics import cross_statistics
from entropy_probe.statistics.unit_dots import UnitDots


class Bootstrap(StrEnum):
    """How the interval is made.

    BOOTSTRAP: percentiles of U* over resamples of units.
    BOOTSTRAP_T: studentised over resamples of units, each with its own SE*.
    """

    BOOTSTRAP = "bootstrap"
    BOOTSTRAP_T = "bootstrap_t"


def bootstrap_interval(
    kernel: FloatArray, method: Bootstrap, *, level: float = 0.95, replicates: int = 999, seed: int = 0
) -> tuple[float, float]:
    """(low, high) of U_cross in nats per unit of learning rate, from K [U, U] with equal units and U ≥ 4.

    Args:
        kernel: K / (unit size)², [U, U]; its diagonal is not used.
        method: which one.
        level: nominal coverage, in (0, 1).
        replicates: resamples.
        seed: of the resamples.
    """
    h = 0.5 * (kernel + kernel.T)
    np.fill_diagonal(h, 0.0)
    tail = 0.5 * (1.0 + level)
    resampled, variances = bootstrap(h, replicates, seed)
    if method is Bootstrap.BOOTSTRAP:
        low, high = np.quantile(resampled, [1.0 - tail, tail])
        return float(low), float(high)
    found = cross_statistics(UnitDots.from_kernel(h, [1] * len(h)))
    error = found.se_plugin
    assert error is not None
    # A resample whose row means are all alike has no error of its own and tells nothing about the quantiles of T.
    kept = variances > 1e-12 * error**2
    if not kept.any():
        return found.u_cross, found.u_cross
    low, high = np.quantile((resampled[kept] - found.u_cross) / np.sqrt(variances[kept]), [1.0 - tail, tail])
    return found.u_cross - float(high) * error, found.u_cross - float(low) * error


def bootstrap(h: FloatArray, replicates: int, seed: int) -> tuple[FloatArray, FloatArray]:
    """U* and its plug-in variance SE*² over resamples of units, [replicates] each.

    With n_u the times that unit u is drawn (multinomial), R_u = Σ_w n_w h_uw and h_uu = 0:

        U* = Σ_u n_u R_u / (U² − Σ n_u²)     r*_u = R_u / (U − n_u)     SE*² = 4 Σ n_u (r*_u − U*)² / (U(U−1))

    Pairs of two copies of one original unit are left out of both sums. They stand for pairs of different prompts, but hold
    X̃_u · Ỹ_u, which shares responses, and Σ n_u (n_u − 1) h_uu / (U(U−1)) has mean (1/U) mean h_uu: keeping them shifts U* by
    (mean h_uu − U_cross)/U, the bias that U_cross is built to avoid. Leaving them out of the numerator alone would shrink U*
    by (1 − 1/U). What no weighting mends: both parts of the resampled variance carry ψ, so Var* counts τ² up to three times.

    Args:
        h: symmetric with a zero diagonal, [U, U].
        replicates: resamples.
        seed: of the draws.
    """
    units = len(h)
    counts = np.random.default_rng(seed).multinomial(units, np.full(units, 1.0 / units), size=replicates)
    n = counts[np.count_nonzero(counts, axis=1) > 1].astype(np.float64)  # one unit alone has no pairs
    sums = n @ h
    u_star = (n * sums).sum(axis=1) / (units**2 - (n**2).sum(axis=1))
    spread = sums / (units - n) - u_star[:, None]
    return u_star, 4.0 * (n * spread**2).sum(axis=1) / (units * (units - 1))
