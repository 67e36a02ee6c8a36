"""Steps that an optimizer would take from θ along a given ascent direction Ȳ.

``preconditioned_step`` is the step that δH₁ is about, Δθ = η P Ȳ with v at t. ``adamw_step`` is the trainer's own, in parts.
With the loss gradient g = −Ȳ (clipped), a parameter's own step t and its group's η, β₁, β₂, ε and λ,

    m⁺ = β₁ m + (1 − β₁) g      v⁺ = β₂ v + (1 − β₂) g²      D = √(v⁺ / (1 − β₂^{t+1})) + ε      κ = η / ((1 − β₁^{t+1}) D)
    Δθ = −κ β₁ m  [momentum]  − κ (1 − β₁) g  [fresh gradient]  − η λ θ  [weight decay]

Adam's coupled weight decay adds λ θ to g, so it enters v⁺, and its part is −κ (1 − β₁) λ θ. amsgrad puts the largest v so
far in v⁺'s place. ``optimizer_step`` lets torch.optim itself take the step, on clones: the check of ``adamw_step``. Sources:
guide section 4A; Kingma & Ba (2015); Loshchilov & Hutter (2019); Reddi et al. (2018); torch.optim.Adam and AdamW,
torch.nn.utils.clip_grad_norm_.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entropy_probe.adam_preconditioner import AdamGroup, AdamMoments, AdamState, preconditioner


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
    updated_v: bool = True,
) -> AdamWStep:
    """The step of torch.optim.AdamW (or Adam, where a group's weight decay is coupled) on the loss gradient −Ȳ.

    ``maximize`` makes no difference: the optimizer is then given Ȳ and turns its sign itself. A parameter that the state does
    not have is at t = 0, with moments of zero.

    Args:
        parameters: the trainable parameters at θ, by name.
        state: the optimizer's groups and moments at t.
        ascent: Ȳ by name; parameters that no response reaches are absent.
        max_grad_norm: as of torch.nn.utils.clip_grad_norm_, over all of ``ascent``, before the moments; None does not clip.
        updated_v: False keeps v at t in D, bias-corrected at t, as in δH₁'s P: to tell what this gradient's own v does.

    Raises:
        ValueError: ``max_grad_norm`` is not above 0; or t = 0 without ``updated_v``.
    """
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm is {max_grad_norm}; expected a number above 0, or None")
    norm = math.sqrt(sum(float((y.double() ** 2).sum()) for y in ascent.values()))
    # torch adds 1e-6, so that a norm of exactly max_grad_norm is clipped too, by a millionth.
    clip_factor = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
    parts: tuple[dict[str, Tensor], ...] = ({}, {}, {})
    for name, group in state.group_of().items():
        if name not in ascent or name not in parameters:
            continue
        y = ascent[name].double()
        theta = parameters[name].detach().to(y)
        moments = state.moments.get(name) or AdamMoments(0, torch.zeros_like(y), torch.zeros_like(y))
        gradient = -clip_factor * y
        decay = group.weight_decay * theta
        seen = gradient if group.decoupled_weight_decay else gradient + decay
        denominator = (
            _updated_denominator(moments, group, seen)
            if updated_v
            else preconditioner(moments, group).to(y).reciprocal()
        )
        rate = group.learning_rate / (1.0 - group.beta1 ** (moments.step + 1))
        scale = -rate / denominator
        parts[0][name] = scale * (group.beta1 * moments.exp_avg.to(y))
        parts[1][name] = scale * ((1.0 - group.beta1) * gradient)
        parts[2][name] = (
            -group.learning_rate * decay if group.decoupled_weight_decay else scale * ((1.0 - group.beta1) * decay)
        )
    return AdamWStep(*parts, norm, clip_factor)


def _updated_denominator(moments: AdamMoments, group: AdamGroup, gradient: Tensor) -> Tensor:
    """√(v⁺ / (1 − β₂^{t+1})) + ε of one parameter."""
    v = group.beta2 * moments.exp_avg_sq.to(gradient) + (1.0 - group.beta2) * gradient**2
    if group.amsgrad and moments.max_exp_avg_sq is not None:
        v = torch.maximum(v, moments.max_exp_avg_sq.to(gradient))
    return (v / (1.0 - group.beta2 ** (moments.step + 1))).sqrt_().add_(group.eps)


def preconditioned_step(
    ascent: Mapping[str, Tensor], preconditioners: Mapping[str, Tensor], learning_rates: Mapping[str, float]
) -> dict[str, Tensor]:
    """Δθ = η P Ȳ by parameter name, float64."""
    return {name: learning_rates[name] * preconditioners[name].to(y.device) * y.double() for name, y in ascent.items()}


def optimizer_step(
    parameters: Mapping[str, nn.Parameter], state: AdamState, ascent: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Δθ, float64, of one real ``torch.optim`` step on the loss gradient −Ȳ from the given state; no gradient clipping.

    The step is taken on clones of the parameters and of the state, which are left alone. Groups whose weight decay is
    decoupled are stepped by AdamW, the others by Adam. Parameters that no response reaches have no gradient and stay, as in
    training. (A deep copy of the whole model would not do: a trainer may have bound a patched forward to the original.)

    Args:
        parameters: the trainable parameters at θ, by name.
        state: of every one of them.
        ascent: Ȳ by name.
    """
    deltas: dict[str, Tensor] = {}
    for group in state.groups:
        # A parameter frozen since the state was taken has no gradient, and the optimizer would pass it by.
        clones = {n: nn.Parameter(parameters[n].detach().clone()) for n in group.names if n in parameters}
        if not clones:
            continue
        optimizer_class = torch.optim.AdamW if group.decoupled_weight_decay else torch.optim.Adam
        optimizer = optimizer_class(
            list(clones.values()),
            lr=group.learning_rate,
            betas=(group.beta1, group.beta2),
            eps=group.eps,
            weight_decay=group.weight_decay,
            amsgrad=group.amsgrad,
            maximize=group.maximize,
        )
        for name, clone in clones.items():
            moments = state.moments[name]
            entry = {
                "step": torch.tensor(float(moments.step)),
                "exp_avg": moments.exp_avg.to(clone, copy=True),
                "exp_avg_sq": moments.exp_avg_sq.to(clone, copy=True),
            }
            if group.amsgrad and moments.max_exp_avg_sq is not None:
                entry["max_exp_avg_sq"] = moments.max_exp_avg_sq.to(clone, copy=True)
            optimizer.state[clone] = entry
            if name in ascent:
                # Under maximize the optimizer ascends what it is given.
                sign = 1.0 if group.maximize else -1.0
                clone.grad = (sign * ascent[name]).to(clone)
        optimizer.step()
        for name, clone in clones.items():
            deltas[name] = clone.detach().double() - parameters[name].detach().double()
    return deltas
