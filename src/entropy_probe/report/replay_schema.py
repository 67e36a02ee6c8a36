"""The JSON of ``entropy-probe replay``, schema 1. Every number is finite, or null with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from entropy_probe.common.evidence import Evidence
from entropy_probe.report.rows import Block, Chapter, Row, Rows
from entropy_probe.report.schema import content_of
from entropy_probe.report.sections.base import Context, all_blocks
from entropy_probe.report.sections.loss import LossConfig
from entropy_probe.report.sections.replay import GradientSection, LoggedSection, UpdateSection

REPLAY_SCHEMA = 1
STEP = Chapter(90, "Step and batch")


@dataclass(frozen=True)
class Suspicion:
    """A cause that was tried: what was seen, what to do, and the net error that is left with it (null: cannot be tried)."""

    code: str
    seen: str
    advice: str
    error_net: float | None


@dataclass(frozen=True)
class ReplayConfig(LossConfig):
    """What was asked for, as it was resolved."""

    before: str
    after: str
    base: str | None
    rollouts: str
    freeze: list[str]
    step: int | None
    advantage: str
    length_weight: str
    max_completion_length: int | None
    learning_rate: float | None
    temperature: float
    dtype: str
    autocast: str | None
    microbatch: int
    device: str


@dataclass(frozen=True)
class ReplayReport:
    """The whole JSON. ``headline`` is the sentence that a person reads first; ``tried`` counts the causes that were tested."""

    headline: str
    matched: bool
    update: UpdateSection
    logged: LoggedSection
    gradient: GradientSection
    suspicions: list[Suspicion]
    tried: int
    warnings: list[Evidence]
    kind: str
    responses: int
    prompts: int
    parameters: int
    config: ReplayConfig
    timing: Mapping[str, float]
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object.

        Raises:
            AssertionError: a number is not finite, or a null has no reason: a fault of ours.
        """
        return content_of(self, REPLAY_SCHEMA)

    def blocks(self) -> list[Block]:
        """What is shown of it, for a renderer."""
        config = self.config
        context = Context("nats per token", self.prompts, self.parameters, config.dtype)
        step = "unknown" if config.step is None else str(config.step)
        facts = (
            Row("step", step, f"{self.kind} weights, {config.dtype}"),
            Row("rollouts", str(self.responses), f"responses to {self.prompts} prompts{config.consumed_words}"),
            Row("loss", config.length_weight, f"advantages {config.advantage}, temperature {config.temperature:g}"),
            *config.loss_rows(),
            Row("time", f"{self.timing['total']:.1f} s"),
        )
        return [*all_blocks(self, context), Rows(STEP, facts)]

    def seen(self, suspicion: Suspicion) -> str:
        """What was seen of a suspicion, and the error that is left with it."""
        if suspicion.error_net is None:
            return suspicion.seen
        return f"{suspicion.seen} (with it the error is {self.update.net(suspicion.error_net)})"
