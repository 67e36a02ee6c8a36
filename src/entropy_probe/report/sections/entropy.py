"""The entropy as it is, before any step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.model.measured import Measured
from entropy_probe.report.numbers import quantity
from entropy_probe.report.rows import PRECONDITIONED, Block, Row, Rows
from entropy_probe.report.sections.base import Context, Section
from entropy_probe.statistics.importance_sampling import entropy_estimate
from entropy_probe.targets.base import Sample
from entropy_probe.targets.choices import EntropyUnit
from entropy_probe.targets.entropy import EntropyTarget


@dataclass(frozen=True)
class EntropySection(Section):
    """Ĥ(θ) with its standard error clustered by prompt; per token is that divided by the mean length, a ratio."""

    per_response: float
    se: float
    per_token: float
    per_token_se: float
    mean_length: float

    @classmethod
    def of(cls, batch: RolloutBatch, measured: Measured, target: EntropyTarget) -> EntropySection:
        """The section, from the responses' scores and token entropies."""
        sample = Sample.of(batch, measured)
        (entropies, counts), (_, lengths) = (
            EntropyTarget(target.estimator, unit).counted(sample)
            for unit in (EntropyUnit.PER_RESPONSE, EntropyUnit.PER_TOKEN)
        )
        assert lengths is not None
        of_responses = None if counts is None else counts.numpy()
        mean_length = batch.mean_length
        if batch.importance is not None:
            mean_length, _ = entropy_estimate(lengths.numpy(), batch.group_sizes, of_responses)
        return cls(
            *entropy_estimate(entropies.numpy(), batch.group_sizes, of_responses),
            *entropy_estimate(entropies.numpy(), batch.group_sizes, lengths.numpy()),
            mean_length,
        )

    def now(self, unit: EntropyUnit) -> tuple[float, str]:
        """The entropy that is measured, nats, and per what."""
        return (self.per_token, "token") if unit is EntropyUnit.PER_TOKEN else (self.per_response, "response")

    def shown(self, context: Context) -> Sequence[Block]:
        """Per response and per token."""
        rows = (
            Row("entropy now", quantity(self.per_response, self.se), "nats per response"),
            Row("", quantity(self.per_token, self.per_token_se), "nats per token"),
        )
        return (Rows(PRECONDITIONED, rows),)

    def metrics(self) -> Mapping[str, float | None]:
        """Ĥ per response and per token, nats."""
        return {"entropy": self.per_response, "entropy_per_token": self.per_token}
