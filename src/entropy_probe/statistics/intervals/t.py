"""Student's interval with the plug-in variance.

    U_cross ± t SE        t Student's quantile with U − 1 degrees of freedom
    SE² = 4 Σ (r_u − U_cross)² / (U(U−1))        in general 4 U/(U−1) Σ ω_u² (r_u − U_cross)²

It covers what it says where row means are near normal: units of one kind, whose linear part is most of the variance. It needs
row means alone. Measured coverage: docs/coverage.md. Source: docs/method.md, section 5; Student (1908).
"""

from __future__ import annotations

from dataclasses import dataclass

from entropy_probe.statistics.intervals.base import Spread, symmetric
from entropy_probe.statistics.quantiles import t_quantile


@dataclass(frozen=True)
class StudentT:
    """U_cross ± t SE, nats per unit of learning rate."""

    described: str = "t, plug-in variance"
    needs_matrix: bool = False

    def of(self, spread: Spread, level: float) -> tuple[float, float]:
        """(low, high)."""
        return symmetric(spread.u_cross, t_quantile(spread.units, level), spread.se_plugin)
