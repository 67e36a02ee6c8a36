"""The realised entropy change: take the step, score the same responses again, compare with the linear prediction.

Each step (:mod:`~entropy_probe.optimizers.geometry` and :mod:`~entropy_probe.optimizers.adamw_step` make them)
is realised beside its own prediction. The numerical floor says below which size a ΔH is rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from entropy_probe.common.arrays import FloatArray
from entropy_probe.common.progress import Progress, Silent
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.errors import InputError
from entropy_probe.model.policy import Measured, Policy
from entropy_probe.model.virtual_step import virtual_step
from entropy_probe.optimizers.adamw_step import gradient_norm
from entropy_probe.optimizers.rounded_step import Kept, mean_kept
from entropy_probe.ranks.sharding import Sharding
from entropy_probe.statistics.importance_sampling import (
    EntropyChange,
    ImportanceWeights,
    LinearTerm,
    Weighting,
    linear_term,
    resampled_change,
)
from entropy_probe.targets.base import Sample
from entropy_probe.targets.entropy import EntropyTarget

SAME, HELD_OUT = "same", "held-out"
"""Whether the responses are those that the step was made from."""

FLOOR_FACTORS = tuple(np.geomspace(1e-8, 1e-6, 8).tolist())
"""Factors ε of the step at which the numerical floor is read."""


@dataclass(frozen=True)
class EntropyMeasure:
    """Which entropy is compared before and after a step, and how."""

    target: EntropyTarget
    weighting: Weighting = Weighting.GLOBAL

    def change(self, batch: RolloutBatch, before: Measured, after: Measured) -> EntropyChange:
        """ΔH on common samples."""
        return self.target.change(Sample.of(batch, before), Sample.of(batch, after), self.weighting)

    def linear_term(self, batch: RolloutBatch, before: Measured) -> LinearTerm:
        """Its derivative at no step."""
        return linear_term(
            before.scores.numpy(),
            batch.group_sizes,
            entropies=self._entropies(batch, before) if self.target.needs_token_entropies else None,
            lengths=self._lengths(batch),
            weighting=self.weighting,
        )

    def resampled(self, batch: RolloutBatch, before: Measured, fresh: RolloutBatch, after: Measured) -> EntropyChange:
        """ΔH with ``fresh`` responses to the same prompts that were drawn and scored after the step."""
        return resampled_change(
            self._entropies(batch, before),
            self._entropies(fresh, after),
            batch.group_sizes,
            fresh.group_sizes,
            lengths=self._lengths(batch),
            lengths_after=self._lengths(fresh),
        )

    def _entropies(self, batch: RolloutBatch, measured: Measured) -> FloatArray:
        found: FloatArray = self.target.values(Sample.of(batch, measured)).numpy()
        return found

    def _lengths(self, batch: RolloutBatch) -> FloatArray | None:
        exposure = self.target.exposure(Sample.of(batch))
        return None if exposure is None else exposure.numpy()


@dataclass(frozen=True)
class RealizedChange:
    """One realised step: ΔH on common samples, its linear prediction and its numerical floor, in the measure's nats.

    ``noise_floor`` is max |ΔH(ε Δθ) − ε predicted| over eight ε from 1e-8 to 1e-6, where the true difference is of order ε²,
    each with the weights also rounded at random (:func:`rounding_noise`): float32 weights would not move by 1e-6 of a small
    step, and the same arithmetic twice would print 0 and hide the noise. ``step_norm`` is ‖Δθ‖;
    ``note`` says what is particular to the row; ``kept`` what rounding leaves of a step that is rounded as it is stored.
    """

    step: str
    method: str
    batch: str
    measure: EntropyMeasure
    change: EntropyChange
    predicted: float
    noise_floor: float
    step_norm: float
    note: str | None = None
    kept: Kept | None = None

    @property
    def title(self) -> str:
        """Which step it is of."""
        return step_title(self.step, self.kept)


@dataclass(frozen=True)
class Step:
    """Δθ by parameter name, what it is called, and how it was made (``virtual``, or a real one on a ``clone``).

    ``kept`` is None unless it is rounded as the weights are stored.
    """

    name: str
    method: str
    deltas: Mapping[str, Tensor]
    kept: Kept | None = None

    @property
    def title(self) -> str:
        """Its name, with its rounding."""
        return step_title(self.name, self.kept)


def step_title(name: str, kept: Kept | None) -> str:
    """A step's name, with its rounding where it is rounded as the weights are stored."""
    return name if kept is None else f"{name} rounded {kept.how.adverb}"


@dataclass(frozen=True)
class Predicted:
    """One measure of a step, and its linear term, in the measure's nats."""

    measure: EntropyMeasure
    linear: float


def realize(
    policy: Policy,
    batch: RolloutBatch,
    before: Measured,
    step: Step,
    predictions: Sequence[Predicted],
    *,
    batch_name: str = SAME,
    progress: Progress | None = None,
) -> list[RealizedChange]:
    """Take the step virtually on the live model, which is itself again afterwards, bit for bit, and score its responses.

    A step that an optimizer took on clones is rounded to the clones' very values.

    Args:
        policy: the model at θ, weights in float32 or better.
        batch: the rollouts whose tokens are scored again.
        before: their scores and entropies at θ by this very policy.
        step: Δθ.
        predictions: what to measure, each with its linear term.
        batch_name: whether these are the responses that the step was made from.
        progress: told of every forward of the numerical floor.

    Raises:
        InputError: the step is so large that a log-probability is not finite after it.
    """
    progress = progress if progress is not None else Silent()
    entropies = any(p.measure.target.needs_token_entropies for p in predictions)
    after = measure_after(policy, batch, step, entropies=entropies)
    floors = [0.0 for _ in predictions]
    sharding = policy.sharding
    generator = rounding_generator(sharding)
    for factor in progress.track(FLOOR_FACTORS, f"numerical floor, {step.title} step", len(FLOOR_FACTORS)):
        tiny = measure_after(policy, batch, step, scale=factor, rounding=generator, entropies=entropies)
        gaps = [abs(p.measure.change(batch, before, tiny).delta_h - factor * p.linear) for p in predictions]
        floors = [max(floor, gap) for floor, gap in zip(floors, gaps, strict=True)]
    norm = gradient_norm(step.deltas, sharding)
    return [
        RealizedChange(
            step.name,
            step.method,
            batch_name,
            p.measure,
            p.measure.change(batch, before, after),
            p.linear,
            floor,
            norm,
            kept=step.kept,
        )
        for p, floor in zip(predictions, floors, strict=True)
    ]


def measure_after(
    policy: Policy,
    batch: RolloutBatch,
    step: Step,
    *,
    scale: float = 1.0,
    rounding: torch.Generator | None = None,
    entropies: bool,
) -> Measured:
    """Scores (and entropies) of the batch's responses under ``scale`` times the step, taken virtually and taken back.

    Args:
        policy: the model at θ, weights in float32 or better.
        batch: whose tokens are scored.
        step: Δθ.
        scale: its factor.
        rounding: draws weights that are rounded otherwise (:func:`rounding_noise`); None rounds to nearest.
        entropies: whether H_t is asked for.

    Raises:
        InputError: the step is so large that a log-probability is not finite after it.
    """
    moves = step.deltas
    if rounding is not None:
        theta = policy.held()
        moves = {name: scale * delta + rounding_noise(theta[name], rounding) for name, delta in moves.items()}
    with virtual_step(policy.model, moves, scale if rounding is None else 1.0):
        found = policy.measure(batch.responses, entropies=entropies)
    if not bool(found.scores.isfinite().all()):
        times = "" if scale == 1.0 else f"{scale:.3g} times "
        raise InputError(
            f"after {times}the {step.title} step a log-probability is {float(found.scores[~found.scores.isfinite()][0])}: the "
            f"step leaves the range of the number type; give a smaller {'learning rate' if scale == 1.0 else 'sweep'}"
        )
    return found


def average(rows: Sequence[RealizedChange]) -> RealizedChange:
    """One row for several folds': means, the error of a mean of independent ones, ESS summed, the worst share, k̂ and floor."""
    changes = [row.change for row in rows]
    weights = [change.weights for change in changes]
    known = [found.pareto_k for found in weights if found.pareto_k is not None]
    count = len(rows)
    together = ImportanceWeights(
        weights=np.concatenate([found.weights for found in weights]) / count,
        ess=sum(found.ess for found in weights),
        ess_fraction=min(found.ess_fraction for found in weights),
        pareto_k=max(known) if len(known) == count else None,
        smoothed=None,
        pareto_reason=next((found.pareto_reason for found in weights if found.pareto_reason is not None), None),
        pareto_k_limit=min(found.pareto_k_limit for found in weights),
    )
    smoothed = [change.delta_h_smoothed for change in changes if change.delta_h_smoothed is not None]
    change = EntropyChange(
        entropy_before=sum(c.entropy_before for c in changes) / count,
        entropy_after=sum(c.entropy_after for c in changes) / count,
        delta_h=sum(c.delta_h for c in changes) / count,
        se=math.sqrt(sum(c.se**2 for c in changes)) / count,
        delta_h_smoothed=sum(smoothed) / count if len(smoothed) == count else None,
        weights=together,
    )
    return replace(
        rows[0],
        change=change,
        predicted=sum(row.predicted for row in rows) / count,
        noise_floor=max(row.noise_floor for row in rows),
        step_norm=sum(row.step_norm for row in rows) / count,
        kept=mean_kept([row.kept for row in rows if row.kept is not None]),
    )


def rounding_generator(sharding: Sharding) -> torch.Generator:
    """The same on all ranks that hold the same, and each its own where they hold shards."""
    return torch.Generator().manual_seed(sharding.ranks.rank if sharding.sharded else 0)


def rounding_noise(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """One unit in the last place up or down in a twelfth of the elements, float64: the variance of rounding to nearest."""
    theta = parameter.detach()
    draws = torch.rand(theta.shape, generator=generator, dtype=torch.float64).to(theta.device)
    up = torch.nextafter(theta, torch.full_like(theta, torch.inf)).double() - theta.double()
    down = torch.nextafter(theta, torch.full_like(theta, -torch.inf)).double() - theta.double()
    return torch.where(draws < 1 / 24, up, torch.where(draws < 1 / 12, down, 0.0))
