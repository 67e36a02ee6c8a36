"""δH₁ with X and Y of two batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from entropy_probe.common.evidence import Evidence
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.report.numbers import interval, signed
from entropy_probe.report.rows import PRECONDITIONED, Block, Row, Rows
from entropy_probe.report.sections.base import Context, Section
from entropy_probe.report.sections.off_policy import OffPolicySection
from entropy_probe.statistics.two_batches import TwoBatchStatistics


@dataclass(frozen=True)
class TwoBatchSection(Section):
    """δH₁ with X from the evaluation rollouts and Y from the update's, nats; ``variance_*`` are its terms, nats².

    ``delta_h1_se`` squared is ``variance_evaluation`` + ``variance_update`` − ``variance_product``, and at least
    the last. ``off_policy`` is of the evaluation rollouts.
    """

    delta_h1: float
    delta_h1_se: float
    delta_h1_ci95: list[float]
    variance_evaluation: float
    variance_update: float
    variance_product: float
    evaluation_prompts: int
    evaluation_responses: int
    off_policy: OffPolicySection

    @classmethod
    def of(cls, found: TwoBatchStatistics, evaluation: RolloutBatch, off_policy: OffPolicySection) -> TwoBatchSection:
        """The section, from the η-weighted statistics of X of ``evaluation`` against the update's Y."""
        delta_h1 = found.negated
        assert delta_h1.ci95 is not None
        return cls(
            delta_h1=delta_h1.value,
            delta_h1_se=found.se,
            delta_h1_ci95=list(delta_h1.ci95),
            variance_evaluation=found.evaluation,
            variance_update=found.update,
            variance_product=found.product,
            evaluation_prompts=len(evaluation.groups),
            evaluation_responses=len(evaluation.responses),
            off_policy=off_policy,
        )

    def shown(self, context: Context) -> Sequence[Block]:
        """One row."""
        said = (
            f"95 % interval {interval(self.delta_h1_ci95)}, X from {self.evaluation_responses} responses to "
            f"{self.evaluation_prompts} other prompts"
        )
        row = Row("δH₁, two batches", signed(self.delta_h1, self.delta_h1_se), said)
        return (Rows(PRECONDITIONED, (row,)), *self.off_policy.shown(context))


def two_batch_warnings(found: TwoBatchStatistics | None) -> list[Evidence]:
    """An interval of two batches that is known to fall short."""
    if found is None or found.shortfall is None:
        return []
    return [Evidence("two_batch_interval_falls_short", found.shortfall, "Give more prompts to the smaller batch")]
