"""The dot products of unit vectors, from which every statistic of U_cross is computed.

A unit u holds s_u prompts; XS_u and YS_u are its sums of X̃_n and Ỹ_n. All dots are float64, in nats per unit of learning rate
times prompts squared. Source: docs/method.md, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from entropy_probe.common.arrays import FloatArray


@dataclass(frozen=True)
class UnitDots:
    """Every dot product that the statistics need, over U units.

    Attributes:
        sizes: s_u, prompts in each unit, [U].
        x_dot_sum: XS_u · ΣYS, [U].
        y_dot_sum: YS_u · ΣXS, [U].
        diagonal: XS_u · YS_u, [U].
        sum_dot: ΣXS · ΣYS, accumulated from the sums and not from the unit dots: the self-test's second opinion.
        kernel: K_uw = XS_u · YS_w, [U, U], or None where the vectors were streamed.
    """

    sizes: NDArray[np.int64]
    x_dot_sum: FloatArray
    y_dot_sum: FloatArray
    diagonal: FloatArray
    sum_dot: float
    kernel: FloatArray | None

    @staticmethod
    def from_kernel(kernel: FloatArray, sizes: Sequence[int], sum_dot: float | None = None) -> UnitDots:
        """The dots that the U × U matrix K_uw = XS_u · YS_w implies."""
        matrix = np.asarray(kernel, dtype=np.float64)
        return UnitDots(
            sizes=np.asarray(sizes, dtype=np.int64),
            x_dot_sum=matrix.sum(axis=1),
            y_dot_sum=matrix.sum(axis=0),
            diagonal=np.diagonal(matrix).copy(),
            sum_dot=float(matrix.sum()) if sum_dot is None else sum_dot,
            kernel=matrix,
        )

    @staticmethod
    def streamed(
        sizes: Sequence[int],
        x_dot_sum: Sequence[float],
        y_dot_sum: Sequence[float],
        diagonal: Sequence[float],
        sum_dot: float,
    ) -> UnitDots:
        """The dots that two streamed passes collect, without the matrix."""
        return UnitDots(
            np.asarray(sizes, dtype=np.int64),
            np.asarray(x_dot_sum, dtype=np.float64),
            np.asarray(y_dot_sum, dtype=np.float64),
            np.asarray(diagonal, dtype=np.float64),
            sum_dot,
            None,
        )

    def scaled(self, factor: float) -> UnitDots:
        """The same dots under an inner product ``factor`` times as large."""
        return UnitDots(
            self.sizes,
            self.x_dot_sum * factor,
            self.y_dot_sum * factor,
            self.diagonal * factor,
            self.sum_dot * factor,
            None if self.kernel is None else self.kernel * factor,
        )

    def __add__(self, other: UnitDots) -> UnitDots:
        """The dots over both of two disjoint sets of parameters."""
        return UnitDots(
            self.sizes,
            self.x_dot_sum + other.x_dot_sum,
            self.y_dot_sum + other.y_dot_sum,
            self.diagonal + other.diagonal,
            self.sum_dot + other.sum_dot,
            None if self.kernel is None or other.kernel is None else self.kernel + other.kernel,
        )
