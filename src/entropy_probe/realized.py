"""The realised entropy change: take the step, score the same responses again, compare with the linear prediction.

Two steps are realised, each beside its own prediction: the preconditioned-gradient step that δH₁ describes, virtually on
the live model, and the optimizer's real step, on clones of its parameters. The numerical floor says below which size a ΔH
is rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entropy_probe.adam_preconditioner import AdamState
from entropy_probe.adam_step import optimizer_step, preconditioned_step
from entropy_probe.errors import InputError
from entropy_probe.importance_sampling import EntropyChange, entropy_change
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


def realize_preconditioned_step(
    policy: Policy,
    batch: RolloutBatch,
    scores: FloatArray,
    linear: Mapping[str, Tensor],
    ascent: Mapping[str, Tensor],
    preconditioners: Mapping[str, Tensor],
    learning_rates: Mapping[str, float],
    *,
    progress: Progress | None = None,
) -> RealizedChange:
    """Δθ = η P Ȳ as a virtual step on the live model, which is itself again afterwards, bit for bit.

    Args:
        policy: the model at θ, weights in float32 or better.
        batch: the rollouts whose tokens are scored again.
        scores: S at θ by this very policy, [N].
        linear: ∇ Σ p_i S_i by name (:func:`entropy_probe.importance_sampling.linear_weights`).
        ascent: Ȳ by name.
        preconditioners: P by name.
        learning_rates: η by name.
        progress: told of every forward of the numerical floor.

    Raises:
        InputError: the step is so large that a log-probability is not finite after it.
    """
    deltas = preconditioned_step(ascent, preconditioners, learning_rates)
    return _realize("preconditioned", "virtual", policy, batch, scores, linear, deltas, progress)


def realize_optimizer_step(
    policy: Policy,
    batch: RolloutBatch,
    scores: FloatArray,
    linear: Mapping[str, Tensor],
    ascent: Mapping[str, Tensor],
    state: AdamState,
    *,
    progress: Progress | None = None,
) -> RealizedChange:
    """A real ``torch.optim`` step (momentum, fresh gradient, weight decay; no clipping), taken on clones of the parameters.

    The responses are scored under it on the live model, as a virtual step, which rounds to the clones' very values.

    Raises:
        InputError: the step is so large that a log-probability is not finite after it.
    """
    deltas = optimizer_step(policy.trainable(), state, ascent)
    return _realize("adamw", "clone", policy, batch, scores, linear, deltas, progress)


def _realize(
    step: str,
    method: str,
    policy: Policy,
    batch: RolloutBatch,
    scores: FloatArray,
    linear: Mapping[str, Tensor],
    deltas: Mapping[str, Tensor],
    progress: Progress | None,
) -> RealizedChange:
    progress = progress if progress is not None else Silent()

    def scores_under(moves: Mapping[str, Tensor]) -> FloatArray:
        with virtual_step(policy.model, moves):
            found: FloatArray = policy.scores(batch.responses).numpy()
            return found

    scores_after = scores_under(deltas)
    if not np.isfinite(scores_after).all():
        raise InputError(
            f"after the {step} step a log-probability is {scores_after[~np.isfinite(scores_after)][0]}: the step leaves the "
            "range of the number type; give a smaller learning rate"
        )
    predicted = directional_derivative(linear, deltas)
    floor = 0.0
    parameters = policy.trainable()
    generator = torch.Generator().manual_seed(0)
    for factor in progress.track(FLOOR_FACTORS, f"numerical floor, {step} step", len(FLOOR_FACTORS)):
        rounded = {name: factor * d + rounding_noise(parameters[name], generator) for name, d in deltas.items()}
        tiny = entropy_change(scores, scores_under(rounded), batch.group_sizes)
        floor = max(floor, abs(tiny.delta_h - factor * predicted))
    norm = float(torch.sqrt(sum((delta.double() ** 2).sum() for delta in deltas.values()) + torch.tensor(0.0)))
    change = entropy_change(scores, scores_after, batch.group_sizes)
    return RealizedChange(step, method, change, predicted, floor, norm)


def rounding_noise(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """One unit in the last place up or down in a twelfth of the elements, float64: the variance of rounding to nearest."""
    theta = parameter.detach()
    draws = torch.rand(theta.shape, generator=generator, dtype=torch.float64).to(theta.device)
    up = torch.nextafter(theta, torch.full_like(theta, torch.inf)).double() - theta.double()
    down = torch.nextafter(theta, torch.full_like(theta, -torch.inf)).double() - theta.double()
    return torch.where(draws < 1 / 24, up, torch.where(draws < 1 / 12, down, 0.0))


def directional_derivative(gradient: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> float:
    """Σ over parameters of ∇ · Δθ in float64; a parameter that either side lacks contributes nothing."""
    return sum(
        float((gradient[name].double() * delta.double()).sum()) for name, delta in deltas.items() if name in gradient
    )
