"""The intervals that there are: one line each, and its formula in the file that the line names."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from entropy_probe.common.arrays import FloatArray
from entropy_probe.statistics.intervals.base import Interval, Spread
from entropy_probe.statistics.intervals.jackknife_t import JackknifeT
from entropy_probe.statistics.intervals.normal import Normal
from entropy_probe.statistics.intervals.skewed_t import SkewedT
from entropy_probe.statistics.intervals.t import StudentT
from entropy_probe.statistics.intervals.unbiased_t import UnbiasedT


class RegisteredInterval(StrEnum):
    """An enum whose members are intervals: each is the text of its name, and works as an :class:`Interval`.

    Names and formulas stand in one line, so that neither can be without the other.
    """

    formula: Interval

    def __new__(cls, name: str, formula: Interval) -> Self:
        """A member from its name, as a user writes it, and from what makes the interval."""
        found = str.__new__(cls, name)
        found._value_ = name
        found.formula = formula
        return found

    @property
    def described(self) -> str:
        """Quantile and variance, for the report."""
        return self.formula.described

    @property
    def needs_matrix(self) -> bool:
        """Whether it needs the matrix of dots of units of equal size; the others need row means alone."""
        return self.formula.needs_matrix

    def of(self, spread: Spread, level: float) -> tuple[float, float]:
        """(low, high); see :meth:`Interval.of`."""
        return self.formula.of(spread, level)


class IntervalMethod(RegisteredInterval):
    """How an interval of U_cross is made; q is the standard normal's and t Student's quantile with U − 1 degrees of freedom.

    NORMAL: U_cross ± q SE, SE² = 4 Σ (r_u − U_cross)² / (U(U−1)), the plug-in.
    T: U_cross ± t SE.
    JACKKNIFE_T: U_cross ± t SE (U−1)/(U−2), the delete-one standard error.
    UNBIASED_T: U_cross ± t √V, V the unbiased variance with its floor.
    SKEWED_T: the same with Satterthwaite's degrees of freedom, and longer on the side of U_cross's skew.

    The last two need the matrix of dots of units of equal size, the others row means alone. Each has its formula, its source
    and when it covers in the file of its name. U_cross is in nats per unit of learning rate.

    Example:
        >>> from entropy_probe import IntervalMethod, Settings
        >>> IntervalMethod("skewed_t").described
        'skewed t, unbiased variance'
        >>> settings = Settings(interval="jackknife_t")
    """

    NORMAL = "normal", Normal()
    T = "t", StudentT()
    JACKKNIFE_T = "jackknife_t", JackknifeT()
    UNBIASED_T = "unbiased_t", UnbiasedT()
    SKEWED_T = "skewed_t", SkewedT()


DEFAULT_METHOD = IntervalMethod.SKEWED_T
"""Chosen by measured coverage (``docs/coverage.md``)."""
WITHOUT_MATRIX = IntervalMethod.JACKKNIFE_T
"""The default where vectors are streamed or units are of unequal size."""


def interval(kernel: FloatArray, method: Interval = DEFAULT_METHOD, *, level: float = 0.95) -> tuple[float, float]:
    """(low, high) of U_cross in nats per unit of learning rate, from K [U, U] with equal units and U ≥ 4.

    Args:
        kernel: K / (unit size)², [U, U]; its diagonal is not used.
        method: a member of :class:`IntervalMethod`, or any other :class:`Interval`.
        level: nominal coverage, in (0, 1).

    Raises:
        ValueError: the kernel is not square or has fewer than 4 units, or the level is not in (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"the level is {level}; expected a number between 0 and 1")
    return method.of(Spread.of_kernel(kernel), level)
