"""The realised entropy change: take the step, score the same responses again, compare with the linear prediction.

Each step (:mod:`~entropy_probe.adam_step` makes them) is realised beside its own prediction. The numerical floor says below
which size a ΔH is rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entropy_probe.errors import InputError
from entropy_probe.importance_sampling import EntropyChange, entropy_change, linear_weights
from entropy_probe.policy import Policy
from entropy_probe.progress import Progress, Silent
from entropy_probe.rollouts import RolloutBatch
from entropy_probe.u_statistics import FloatArray
from entropy_probe.virtual_step import virtual_step

FLOOR_FACTORS = tuple(np.geomspace(1e-8, 1e-6, 8).tolist())
"""Factors ε of the step at which the numerical floor is read."""


@dataclass(frozen=True)
class RealizedChange:
    """One realised step: ΔH on common samples, its linear prediction and its numerical floor, nats per response.

    ``noise_floor`` is max |ΔH(ε Δθ) − ε predicted| over eight ε from 1e-8 to 1e-6, where the true difference is of order ε²,
    each with the weights also rounded at random (:func:`rounding_noise`): float32 weights would not move by 1e-6 of a small
    step, and the same arithmetic twice would print 0 and hide the noise. ``step_norm`` is ‖Δθ‖.
    """

    step: str
    method: str
    change: EntropyChange
    predicted: float
    noise_floor: float
    step_norm: float


@dataclass(frozen=True)
class Step:
    """Δθ by parameter name, what it is called, and how it was made (``virtual``, or a real one on a ``clone``)."""

    name: str
    method: str
    deltas: Mapping[str, Tensor]


def realize(
    policy: Policy,
    batch: RolloutBatch,
    scores: FloatArray,
    step: Step,
    score_changes: FloatArray,
    *,
    progress: Progress | None = None,
) -> RealizedChange:
    """Take the step virtually on the live model, which is itself again afterwards, bit for bit, and score its responses.

    A step that an optimizer took on clones is rounded to the clones' very values.

    Args:
        policy: the model at θ, weights in float32 or better.
        batch: the rollouts whose tokens are scored again.
        scores: S at θ by this very policy, [N].
        step: Δθ.
        score_changes: dS_i = ∇S_i · Δθ, [N] (:func:`entropy_probe.gradients.response_dots`).
        progress: told of every forward of the numerical floor.

    Raises:
        InputError: the step is so large that a log-probability is not finite after it.
    """
    progress = progress if progress is not None else Silent()

    def scores_under(moves: Mapping[str, Tensor]) -> FloatArray:
        with virtual_step(policy.model, moves):
            found: FloatArray = policy.scores(batch.responses).numpy()
            return found

    scores_after = scores_under(step.deltas)
    if not np.isfinite(scores_after).all():
        raise InputError(
            f"after the {step.name} step a log-probability is {scores_after[~np.isfinite(scores_after)][0]}: the step leaves "
            "the range of the number type; give a smaller learning rate"
        )
    predicted = float(linear_weights(scores, batch.group_sizes) @ score_changes)
    floor = 0.0
    parameters = policy.trainable()
    generator = torch.Generator().manual_seed(0)
    for factor in progress.track(FLOOR_FACTORS, f"numerical floor, {step.name} step", len(FLOOR_FACTORS)):
        rounded = {name: factor * d + rounding_noise(parameters[name], generator) for name, d in step.deltas.items()}
        tiny = entropy_change(scores, scores_under(rounded), batch.group_sizes)
        floor = max(floor, abs(tiny.delta_h - factor * predicted))
    norm = float(torch.sqrt(sum((delta.double() ** 2).sum() for delta in step.deltas.values()) + torch.tensor(0.0)))
    change = entropy_change(scores, scores_after, batch.group_sizes)
    return RealizedChange(step.name, step.method, change, predicted, floor, norm)


def rounding_noise(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """One unit in the last place up or down in a twelfth of the elements, float64: the variance of rounding to nearest."""
    theta = parameter.detach()
    draws = torch.rand(theta.shape, generator=generator, dtype=torch.float64).to(theta.device)
    up = torch.nextafter(theta, torch.full_like(theta, torch.inf)).double() - theta.double()
    down = torch.nextafter(theta, torch.full_like(theta, -torch.inf)).double() - theta.double()
    return torch.where(draws < 1 / 24, up, torch.where(draws < 1 / 12, down, 0.0))
