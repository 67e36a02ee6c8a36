"""Which entropy is measured before and after a step, how, and what its linear term says.

A measure is a target (which entropy, by which estimator) and a weighting (how importance weights are normalised). Its
``change`` is ΔH on common samples; its ``linear_term`` is the derivative of that very estimator at no step. Source:
docs/method.md, section 7.
"""

from __future__ import annotations

from dataclasses import dataclass

from entropy_probe.common.arrays import FloatArray
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.model.measured import Measured
from entropy_probe.statistics.importance_sampling import (
    EntropyChange,
    LinearTerm,
    Weighting,
    linear_term,
    resampled_change,
)
from entropy_probe.targets.base import Sample, TokenPair
from entropy_probe.targets.entropy import EntropyTarget


@dataclass(frozen=True)
class EntropyMeasure:
    """Which entropy is compared before and after a step, and how."""

    target: EntropyTarget
    weighting: Weighting = Weighting.GLOBAL

    def change(self, batch: RolloutBatch, before: Measured, after: Measured) -> EntropyChange:
        """ΔH on common samples."""
        return self.target.change(Sample.of(batch, before), Sample.of(batch, after), self.weighting)

    def by_decision(self, batch: RolloutBatch) -> bool:
        """Whether the change is realised token by token: its linear term is then −X̄ · Δθ."""
        return self.target.by_decision(batch.importance, self.weighting)

    def parts(self, batch: RolloutBatch, before: Measured, after: Measured) -> FloatArray:
        """What every response has in ΔH, to be averaged over responses and prompts, for changes as small as rounding: [N]."""
        return self.target.parts(Sample.of(batch, before), Sample.of(batch, after), self.weighting)

    def linear_term(self, batch: RolloutBatch, before: Measured) -> LinearTerm:
        """Its derivative at no step, of changes of whole responses' scores (and entropies)."""
        return linear_term(
            before.scores.numpy(),
            batch.group_sizes,
            entropies=self._entropies(batch, before) if self.target.needs_token_entropies else None,
            lengths=self._lengths(batch),
            weighting=self.weighting,
            log_weights=None if batch.importance is None else batch.importance.log_weights.numpy(),
        )

    def derivative(self, batch: RolloutBatch, before: Measured) -> TokenPair | None:
        """That derivative as what multiplies ∇log π and ∇H_t at every token, where weights are by prefix; else None."""
        if not self.target.weighs_by_prefix(batch.importance):
            return None
        return self.target.derivative(Sample.of(batch, before))

    def resampled(self, batch: RolloutBatch, before: Measured, fresh: RolloutBatch, after: Measured) -> EntropyChange:
        """ΔH with ``fresh`` responses to the same prompts that were drawn and scored after the step."""
        entropies, lengths = self._counted(batch, before)
        entropies_after, lengths_after = self._counted(fresh, after)
        return resampled_change(
            entropies,
            entropies_after,
            batch.group_sizes,
            fresh.group_sizes,
            lengths=lengths,
            lengths_after=lengths_after,
        )

    def _counted(self, batch: RolloutBatch, measured: Measured) -> tuple[FloatArray, FloatArray | None]:
        entropies, lengths = self.target.counted(Sample.of(batch, measured))
        return entropies.numpy(), None if lengths is None else lengths.numpy()

    def _entropies(self, batch: RolloutBatch, measured: Measured) -> FloatArray:
        found: FloatArray = self.target.values(Sample.of(batch, measured)).numpy()
        return found

    def _lengths(self, batch: RolloutBatch) -> FloatArray | None:
        exposure = self.target.exposure(Sample.of(batch))
        return None if exposure is None else exposure.numpy()


@dataclass(frozen=True)
class Predicted:
    """One measure of a step, and its linear term, in the measure's nats."""

    measure: EntropyMeasure
    linear: float
