"""What was paired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.gradients import Plan
from entropy_probe.report.rows import FACTS, Block, Row, Rows
from entropy_probe.report.sections.base import Context, Section


@dataclass(frozen=True)
class UnitsSection(Section):
    """What was paired: ``sizes`` are prompts a unit; ``tokens`` response tokens. ``reason`` says why this mode."""

    mode: str
    count: int
    sizes: list[int]
    prompts: int
    responses: int
    tokens: int
    storage: str
    reason: str

    @classmethod
    def of(cls, plan: Plan, batch: RolloutBatch) -> UnitsSection:
        """The section."""
        return cls(
            mode=plan.units.mode.value,
            count=len(plan.units.ranges),
            sizes=list(plan.units.sizes),
            prompts=len(batch.groups),
            responses=len(batch.responses),
            tokens=batch.tokens,
            storage=plan.storage.value,
            reason=plan.reason,
        )

    def shown(self, context: Context) -> Sequence[Block]:
        """Units, and the rollouts that they are of."""
        rows = (
            Row("units", f"{self.count}", self.reason),
            Row("rollouts", f"{self.responses}", f"responses to {self.prompts} prompts, {self.tokens} tokens"),
        )
        return (Rows(FACTS, rows),)
