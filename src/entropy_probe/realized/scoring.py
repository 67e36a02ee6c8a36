"""The responses scored again after a step that is taken virtually and taken back."""

from __future__ import annotations

import torch

from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.errors import InputError
from entropy_probe.model.measured import Measured
from entropy_probe.model.policy import Policy
from entropy_probe.model.virtual_step import virtual_step
from entropy_probe.realized.rounding import rounding_noise
from entropy_probe.realized.steps import Step


def measure_after(
    policy: Policy,
    batch: RolloutBatch,
    step: Step,
    *,
    scale: float = 1.0,
    rounding: torch.Generator | None = None,
    entropies: bool,
) -> Measured:
    """Scores, log-probs (and entropies) of the responses under ``scale`` times the step, taken virtually and taken back.

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
