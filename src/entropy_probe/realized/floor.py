"""The numerical floor: below which size a realised change is rounding.

    floor = max |ΔH(ε Δθ) − ε predicted|        over eight factors ε from 1e-8 to 1e-6

The true difference there is of order ε². The weights are also rounded at random at each factor
(:func:`~entropy_probe.realized.rounding.rounding_noise`): float32 weights would not move by 1e-6 of a small step, and the same
arithmetic twice would print 0 and hide the noise. Source: docs/method.md, section 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from entropy_probe.common.progress import Progress
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.model.measured import Measured
from entropy_probe.model.policy import Policy
from entropy_probe.realized.measure import Predicted
from entropy_probe.realized.rounding import rounding_generator
from entropy_probe.realized.scoring import measure_after
from entropy_probe.realized.steps import Step

FLOOR_FACTORS = tuple(np.geomspace(1e-8, 1e-6, 8).tolist())
"""Factors ε of the step at which the numerical floor is read."""


def noise_floors(
    policy: Policy,
    batch: RolloutBatch,
    before: Measured,
    step: Step,
    predictions: Sequence[Predicted],
    progress: Progress,
) -> list[float]:
    """The floor of every prediction's measure, in its nats.

    Args:
        policy: the model at θ, weights in float32 or better.
        batch: the rollouts whose tokens are scored again.
        before: their scores and entropies at θ by this very policy.
        step: Δθ.
        predictions: the measures, each with its linear term.
        progress: told of every forward.
    """
    entropies = any(p.measure.target.needs_token_entropies for p in predictions)
    floors = [0.0 for _ in predictions]
    generator = rounding_generator(policy.sharding)
    for factor in progress.track(FLOOR_FACTORS, f"numerical floor, {step.title} step", len(FLOOR_FACTORS)):
        tiny = measure_after(policy, batch, step, scale=factor, rounding=generator, entropies=entropies)
        gaps = [abs(p.measure.change(batch, before, tiny).delta_h - factor * p.linear) for p in predictions]
        floors = [max(floor, gap) for floor, gap in zip(floors, gaps, strict=True)]
    return floors
