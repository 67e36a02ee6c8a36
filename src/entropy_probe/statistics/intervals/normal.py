"""The normal interval with the plug-in variance: what most software prints.

    U_cross ± q SE        q the standard normal's quantile, 1.96 at 95 %
    SE² = 4 Σ (r_u − U_cross)² / (U(U−1))        in general 4 U/(U−1) Σ ω_u² (r_u − U_cross)²

It takes the variance for known, so it covers less than it says with few units. It needs row means alone. Measured coverage:
docs/coverage.md. Source: docs/method.md, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from entropy_probe.statistics.intervals.base import Spread, symmetric
from entropy_probe.statistics.quantiles import normal_quantile


@dataclass(frozen=True)
class Normal:
    """U_cross ± q SE, nats per unit of learning rate."""

    described: str = "normal, plug-in variance"
    needs_matrix: bool = False

    def of(self, spread: Spread, level: float) -> tuple[float, float]:
        """(low, high)."""
        return symmetric(spread.u_cross, normal_quantile(level), spread.se_plugin)
