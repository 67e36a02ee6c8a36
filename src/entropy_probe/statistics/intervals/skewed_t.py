"""The default: the unbiased variance, degrees of freedom from the row means, and longer on the side of U_cross's skew.

With κ the sample excess kurtosis (G₂) of the row means, s = 4 ζ̂₁/U / V the linear part's share of V, and γ the skewness of
U_cross (:func:`skewness_of`):

    half width t_ν √V,  ν = 2 (U−1) / (2 + s² max(κ, 0) (U−1)/U), 2 at least
    and on the side of γ's sign further by min(1.5, |γ| (2 t² + 1) / 6) √V,  t with U − 1 degrees

V is that of :func:`~entropy_probe.statistics.variance.interval_variance`. ν matches the first two moments of the variance
estimate of U values with kurtosis κ (Satterthwaite 1946), which the linear part alone rests on. The extension is the Edgeworth
shift of a studentised mean with skewness γ (Hall 1992). Only the side that it lengthens is moved: shortening the other cost
more coverage than it gained.

At 95 % and from 16 units it was measured to cover 94 to 96 % where the linear part dominates, and 96 to 99.9 % where the
degenerate part does. It falls short where a few units carry the mean (:mod:`~entropy_probe.statistics.shortfall`). It needs the
matrix of dots of units of equal size. Measured coverage: docs/coverage.md. Source: docs/method.md, section 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from entropy_probe.statistics.intervals.base import Spread
from entropy_probe.statistics.quantiles import satterthwaite, student_quantile, t_quantile
from entropy_probe.statistics.skewness import lengthened, row_mean_shape, skew_extension
from entropy_probe.statistics.variance import Decomposition


@dataclass(frozen=True)
class SkewedT:
    """U_cross ± t_ν √V, lengthened on the side of its skew; nats per unit of learning rate."""

    described: str = "skewed t, unbiased variance"
    needs_matrix: bool = True

    def of(self, spread: Spread, level: float) -> tuple[float, float]:
        """(low, high)."""
        found = spread.decomposition
        error = math.sqrt(found.variance)
        _, kurtosis = row_mean_shape(found.row_means)
        share = found.linear / found.variance if found.variance > 0.0 else 0.0
        degrees = satterthwaite(found.units, share**2 * kurtosis)
        half_width = student_quantile(0.5 * (1.0 + level), degrees) * error
        skewness = skewness_of(found)
        further = skew_extension(skewness, t_quantile(found.units, level)) * error
        return lengthened(found.u_cross, half_width, further, skewness)


def skewness_of(found: Decomposition) -> float:
    """γ = [16 m₃/U² + 8 T/U³] / V^{3/2} of U_cross; 0 where V is.

    Third cumulant of U_cross = [8 E g³ + 24 E g_u g_w ψ_uw]/U² + [8 E ψ_uv ψ_vw ψ_wu + 24 E g_u ψ_uw²]/U³ + o(1/U³); its last
    term is left out. m₃ = G₁ m₂^{3/2} of the row means estimates E g³. T, the mean of ψ̂_uv ψ̂_vw ψ̂_wu over distinct units
    with ψ̂_uw = h_uw − r_u − r_w + U_cross, estimates the third expectation. The second term is taken to be as large as the
    first: estimating it cost more coverage than it gained.
    """
    if not found.variance > 0.0:
        return 0.0
    units, spread = found.units, found.row_means - found.u_cross
    third = row_mean_shape(found.row_means)[0] * float((spread**2).mean()) ** 1.5
    psi = found.h - spread[:, None] - spread[None, :] - found.u_cross
    np.fill_diagonal(psi, 0.0)
    triangles = float((psi @ psi * psi).sum()) / (units * (units - 1) * (units - 2))
    return float((16.0 * third / units**2 + 8.0 * triangles / units**3) / found.variance**1.5)
