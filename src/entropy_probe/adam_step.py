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
from dataclasses import dataclass, replace
from functools import cached_property

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
    norm = gradient_norm(ascent)
    factor = clip_factor(norm, max_grad_norm)
    found = {
        name: _parameter_step(
            parameters[name], state.moments.get(name), group, ascent[name], factor, updated_v=updated_v
        )
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


def gradient_norm(ascent: Mapping[str, Tensor]) -> float:
    """‖Ȳ‖, L2 over all parameters that have a gradient."""
    return math.sqrt(sum(float((y.double() ** 2).sum()) for y in ascent.values()))


def clip_factor(norm: float, max_grad_norm: float | None) -> float:
    """What torch.nn.utils.clip_grad_norm_ multiplies a gradient of this norm with; 1.0 without a limit.

    Raises:
        ValueError: ``max_grad_norm`` is not above 0.
    """
    if max_grad_norm is None:
        return 1.0
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm is {max_grad_norm}; expected a number above 0, or None")
    # As torch has it: a norm of exactly max_grad_norm is clipped too, by a trace.
    return min(1.0, max_grad_norm / (norm + 1e-6))


@dataclass(frozen=True)
class StepDirections:
    """Directions and weights of one AdamW step, some elements at a time: its parts never stand in memory whole.

    Attributes:
        parameters: the trainable parameters at θ.
        state: the optimizer's.
        ascent: Ȳ by name.
        clip_factor: of the gradient.
    """

    parameters: Mapping[str, Tensor]
    state: AdamState
    ascent: Mapping[str, Tensor]
    clip_factor: float

    def of(self, name: str, part: slice) -> tuple[Tensor, Tensor]:
        """Of elements ``part`` of one parameter laid flat, float64.

        J_k = ∂(part k)/∂Ȳ, elementwise, the factor of clipping held: what is in a part of one prompt's own gradient.

        Returns:
            [9, elements]: momentum, fresh gradient and weight decay with v at t + 1; the same with v at t; J_k Ȳ of the first
            three; and [4, elements]: J_k of the first three, and that of the fresh gradient with v at t.
        """
        moments = self.state.moments[name]
        largest = moments.max_exp_avg_sq
        moments = replace(
            moments,
            exp_avg=moments.exp_avg.flatten()[part],
            exp_avg_sq=moments.exp_avg_sq.flatten()[part],
            max_exp_avg_sq=None if largest is None else largest.flatten()[part],
        )
        theta, y = self.parameters[name].detach().flatten()[part], self.ascent[name].flatten()[part]
        updated, at_t = (
            _parameter_step(theta, moments, self._groups[name], y, self.clip_factor, updated_v=updated_v)
            for updated_v in (True, False)
        )
        responses = [updated.momentum * updated.of_v, updated.weight + updated.gradient * updated.of_v]
        decoupled = self._groups[name].decoupled_weight_decay
        responses.append(torch.zeros_like(updated.of_v) if decoupled else updated.weight_decay * updated.of_v)
        directions = [part for step in (updated, at_t) for part in (step.momentum, step.gradient, step.weight_decay)]
        directions += [response * y.double() for response in responses]
        return torch.stack(directions), torch.stack([*responses, at_t.weight])

    @cached_property
    def _groups(self) -> Mapping[str, AdamGroup]:
        return self.state.group_of()


@dataclass(frozen=True)
class _ParameterStep:
    """The parts of one parameter's Δθ; W with gradient = W Ȳ elementwise; ∂ log(1/D)/∂Ȳ, what Ȳ does to a part through v⁺."""

    momentum: Tensor
    gradient: Tensor
    weight_decay: Tensor
    weight: Tensor
    of_v: Tensor


def _parameter_step(
    parameter: Tensor,
    moments: AdamMoments | None,
    group: AdamGroup,
    ascent: Tensor,
    clip_factor: float,
    *,
    updated_v: bool,
) -> _ParameterStep:
    y = ascent.double()
    theta = parameter.detach().to(y)
    if moments is None:
        moments = AdamMoments(0, torch.zeros_like(y), torch.zeros_like(y))
    decay = group.weight_decay * theta
    seen = -clip_factor * y if group.decoupled_weight_decay else decay - clip_factor * y
    if updated_v:
        denominator, slope = _updated_denominator(moments, group, seen)
    else:
        denominator, slope = preconditioner(moments, group).to(y).reciprocal(), torch.zeros_like(y)
    scale = group.learning_rate / (1.0 - group.beta1 ** (moments.step + 1)) / denominator
    weight = (1.0 - group.beta1) * clip_factor * scale
    return _ParameterStep(
        momentum=-group.beta1 * scale * moments.exp_avg.to(y),
        gradient=weight * y,
        weight_decay=(
            -group.learning_rate * decay if group.decoupled_weight_decay else -(1.0 - group.beta1) * scale * decay
        ),
        weight=weight,
        of_v=clip_factor * slope / denominator,
    )


def _updated_denominator(moments: AdamMoments, group: AdamGroup, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """D = √(v⁺ / (1 − β₂^{t+1})) + ε of one parameter, and ∂D/∂g."""
    correction = 1.0 - group.beta2 ** (moments.step + 1)
    v = group.beta2 * moments.exp_avg_sq.to(gradient) + (1.0 - group.beta2) * gradient**2
    slope = (1.0 - group.beta2) * gradient / correction
    if group.amsgrad and moments.max_exp_avg_sq is not None:
        largest = moments.max_exp_avg_sq.to(gradient)
        slope = torch.where(largest > v, 0.0, slope)
        v = torch.maximum(v, largest)
    root = (v / correction).sqrt()
    return root + group.eps, torch.where(root > 0, slope / root, 0.0)


def gradient_factors(state: AdamState) -> dict[float, float] | None:
    """(1 − β₁) / (1 − β₁^{t+1}), the share of the fresh gradient in the step, by learning rate.

    None where parameters of one learning rate differ in it: their dots are not told apart.
    """
    found: dict[float, float] = {}
    for name, group in state.group_of().items():
        factor = (1.0 - group.beta1) / (1.0 - group.beta1 ** (state.moments[name].step + 1))
        if not math.isclose(found.setdefault(group.learning_rate, factor), factor, rel_tol=1e-9):
            return None
    return found


def gradient_weights(state: AdamState, clip_factor: float) -> dict[float, float] | None:
    """By learning rate η, the weight η (1 − β₁) / (1 − β₁^{t+1}) · clip of P Ȳ in the step with v at t; None as above."""
    factors = gradient_factors(state)
    return None if factors is None else {rate: rate * factor * clip_factor for rate, factor in factors.items()}


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
