"""Student's interval with the delete-one (jackknife) variance: the default without the matrix of unit dots.

    U_cross ± t SE        t Student's quantile with U − 1 degrees of freedom
    SE² = (U−1)/U Σ (U_−u − mean)²        for units of equal size the plug-in's times ((U−1)/(U−2))²

The jackknife counts the degenerate part of the variance twice. Where that part is most of the variance the interval is too long
and covers more than it says; where a few units carry the mean it covers less. It needs row means alone. Measured
coverage: docs/coverage.md. Source: docs/method.md, section 5; Efron and Stein (1981).
"""

from __future__ import annotations

from dataclasses import dataclass

from entropy_probe.statistics.intervals.base import Spread, symmetric
from entropy_probe.statistics.quantiles import t_quantile


@dataclass(frozen=True)
class JackknifeT:
    """U_cross ± t SE of delete-one values, nats per unit of learning rate."""

    described: str = "t, jackknife variance (conservative)"
    needs_matrix: bool = False

    def of(self, spread: Spread, level: float) -> tuple[float, float]:
        """(low, high)."""
        return symmetric(spread.u_cross, t_quantile(spread.units, level), spread.se_jackknife)
