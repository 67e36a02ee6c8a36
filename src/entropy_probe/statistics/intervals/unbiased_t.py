"""Student's interval with the unbiased variance.

    U_cross ± t √V        t Student's quantile with U − 1 degrees of freedom
    V = max(V_unb, 2 τ̂² / (U(U−1)))        :func:`~entropy_probe.statistics.variance.interval_variance`

V counts the linear and the degenerate part once each. The interval covers what it says where U_cross is not skewed, and less
where it is: that is what ``skewed_t`` mends. It needs the matrix of dots of units of equal size. Measured coverage:
docs/coverage.md. Source: docs/method.md, section 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from entropy_probe.statistics.intervals.base import Spread, symmetric
from entropy_probe.statistics.quantiles import t_quantile


@dataclass(frozen=True)
class UnbiasedT:
    """U_cross ± t √V, nats per unit of learning rate."""

    described: str = "t, unbiased variance"
    needs_matrix: bool = True

    def of(self, spread: Spread, level: float) -> tuple[float, float]:
        """(low, high)."""
        found = spread.decomposition
        return symmetric(found.u_cross, t_quantile(found.units, level), math.sqrt(found.variance))
