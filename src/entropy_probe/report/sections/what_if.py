"""What another step would do, to first order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from entropy_probe.optimizers.what_if import Fall, WhatIf
from entropy_probe.report.numbers import none, signed
from entropy_probe.report.rows import OWN_STEP, Block, Row, Rows
from entropy_probe.report.sections.base import Context, Section


@dataclass(frozen=True)
class WhatIfRow:
    """The first-order change of another step, nats: ``delta_h1`` of the preconditioned, ``adamw`` of the optimizer's own.

    ``delta_h1_se`` is over fresh batches, ``adamw_se`` of what this step does, as elsewhere.
    """

    name: str
    asked: float | None
    delta_h1: float | None
    delta_h1_se: float | None
    adamw: float | None
    adamw_se: float | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, found: WhatIf) -> WhatIfRow:
        """The record of one question."""
        reasons = {} if found.asked is not None else {"asked": "no number is asked about"}
        reasons |= found.delta_h1.null_reasons(value="delta_h1", se="delta_h1_se")
        reasons |= found.adamw.null_reasons(value="adamw", se="adamw_se")
        return cls(
            found.name,
            found.asked,
            found.delta_h1.value,
            found.delta_h1.se,
            found.adamw.value,
            found.adamw.se,
            reasons,
        )

    def row(self) -> Row:
        """What both steps would do, or why that is not known."""
        name = self.name.replace("_", " ") + ("" if self.asked is None else f" {self.asked:g}")
        said = [
            f"{what} {signed(value, se)}"
            for what, value, se in (("δH₁", self.delta_h1, self.delta_h1_se), ("this step", self.adamw, self.adamw_se))
            if value is not None
        ]
        return Row(f"what if: {name}", "; ".join(said) or none(self.null_reasons, "delta_h1"))


@dataclass(frozen=True)
class FallSection:
    """The multiple of the learning rate at which the optimizer's own step would lower entropy by ``nats``, to first order."""

    nats: float
    learning_rate_multiple: float | None
    learning_rate_multiple_ci95: list[float] | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Fall) -> FallSection:
        """The record."""
        multiple = found.multiple
        return cls(
            found.nats,
            multiple.value,
            None if multiple.ci95 is None else list(multiple.ci95),
            multiple.null_reasons(value="learning_rate_multiple", ci95="learning_rate_multiple_ci95"),
        )

    def row(self) -> Row:
        """The multiple with its interval, or why there is none."""
        name = f"what if: a fall of {self.nats:g}"
        if self.learning_rate_multiple is None or self.learning_rate_multiple_ci95 is None:
            return Row(name, none(self.null_reasons, "learning_rate_multiple"))
        low, high = self.learning_rate_multiple_ci95
        return Row(name, f"{self.learning_rate_multiple:.3g} × the learning rate", f"95 % {low:.3g} to {high:.3g}")


@dataclass(frozen=True)
class WhatIfSection(Section):
    """``rows`` of questions; ``fall`` where one was asked for."""

    rows: list[WhatIfRow]
    fall: FallSection | None

    @classmethod
    def of(cls, found: Sequence[WhatIf], fall: Fall | None) -> WhatIfSection:
        """The section."""
        return cls([WhatIfRow.of(each) for each in found], None if fall is None else FallSection.of(fall))

    def shown(self, context: Context) -> Sequence[Block]:
        """A row a question, below the optimizer's own step."""
        rows = [row.row() for row in self.rows]
        return (Rows(OWN_STEP, rows if self.fall is None else [*rows, self.fall.row()]),)
