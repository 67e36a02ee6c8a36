"""The step that AdamW or Adam takes from θ on the gradient of its loss, in parts that add up to it.

The step that δH₁ is about, η P Ȳ with v at t, is :meth:`~entropy_probe.optimizers.geometry.Geometry.step`. Here, with the loss
gradient g = −Ȳ (clipped), a parameter's own step t and its group's η, β₁, β₂, ε and λ,

    m⁺ = β₁ m + (1 − β₁) g      v⁺ = β₂ v + (1 − β₂) g²      D = √(v⁺ / (1 − β₂^{t+1})) + ε      κ = η / ((1 − β₁^{t+1}) D)
    Δθ = −κ β₁ m  [momentum]  − κ (1 − β₁) g  [fresh gradient]  − η λ θ  [weight decay]

Adam's coupled weight decay adds λ θ to g, so it enters v⁺, and its part is −κ (1 − β₁) λ θ. amsgrad puts the largest v so
far in v⁺'s place. Sources: docs/method.md, section 6; Kingma & Ba (2015); Loshchilov & Hutter (2019); Reddi et al. (2018);
torch.optim.Adam and AdamW, torch.nn.utils.clip_grad_norm_.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_probe.optimizers.clipping import clip_factor, gradient_norm
from entropy_probe.optimizers.state import AdamGroup, AdamMoments, AdamState
from entropy_probe.ranks.sharding import WHOLE, Sharding


@dataclass(frozen=True)
class AdamWStep:
    """Δθ of one optimizer step, in parts that add up to it, by parameter name, float64.

    Parameters without a gradient stay, weight decay included, and have no entry.

    Attributes:
        momentum: what the moments at t carry over.
        gradient: what this batch's gradient adds, clipped.
        weight_decay: decoupled, or through the gradient.
        gradient_norm: ‖Ȳ‖ over all parameters that have a gradient, before clipping.
        clip_factor: of the gradient; 1.0 without clipping.
    """

    momentum: Mapping[str, Tensor]
    gradient: Mapping[str, Tensor]
    weight_decay: Mapping[str, Tensor]
    gradient_norm: float
    clip_factor: float

    @property
    def deltas(self) -> dict[str, Tensor]:
        """Δθ, the sum of the parts."""
        return {name: self.momentum[name] + self.gradient[name] + self.weight_decay[name] for name in self.gradient}


def adamw_step(
    parameters: Mapping[str, Tensor],
    state: AdamState,
    ascent: Mapping[str, Tensor],
    *,
    max_grad_norm: float | None = None,
) -> AdamWStep:
    """The step of torch.optim.AdamW (or Adam, where a group's weight decay is coupled) on the loss gradient −Ȳ.

    ``maximize`` makes no difference: the optimizer is then given Ȳ and turns its sign itself. A parameter that the state does
    not have is at t = 0, with moments of zero.

    Args:
        parameters: the trainable parameters at θ, by name.
        state: the optimizer's groups and moments at t.
        ascent: Ȳ by name; parameters that no response reaches are absent.
        max_grad_norm: as of torch.nn.utils.clip_grad_norm_, over all of ``ascent``, before the moments; None does not clip.

    Raises:
        ValueError: ``max_grad_norm`` is not above 0.
    """
    norm = gradient_norm(ascent)
    factor = clip_factor(norm, max_grad_norm)
    found = {
        name: parameter_step(parameters[name], state.moments.get(name), group, ascent[name], factor)
        for name, group in state.group_of().items()
        if name in ascent and name in parameters
    }
    return AdamWStep(
        momentum={name: step.momentum for name, step in found.items()},
        gradient={name: step.gradient for name, step in found.items()},
        weight_decay={name: step.weight_decay for name, step in found.items()},
        gradient_norm=norm,
        clip_factor=factor,
    )


def adamw_deltas(
    parameters: Mapping[str, Tensor],
    state: AdamState,
    ascent: Mapping[str, Tensor],
    *,
    max_grad_norm: float | None = None,
    sharding: Sharding = WHOLE,
) -> dict[str, Tensor]:
    """Δθ of :func:`adamw_step` alone: its parts stand in memory for one parameter at a time. Of shards, this rank's."""
    factor = clip_factor(gradient_norm(ascent, sharding), max_grad_norm)
    found = {}
    for name, group in state.group_of().items():
        if name in ascent and name in parameters:
            found[name] = adamw_delta(parameters[name], state.moments.get(name), group, ascent[name], factor)
    return found


def adamw_delta(
    parameter: Tensor, moments: AdamMoments | None, group: AdamGroup, ascent: Tensor, clip_factor: float = 1.0
) -> Tensor:
    """Δθ of :func:`adamw_step` of one parameter, float64."""
    step = parameter_step(parameter, moments, group, ascent, clip_factor)
    return step.momentum + step.gradient + step.weight_decay


@dataclass(frozen=True)
class _ParameterStep:
    """The parts of one parameter's Δθ, and W with gradient = W Ȳ elementwise."""

    momentum: Tensor
    gradient: Tensor
    weight_decay: Tensor
    weight: Tensor


def parameter_step(
    parameter: Tensor,
    moments: AdamMoments | None,
    group: AdamGroup,
    ascent: Tensor,
    clip_factor: float,
) -> _ParameterStep:
    """The three parts of one parameter's step; zeros where it has no moments."""
    y = ascent.double()
    theta = parameter.detach().to(y)
    if moments is None:
        moments = AdamMoments(0, torch.zeros_like(theta), torch.zeros_like(theta))
    denominator = updated_root(moments, group, gradient_seen(theta, group, y, clip_factor)) + group.eps
    scale = group.learning_rate / (1.0 - group.beta1 ** (moments.step + 1)) / denominator
    weight = (1.0 - group.beta1) * clip_factor * scale
    decay = group.weight_decay * theta
    return _ParameterStep(
        momentum=-group.beta1 * scale * moments.exp_avg.to(y),
        gradient=weight * y,
        weight_decay=(
            -group.learning_rate * decay if group.decoupled_weight_decay else -(1.0 - group.beta1) * scale * decay
        ),
        weight=weight,
    )


def gradient_seen(theta: Tensor, group: AdamGroup, ascent: Tensor, clip_factor: float) -> Tensor:
    """The loss gradient that the moments see: clipped, with coupled weight decay."""
    return -clip_factor * ascent if group.decoupled_weight_decay else group.weight_decay * theta - clip_factor * ascent


def updated_root(moments: AdamMoments, group: AdamGroup, gradient: Tensor) -> Tensor:
    """√(v⁺ / (1 − β₂^{t+1})), v⁺ the largest so far under amsgrad."""
    v = group.beta2 * moments.exp_avg_sq.to(gradient) + (1.0 - group.beta2) * gradient**2
    if group.amsgrad and moments.max_exp_avg_sq is not None:
        v = torch.maximum(v, moments.max_exp_avg_sq.to(gradient))
    return (v / (1.0 - group.beta2 ** (moments.step + 1))).sqrt()
