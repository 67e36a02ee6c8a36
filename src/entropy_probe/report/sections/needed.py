"""How many prompts would settle a question."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from entropy_probe.report.numbers import none
from entropy_probe.report.rows import PRECONDITIONED, Block, Row, Rows
from entropy_probe.report.sections.base import Context, Section
from entropy_probe.statistics.needed_units import needed_units
from entropy_probe.statistics.u_statistics import CrossStatistics


@dataclass(frozen=True)
class NeededSection(Section):
    """Prompts that would settle a question, if they are like these: the same U_cross, variance parts and responses a prompt.

    ``exclude_zero`` is for a 95 % interval of δH₁ without zero, ``reach_target_se`` for a standard error of ``target_se`` nats.
    """

    exclude_zero: int | None
    target_se: float | None
    reach_target_se: int | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, step: CrossStatistics, prompts_per_unit: float, target_se: float | None) -> NeededSection:
        """The section, from the η-weighted statistics.

        Args:
            step: U_cross and the parts of its variance, of the η-weighted dots.
            prompts_per_unit: mean size of a unit.
            target_se: a standard error to reach, nats, where one was asked about.
        """
        if step.parts is None:
            why = step.null_reasons.get(
                "ci95", "needs the matrix of dots of equal units, to tell what falls as 1/U from 1/U²"
            )
            reasons = {"exclude_zero": why, "reach_target_se": why}
            exclude = reach = None
        else:
            reasons = {}
            exclude = needed_units(step.u_cross, *step.parts, exclude_zero=True)
            reach = None if target_se is None else needed_units(step.u_cross, *step.parts, target_se=target_se)
            if exclude is None:
                reasons["exclude_zero"] = "δH₁ is zero, or ten million units would not do"
            if reach is None:
                reasons["reach_target_se"] = "ten million units would not do"
        if target_se is None:
            reasons["target_se"] = reasons["reach_target_se"] = "target_se is not set"

        def prompts(units: int | None) -> int | None:
            return None if units is None else math.ceil(units * prompts_per_unit)

        return cls(prompts(exclude), target_se, prompts(reach), reasons)

    def shown(self, context: Context) -> Sequence[Block]:
        """One row."""
        return (Rows(PRECONDITIONED, (Row("prompts needed", *self._said(context.prompts)),)),)

    def _said(self, prompts: int) -> tuple[str, str]:
        if self.exclude_zero is None:
            return none(self.null_reasons, "exclude_zero"), ""
        said = f"for an interval without zero, if they are like these {prompts}"
        if self.target_se is None:
            return f"{self.exclude_zero}", said
        reach = "none would do" if self.reach_target_se is None else f"{self.reach_target_se}"
        return f"{self.exclude_zero}; {reach}", f"{said}; for a standard error of {self.target_se:g}"
