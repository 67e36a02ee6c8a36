"""What an interval of U_cross is, what it is given and what it gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from entropy_probe.common.arrays import FloatArray
from entropy_probe.statistics.variance import Decomposition, decompose


@dataclass(frozen=True)
class Spread:
    """U_cross and what is known of its spread: all that an interval may use. Nats per unit of learning rate.

    Attributes:
        u_cross: the centre.
        row_means: r_u, [U], U ≥ 4.
        se_plugin: √(4 U/(U−1) Σ ω_u² (r_u − U_cross)²), the plug-in standard error.
        se_jackknife: the delete-one standard error.
        matrix: what the matrix of unit dots says; None where vectors were streamed or units are of unequal size.
    """

    u_cross: float
    row_means: FloatArray
    se_plugin: float
    se_jackknife: float
    matrix: Decomposition | None

    @staticmethod
    def of_kernel(kernel: FloatArray) -> Spread:
        """From K / (unit size)², [U, U] with units of equal size and U ≥ 4; its diagonal is not used.

        Raises:
            ValueError: the kernel is not square or has fewer than 4 units.
        """
        found = decompose(kernel)
        return Spread(found.u_cross, found.row_means, math.sqrt(found.plugin), math.sqrt(found.jackknife), found)

    @property
    def units(self) -> int:
        """U."""
        return len(self.row_means)

    @property
    def decomposition(self) -> Decomposition:
        """``matrix``, for an interval that needs it."""
        assert self.matrix is not None, "the caller refuses a method without its matrix"
        return self.matrix


class Interval(Protocol):
    """One way to make an interval of U_cross. A new one is a file beside this one and a line in ``methods.py``."""

    @property
    def described(self) -> str:
        """Quantile and variance in a few words, as the report prints them."""

    @property
    def needs_matrix(self) -> bool:
        """Whether it uses :attr:`Spread.decomposition`, which streamed vectors and units of unequal size do not have."""

    def of(self, spread: Spread, level: float) -> tuple[float, float]:
        """(low, high), in the unit of U_cross.

        Args:
            spread: of four units or more.
            level: nominal coverage, in (0, 1).
        """


def symmetric(centre: float, quantile: float, error: float) -> tuple[float, float]:
    """centre ± quantile × standard error."""
    half_width = quantile * error
    return centre - half_width, centre + half_width
