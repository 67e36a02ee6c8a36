"""How far the linear picture of a step holds: the curve ΔH(α) = ΔH(α Δθ) in the factor α of its learning rate.

    ΔH(α) = α L + ½ α² C + O(α³)          L the estimator's own linear term, C = d²ΔH/dα² at 0; nats, α without unit

Every part of an optimizer's step is proportional to the learning rate, so α scales the whole Δθ. Values below the
numerical floor (:mod:`entropy_probe.realized.floor`) decide nothing. Source: docs/method.md, section 7; a second difference's
errors: Press et al., Numerical Recipes, 5.7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from entropy_probe.common.choices import float_of, shown, whole_number
from entropy_probe.errors import InputError

Curve = Callable[[float], float]
"""ΔH as a function of α, nats."""

LINEAR_TOLERANCE = 0.1
"""Share of the linear term by which a realised change may differ from it and still count as linear."""

MOST_FACTORS = 1000
"""Factors that a sweep may have at most."""
HALVINGS = 20
"""Times that a step of a finite difference is halved at most."""


@dataclass(frozen=True)
class SweepRange:
    """Factors α of the learning rate at which every step is realised too, evenly spaced in their logarithm.

    Attributes:
        low: the smallest factor, above 0.
        high: the largest.
        count: how many, 2 to 1000.

    Raises:
        InputError: low and high are not finite numbers with 0 < low < high, or the count is out of range.

    Example:
        >>> from entropy_probe import Settings, SweepRange
        >>> [round(alpha, 6) for alpha in SweepRange.parse("0.25:4:3").factors]
        [0.25, 1.0, 4.0]
        >>> settings = Settings(sweep=SweepRange(0.25, 4, 3))  # or sweep="0.25:4:3"
    """

    low: float
    high: float
    count: int

    def __post_init__(self) -> None:
        """Refuse what is no range."""
        whole_number("the sweep's count", self.count)
        low, high = float_of(self.low), float_of(self.high)
        if low is None or high is None or not 0 < low < high < math.inf:
            raise InputError(
                f"sweep from {shown(self.low)} to {shown(self.high)}; expected finite factors with 0 < LOW < HIGH"
            )
        if not 2 <= self.count <= MOST_FACTORS:
            raise InputError(f"sweep of {self.count} factors; expected 2 to {MOST_FACTORS}")

    @classmethod
    def parse(cls, text: str) -> SweepRange:
        """From ``LOW:HIGH:COUNT``, such as 0.1:10:9.

        Raises:
            InputError: another form, or no range.
        """
        parts = text.split(":")
        try:
            low, high, count = float(parts[0]), float(parts[1]), int(parts[2])
        except (ValueError, IndexError):
            parts = []
        if len(parts) != 3:
            raise InputError(
                f"sweep is {shown(text)}; expected LOW:HIGH:COUNT, factors of the learning rate such as 0.1:10:9"
            )
        return cls(low, high, count)

    @property
    def factors(self) -> tuple[float, ...]:
        """α, ascending."""
        return tuple(np.geomspace(self.low, self.high, self.count).tolist())


@dataclass(frozen=True)
class LinearRange:
    """The largest α up to which a curve keeps to its linear term, or None with the ``reason``.

    ``is_bound`` where the largest factor looked at still does: the true end is beyond it.
    """

    until: float | None
    is_bound: bool
    reason: str | None


def linear_until(
    curve: Curve,
    predicted: float,
    factors: Sequence[float],
    *,
    tolerance: float = LINEAR_TOLERANCE,
    floor: float = 0.0,
) -> LinearRange:
    """The largest α with abs(ΔH(α') − α' L) ≤ tolerance · abs(α' L) for every α' looked at up to α.

    Factors are looked at from the smallest on; the first that departs and the last that does not bracket the end, which a root
    finder places within 1e-4 of itself. Where the smallest departs already, halves of it are tried.

    Args:
        curve: ΔH.
        predicted: L.
        factors: α, positive.
        tolerance: share of the linear term.
        floor: a difference within it, nats, is no departure, nor does it show that there is none.
    """
    if predicted == 0.0:
        return LinearRange(None, False, "the linear term is zero")

    def excess(alpha: float) -> float:
        linear = alpha * predicted
        return (abs(curve(alpha) - linear) - max(tolerance * abs(linear), floor)) / abs(linear)

    def visible(alpha: float) -> bool:
        return tolerance * alpha * abs(predicted) > floor

    inside, outside = None, None
    for alpha in sorted(factors):
        if excess(alpha) > 0.0:
            outside = alpha
            break
        inside = alpha
    share = f"{100 * tolerance:g} % of the linear term"
    if outside is None:
        assert inside is not None, "at least one factor"
        if visible(inside):
            return LinearRange(inside, True, None)
        return LinearRange(None, False, f"{share} is within the noise floor of {floor:.1e} at every factor")
    halvings = 0
    while inside is None:
        smaller = outside / 2.0
        halvings += 1
        if halvings > HALVINGS or not visible(smaller):
            return LinearRange(
                None, False, f"realised and linear differ by more than {share} down to a factor of {outside:.2g}"
            )
        if excess(smaller) > 0.0:
            outside = smaller
        else:
            inside = smaller
    until = float(brentq(excess, inside, outside, rtol=1e-4, xtol=1e-4 * inside))
    if not visible(until):
        return LinearRange(
            None, False, f"{share} is within the noise floor of {floor:.1e} up to a factor of {until:.2g}"
        )
    return LinearRange(until, False, None)


@dataclass(frozen=True)
class Curvature:
    """C = d²ΔH/dα² at 0 by a central difference of step ``h``, and a bound of its ``error``, nats."""

    value: float
    error: float
    h: float

    @property
    def resolved(self) -> bool:
        """Whether C is more than its error."""
        return abs(self.value) > self.error

    def second_order(self, alpha: float) -> float:
        """½ α² C."""
        return 0.5 * alpha**2 * self.value


def second_difference(curve: Curve, h: float) -> float:
    """(ΔH(h) − 2 ΔH(0) + ΔH(−h)) / h²: C + O(h²)."""
    return (curve(h) - 2.0 * curve(0.0) + curve(-h)) / h**2


def curvature_at_zero(curve: Curve, start: float, floor: float, *, halvings: int = 8) -> Curvature:
    """C with the step h that keeps its error least.

    Two errors pull h apart: rounding, at most 2 floor / h², which is how the numerical floor enters, and the truncation c h²,
    estimated from the step twice as large as abs(D(2h) − D(h)) / 3, up to both roundings. h is halved from ``start`` while
    their sum falls.

    Args:
        curve: ΔH.
        start: the largest 2h, best where the second-order term is a good part of the linear one.
        floor: of ΔH, nats.
        halvings: at most so many steps are tried, two evaluations each.
    """
    h, wider = start, second_difference(curve, start)
    best: Curvature | None = None
    for _ in range(halvings):
        h /= 2.0
        value = second_difference(curve, h)
        rounding = 2.0 * floor / h**2
        found = Curvature(value, (abs(wider - value) + 1.25 * rounding) / 3.0 + rounding, h)
        if best is not None and found.error >= best.error:
            break
        best, wider = found, value
    assert best is not None, "at least one halving"
    return best


@dataclass(frozen=True)
class PowerLaw:
    """log y = exponent · log x + constant by least squares, and the share R² of the variance of log y that it explains."""

    exponent: float
    r_squared: float


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """The exponent of y in x.

    Raises:
        ValueError: fewer than three points, or one that is not positive.
    """
    if len(x) < 3 or min(*x, *y) <= 0.0:
        raise ValueError(f"a power law needs three positive points; got {len(x)}, the smallest {min(*x, *y, 0.0)}")
    log_x, log_y = np.log(np.asarray(x, dtype=np.float64)), np.log(np.asarray(y, dtype=np.float64))
    log_x, log_y = log_x - log_x.mean(), log_y - log_y.mean()
    exponent = float(log_x @ log_y / (log_x @ log_x))
    unexplained, total = float(((log_y - exponent * log_x) ** 2).sum()), float((log_y**2).sum())
    return PowerLaw(exponent, 1.0 - unexplained / total if total > 0.0 else 1.0)
