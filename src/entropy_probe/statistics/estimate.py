"""A value with its standard error and 95 % interval, or the reason why there is none."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """value ± standard error, in the unit of the value.

    Attributes:
        value: what is estimated.
        se: its standard error; None where it is not known.
        ci95: (low, high), its 95 % interval, which need not be symmetric; None where it is not known.
        why_not: why ``se`` or ``ci95`` is None; empty where both are there.
    """

    value: float
    se: float | None = None
    ci95: tuple[float, float] | None = None
    why_not: str = ""

    @staticmethod
    def from_variance(value: float, variance: float, quantile: float) -> Estimate:
        """value ± quantile √variance; a negative variance counts as 0.

        Args:
            value: what is estimated.
            variance: of the value, in the square of its unit.
            quantile: half the interval's width in standard errors, such as Student's.
        """
        se = math.sqrt(max(0.0, variance))
        return Estimate(value, se, (value - quantile * se, value + quantile * se))

    def scaled(self, factor: float) -> Estimate:
        """The estimate of ``factor`` times the same quantity; a negative factor turns the interval round."""
        # + 0.0 turns −0.0 into 0.0.
        ends = None if self.ci95 is None else sorted(factor * end + 0.0 for end in self.ci95)
        return Estimate(
            factor * self.value + 0.0,
            None if self.se is None else abs(factor) * self.se,
            None if ends is None else (ends[0], ends[1]),
            self.why_not,
        )

    @property
    def excludes_zero(self) -> bool:
        """Whether the 95 % interval is known and does not hold zero."""
        return self.ci95 is not None and not self.ci95[0] <= 0.0 <= self.ci95[1]

    def null_reasons(self, **keys: str) -> dict[str, str]:
        """The reason under the key of every field that is None, as a report has it.

        Args:
            keys: by field (``value``, ``se``, ``ci95``) its key in the report; a field that is not named is not told of.
        """
        return {key: self.why_not for field, key in keys.items() if getattr(self, field) is None}


@dataclass(frozen=True)
class NoEstimate:
    """There is no value, and ``why_not`` says why. It reads like an :class:`Estimate` whose fields are all None."""

    why_not: str

    @property
    def value(self) -> None:
        """There is none."""

    @property
    def se(self) -> None:
        """There is none."""

    @property
    def ci95(self) -> None:
        """There is none."""

    def null_reasons(self, **keys: str) -> dict[str, str]:
        """The reason under every key; see :meth:`Estimate.null_reasons`."""
        return dict.fromkeys(keys.values(), self.why_not)
