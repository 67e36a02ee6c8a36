"""How many units would settle a question: to tell U_cross from zero, or to reach a standard error."""

from __future__ import annotations

import math

from entropy_probe.statistics.quantiles import t_quantile
from entropy_probe.statistics.variance import variance_at

MOST_UNITS = 10_000_000
"""Above this :func:`needed_units` gives up."""


def needed_units(
    u_cross: float,
    zeta1: float,
    tau_squared: float,
    *,
    exclude_zero: bool = False,
    target_se: float | None = None,
    level: float = 0.95,
) -> int | None:
    """The smallest U ≥ 4 that would do, if further units are like these: the same U_cross, ζ₁, τ² and responses a prompt.

    With ``exclude_zero`` it is the smallest U with t_{U−1} √V(U) < |u_cross|, with ``target_se`` the smallest with
    √V(U) ≤ target_se; V(U) is :func:`~entropy_probe.statistics.variance.variance_at`. The answer is as good an estimate as
    u_cross and both parts are: a u_cross of one standard error may be nothing. It counts the symmetric interval; the
    default one is a little longer on one side. Intervals begin at U = 4.

    Args:
        u_cross: nats per unit of learning rate.
        zeta1: linear part, of :attr:`~entropy_probe.statistics.variance.Decomposition.parts`.
        tau_squared: degenerate part, of the same.
        exclude_zero: ask for an interval without zero; exactly one of this and ``target_se``.
        target_se: standard error to reach, in the unit of u_cross, above 0.
        level: of the interval.

    Returns:
        Units, or None: u_cross is zero, or more than ``MOST_UNITS`` would be needed.

    Raises:
        ValueError: neither or both questions, or a target that is not above 0.
    """
    if exclude_zero is (target_se is not None):
        raise ValueError("ask for exactly one of exclude_zero and target_se")
    if target_se is not None and not target_se > 0.0:
        raise ValueError(f"the target standard error is {target_se}; expected a number above 0")

    def does(units: int) -> bool:
        error = math.sqrt(variance_at(units, zeta1, tau_squared))
        if target_se is not None:
            return error <= target_se
        return t_quantile(units, level) * error < abs(u_cross)

    # Both t and V fall with U, so the question has one threshold.
    low, high = 3, 4
    while not does(high):
        if high >= MOST_UNITS:
            return None
        low, high = high, min(2 * high, MOST_UNITS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if does(middle) else (middle, high)
    return high
