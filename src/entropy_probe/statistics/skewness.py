"""Sample skewness and kurtosis of row means, and how far skewness lengthens an interval on its side."""

from __future__ import annotations

import math

from entropy_probe.common.arrays import FloatArray

LARGEST_EXTENSION = 1.5
"""Standard errors by which a skewed interval grows on its long side at most."""


def row_mean_shape(row_means: FloatArray) -> tuple[float, float]:
    """Sample skewness G₁ and excess kurtosis G₂ of the row means r_u, [U] with U ≥ 4; 0 where they are all alike."""
    units = len(row_means)
    spread = row_means - row_means.mean()
    second = float((spread**2).mean())
    if second <= 1e-24 * float((row_means**2).mean()):
        return 0.0, 0.0
    scaled = spread / math.sqrt(second)
    skewness = float((scaled**3).mean()) * math.sqrt(units * (units - 1)) / (units - 2)
    excess = float((scaled**4).mean()) - 3.0
    return skewness, (units - 1) / ((units - 2) * (units - 3)) * ((units + 1) * excess + 6.0)


def skew_extension(skewness: float, t: float) -> float:
    """min(1.5, |γ| (2 t² + 1) / 6), in standard errors: how far a studentised mean's quantile t moves with its skewness γ.

    Source: the Edgeworth shift of Hall (1992), cut off at ``LARGEST_EXTENSION``.
    """
    return min(LARGEST_EXTENSION, abs(skewness) * (2.0 * t**2 + 1.0) / 6.0)


def lengthened(centre: float, half_width: float, further: float, skewness: float) -> tuple[float, float]:
    """centre ± half_width, and ``further`` out on the side of the skewness's sign."""
    low = centre - half_width - (further if skewness < 0.0 else 0.0)
    high = centre + half_width + (further if skewness > 0.0 else 0.0)
    return low, high
