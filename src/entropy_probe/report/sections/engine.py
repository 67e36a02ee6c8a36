"""How the gradients were computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from entropy_probe.common.evidence import Evidence
from entropy_probe.errors import some_of
from entropy_probe.gradients import Coverage, Preparation
from entropy_probe.report.rows import FACTS, Block, Row, Rows
from entropy_probe.report.sections.base import Context, Section


@dataclass(frozen=True)
class EngineSection(Section):
    """How the gradients were computed. Every treatment is exact; ``fallback`` and ``recomputed`` cost more.

    ``head`` says where logits were computed (whole, responses, chunked), ``reason`` why, with the responses in a forward;
    ``fallback_share`` is of the trainable elements.
    """

    head: str
    microbatch: int
    reason: str
    fallback: list[str]
    fallback_share: float
    recomputed: list[str]

    @classmethod
    def of(cls, preparation: Preparation, coverage: Coverage) -> EngineSection:
        """The section."""
        return cls(
            head=preparation.head.value,
            microbatch=preparation.microbatch_size,
            reason=preparation.reason,
            fallback=list(coverage.fallback),
            fallback_share=coverage.fallback_share,
            recomputed=list(coverage.recomputed),
        )

    def shown(self, context: Context) -> Sequence[Block]:
        """The share by rules, and where logits were computed."""
        share = self.fallback_share
        said = "by rules" if share == 0.0 else f"{100 * (1 - share):.3g} % by rules"
        return (Rows(FACTS, (Row("gradients", said, self.reason),)),)


def coverage_warnings(coverage: Coverage) -> list[Evidence]:
    """Parameters whose gradients are exact but slow, for want of a rule that tells their sequences apart."""
    if not coverage.fallback:
        return []
    count, share = len(coverage.fallback), 100 * coverage.fallback_share
    return [
        Evidence(
            "slow_parameters",
            f"{count} trainable parameters, {share:.2g} % of the elements, have no rule ({some_of(coverage.fallback)}): "
            "their gradients are exact, by two backwards a unit",
            "Nothing to do about the figures; freeze them if they need not train and the probe is too slow",
        )
    ]
