"""δH₁ by cross-fitting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from entropy_probe.common.arrays import FloatArray
from entropy_probe.data.units import Mode
from entropy_probe.report.numbers import none, signed
from entropy_probe.report.rows import PRECONDITIONED, Block, Row, Rows
from entropy_probe.report.sections.base import Context, Section
from entropy_probe.statistics.two_batches import fold_statistics


@dataclass(frozen=True)
class FoldSection(Section):
    """δH₁ by cross-fitting: X of one fold against Y of the others, and their mean with its delete-one error, nats."""

    folds: int
    delta_h1: float | None
    delta_h1_se: float | None
    delta_h1_by_fold: list[float]
    null_reasons: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, folds: Sequence[int], kernel: FloatArray | None, mode: Mode, weights: FloatArray | None = None
    ) -> FoldSection:
        """The section.

        Args:
            folds: of every prompt.
            kernel: the η-weighted dots of units, [U, U]; None where vectors were streamed.
            mode: how prompts became units.
            weights: W_n / W̄ of every prompt, where X carry 1/W̄.
        """
        count = len(set(folds))
        if kernel is None or mode is not Mode.EXACT:
            why = "needs the matrix of prompts' dots: mode exact, with vectors stored"
            return cls(count, None, None, [], {"delta_h1": why, "delta_h1_se": why})
        found = fold_statistics(kernel, folds, weights)
        delta_h1 = found.estimate.scaled(-1.0)
        reasons = delta_h1.null_reasons(se="delta_h1_se")
        return cls(count, delta_h1.value, delta_h1.se, [-value + 0.0 for value in found.by_fold], reasons)

    def shown(self, context: Context) -> Sequence[Block]:
        """One row."""
        value = (
            none(self.null_reasons, "delta_h1") if self.delta_h1 is None else signed(self.delta_h1, self.delta_h1_se)
        )
        row = Row(f"δH₁, {self.folds} folds", value, "X of one fold against Y of the others")
        return (Rows(PRECONDITIONED, (row,)),)
