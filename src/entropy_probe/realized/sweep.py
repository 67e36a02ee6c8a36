"""The realised change along a step: ΔH(α Δθ) on common samples for factors α of the learning rate, forwards only.

Every evaluation is a virtual step of α Δθ on the live model, which is itself again afterwards, and one forward over the batch.
A sweep of F factors takes two evaluations each (one with the weights rounded otherwise, for the numerical floor there), about
ten for the curvature and three a measure to place the end of the linear range. See :mod:`entropy_probe.statistics.linearity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from entropy_probe.common.progress import Progress
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.model.measured import Measured
from entropy_probe.model.policy import Policy
from entropy_probe.realized.changes import RealizedChange
from entropy_probe.realized.measure import EntropyMeasure
from entropy_probe.realized.rounding import rounding_generator
from entropy_probe.realized.scoring import measure_after
from entropy_probe.realized.steps import Step
from entropy_probe.statistics.importance_sampling import EntropyChange
from entropy_probe.statistics.linearity import (
    Curvature,
    Curve,
    LinearRange,
    PowerLaw,
    curvature_at_zero,
    fit_power_law,
    linear_until,
)

FLOORS_CLEAR = 10
"""Numerical floors that a change must exceed to count for a slope."""
LEAST_FACTORS = 3


@dataclass(frozen=True)
class StepLine:
    """ΔH of several measures at any α along one step; an α that was evaluated is not evaluated again.

    Attributes:
        policy: the model at θ, weights in float32 or better.
        batch: the responses that are scored again.
        before: their scores and entropies at θ by this very policy.
        step: Δθ.
        measures: which entropies are compared.
    """

    policy: Policy
    batch: RolloutBatch
    before: Measured
    step: Step
    measures: Sequence[EntropyMeasure]
    _found: dict[float, tuple[EntropyChange, ...]] = field(default_factory=dict, repr=False)

    def at(self, alpha: float) -> tuple[EntropyChange, ...]:
        """ΔH(α Δθ) by every measure.

        Raises:
            InputError: the step is so large that a log-probability is not finite after it.
        """
        if alpha not in self._found:
            self._found[alpha] = self._changes(alpha, None)
        return self._found[alpha]

    def rounding_error(self, alpha: float, generator: torch.Generator) -> tuple[float, ...]:
        """How far each measure's ΔH(α Δθ) moves where the weights are rounded otherwise, nats."""
        rounded = self._changes(alpha, generator)
        return tuple(abs(a.delta_h - b.delta_h) for a, b in zip(rounded, self.at(alpha), strict=True))

    def curve(self, measure: int) -> Curve:
        """ΔH(α) of one measure."""
        return lambda alpha: self.at(alpha)[measure].delta_h

    def _changes(self, alpha: float, rounding: torch.Generator | None) -> tuple[EntropyChange, ...]:
        needed = any(measure.target.needs_token_entropies for measure in self.measures)
        after = measure_after(self.policy, self.batch, self.step, scale=alpha, rounding=rounding, entropies=needed)
        return tuple(measure.change(self.batch, self.before, after) for measure in self.measures)


@dataclass(frozen=True)
class SweepCurve:
    """One step on one batch by one measure, at every α; ``row`` is the realised change at α = 1, with L and its floor.

    ``noise_floors`` are the row's floor, or how far other rounding moves ΔH at that α where that is more. ``slope`` is the
    power law of abs(ΔH) over the factors that are linear; None with its reason in ``slope_reason``.
    """

    row: RealizedChange
    alphas: tuple[float, ...]
    changes: tuple[EntropyChange, ...]
    noise_floors: tuple[float, ...]
    linear: LinearRange
    curvature: Curvature
    slope: PowerLaw | None
    slope_reason: str | None


def sweep_step(
    policy: Policy,
    batch: RolloutBatch,
    before: Measured,
    step: Step,
    rows: Sequence[RealizedChange],
    factors: Sequence[float],
    progress: Progress,
) -> list[SweepCurve]:
    """The curve of every measure of one realised step.

    Args:
        policy: the model at θ, weights in float32 or better.
        batch: the responses that the rows were realised on.
        before: their scores and entropies at θ by this very policy.
        step: Δθ.
        rows: the step's realised changes, one a measure.
        factors: α, ascending.
        progress: told of every factor.

    Raises:
        InputError: a factor takes a log-probability out of the range of the number type.
    """
    line = StepLine(policy, batch, before, step, [row.measure for row in rows])
    generator = rounding_generator(policy.sharding)
    errors = [
        line.rounding_error(alpha, generator)
        for alpha in progress.track(factors, f"sweep, {step.name} step", len(factors))
    ]
    found = []
    for m, row in enumerate(rows):
        curve = line.curve(m)
        linear = linear_until(curve, row.predicted, factors, floor=row.noise_floor)
        start = min(1.0 if linear.until is None else linear.until, max(factors))
        floors = [max(row.noise_floor, error[m]) for error in errors]
        slope, reason = _slope(line, m, linear, factors, floors)
        found.append(
            SweepCurve(
                row=row,
                alphas=tuple(factors),
                changes=tuple(line.at(alpha)[m] for alpha in factors),
                noise_floors=tuple(floors),
                linear=linear,
                curvature=curvature_at_zero(curve, start, row.noise_floor),
                slope=slope,
                slope_reason=reason,
            )
        )
    return found


def sweep(
    policy: Policy,
    batch: RolloutBatch,
    before: Measured,
    steps: Sequence[Step],
    rows: Sequence[RealizedChange],
    factors: Sequence[float],
    progress: Progress,
) -> list[SweepCurve]:
    """:func:`sweep_step` of every step, whose realised changes on this batch are among ``rows``.

    A step that is rounded as the weights are stored is passed by: α times it is no step of that optimizer.
    """
    return [
        curve
        for step in steps
        if step.kept is None
        for curve in sweep_step(
            policy, batch, before, step, [row for row in rows if row.title == step.title], factors, progress
        )
    ]


def _slope(
    line: StepLine, measure: int, linear: LinearRange, factors: Sequence[float], floors: Sequence[float]
) -> tuple[PowerLaw | None, str | None]:
    """Of the factors that are linear and whose change stands clear of the numerical floor."""
    if linear.until is None:
        return None, linear.reason
    found = [
        (alpha, abs(line.at(alpha)[measure].delta_h), floor)
        for alpha, floor in zip(factors, floors, strict=True)
        if alpha <= linear.until
    ]
    clear = [(alpha, size) for alpha, size, floor in found if size > FLOORS_CLEAR * floor]
    if len(clear) < LEAST_FACTORS:
        return None, (
            f"{len(clear)} of {len(factors)} factors are in the linear range and {FLOORS_CLEAR} noise floors clear of zero; a "
            f"slope needs {LEAST_FACTORS}"
        )
    return fit_power_law([alpha for alpha, _ in clear], [size for _, size in clear]), None
