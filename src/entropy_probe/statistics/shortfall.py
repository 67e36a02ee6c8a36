"""When the default interval is known to cover less than it says."""

from __future__ import annotations

from entropy_probe.common.arrays import FloatArray
from entropy_probe.statistics.skewness import row_mean_shape

FEW_UNITS = 32
"""Units below which coverage was measured to depend on the kernel more than the kernel shows (``docs/coverage.md``)."""
SKEWNESS_LIMIT = 1.0
"""Absolute sample skewness of the row means above which the interval is known to fall short (``docs/coverage.md``)."""


def known_shortfall(row_means: FloatArray) -> str | None:
    """What is known to make the default interval cover less than it says, or None.

    Two things are known to. With fewer than ``FEW_UNITS`` units the kernels whose intervals miss do not look different from
    the others. Row means whose absolute sample skewness G₁ is above ``SKEWNESS_LIMIT`` have a mean that a few units carry,
    and such units as this batch happens to lack are not in its spread. ``docs/coverage.md`` has the measured coverage, that
    of the kernels for which this returns None, and how often it does.

    Args:
        row_means: r_u of units of equal size, [U], U ≥ 4.
    """
    units = len(row_means)
    skewness, _ = row_mean_shape(row_means)
    if abs(skewness) > SKEWNESS_LIMIT:
        return (
            f"the row means of {units} units have skewness {skewness:.1f}, beyond ±{SKEWNESS_LIMIT:.1f}: a few units "
            "carry the mean, and intervals of such kernels were measured to cover less than they say"
        )
    if units < FEW_UNITS:
        return (
            f"{units} units, fewer than {FEW_UNITS}: where a few kinds of prompts carry the mean, the 95 % interval was "
            "measured to cover less"
        )
    return None
