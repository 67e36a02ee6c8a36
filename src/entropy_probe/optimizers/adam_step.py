"""Steps that an optimizer would take from θ along a given ascent direction Ȳ.

``preconditioned_step`` is the step that δH₁ is about, Δθ = η P Ȳ with v at t. ``adamw_step`` is the trainer's own, in parts.
With the loss gradient g = −Ȳ (clipped), a parameter's own step t and its group's η, β₁, β₂, ε and λ,

    m⁺ = β₁ m + (1 − β₁) g      v⁺ = β₂ v + (1 − β₂) g²      D = √(v⁺ / (1 − β₂^{t+1})) + ε      κ = η / ((1 − β₁^{t+1}) D)
    Δθ = −κ β₁ m  [momentum]  − κ (1 − β₁) g  [fresh gradient]  − η λ θ  [weight decay]

Adam's coupled weight decay adds λ θ to g, so it enters v⁺, and its part is −κ (1 − β₁) λ θ. amsgrad puts the largest v so
far in v⁺'s place. Sources: docs/method.md, section 6; Kingma & Ba (2015); Loshchilov & Hutter (2019); Reddi et al. (2018);
torch.optim.Adam and AdamW, torch.nn.utils.clip_grad_norm_.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from entropy_probe.optimizers.adam_preconditioner import AdamGroup, AdamMoments, AdamState, ZeroV, preconditioner
from entropy_probe.ranks.collectives import WHOLE, Sharding


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
        name: _parameter_step(parameters[name], state.moments.get(name), group, ascent[name], factor)
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


def gradient_norm(ascent: Mapping[str, Tensor], sharding: Sharding = WHOLE) -> float:
    """‖Ȳ‖, L2 over all parameters that have a gradient; of shards, over those of all ranks."""
    return math.sqrt(sharding.total(sum(float((y.double() ** 2).sum()) for y in ascent.values())))


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
    step = _parameter_step(parameter, moments, group, ascent, clip_factor)
    return step.momentum + step.gradient + step.weight_decay


@dataclass(frozen=True)
class StepsOfOthers:
    """The step's parts as they would be from the other units' mean update, Ȳ_−u = (B Ȳ − YS_u) / (B − s_u), elementwise.

    Some elements at a time, so that parts never stand in memory whole. Clipping's factor is that of the whole batch.

    Attributes:
        parameters: the trainable parameters at θ.
        state: the optimizer's.
        ascent: Ȳ by name.
        clip_factor: of the gradient.
        sizes: s_u, prompts of every unit.
        zero_v: P where v at t is 0, for what is told with v at t.
        count: of the numbers that :meth:`along` gives a unit.
    """

    parameters: Mapping[str, Tensor]
    state: AdamState
    ascent: Mapping[str, Tensor]
    clip_factor: float
    sizes: Sequence[int]
    zero_v: ZeroV = ZeroV.LEAVE_OUT
    count: int = 6

    def along(self, name: str, part: slice, x: Tensor, y: Tensor, units: Sequence[int]) -> Tensor:
        """What elements ``part`` of one parameter laid flat add to XS_u · part: float64 [units, 6].

        Momentum, fresh gradient and weight decay with v at t + 1, then the same with v at t.

        The same numbers as :func:`adamw_step` from each Ȳ_−u, with what does not depend on the unit taken out of them.

        Args:
            name: the parameter.
            part: of its elements.
            x: XS_u there, [units, elements], float32 or float64: the arithmetic is in its type.
            y: YS_u there.
            units: which these are.
        """
        theta, moments, group, mean = self._elements(name, part)
        own = torch.tensor([self.sizes[unit] for unit in units], dtype=x.dtype, device=x.device)[:, None]
        prompts = float(sum(self.sizes))
        others = (prompts * mean.to(x) - y) / (prompts - own)
        p = preconditioner(moments, group, self.zero_v).to(mean)
        fixed = _fixed_factors(theta.to(mean), moments, group, self.clip_factor, p)
        seen = others * -self.clip_factor
        if not group.decoupled_weight_decay:
            seen += fixed.decay.to(x)
        # √(v⁺ / (1 − β₂^{t+1})) + ε of every unit, in place: memory that is made anew costs more than the arithmetic.
        denominator = torch.addcmul(fixed.kept_v.to(x), seen, seen, value=fixed.fresh_v)
        if fixed.largest_v is not None:
            denominator = torch.maximum(denominator, fixed.largest_v.to(x))
        of_x = torch.div(x, denominator.sqrt_().add_(group.eps), out=denominator)
        by_t = [x @ part.to(x) for part in (fixed.momentum_t, fixed.decay_t)]
        momentum = of_x @ fixed.momentum.to(x)
        decay = by_t[1] if fixed.decay_part is None else of_x @ fixed.decay_part.to(x)
        gradient = of_x.mul_(others).sum(1) * fixed.gradient
        gradient_t = torch.mul(x, others, out=seen) @ fixed.gradient_t.to(x)
        dots = (momentum, gradient, decay, by_t[0], gradient_t, by_t[1])
        return torch.stack([dot.double() for dot in dots], dim=1)

    def response(self, name: str, part: slice) -> Tensor:
        """J = ∂(fresh gradient's part)/∂Ȳ at Ȳ, elementwise, with what Ȳ does to v⁺: float64 [elements]."""
        theta, moments, group, mean = self._elements(name, part)
        step = _parameter_step(theta, moments, group, mean, self.clip_factor)
        seen = _seen(theta.to(mean), group, mean, self.clip_factor)
        return step.weight + step.gradient * self.clip_factor * _log_denominator_slope(moments, group, seen)

    def _elements(self, name: str, part: slice) -> tuple[Tensor, AdamMoments, AdamGroup, Tensor]:
        moments = self.state.moments[name]
        largest = moments.max_exp_avg_sq
        of_part = replace(
            moments,
            exp_avg=moments.exp_avg.flatten()[part],
            exp_avg_sq=moments.exp_avg_sq.flatten()[part],
            max_exp_avg_sq=None if largest is None else largest.flatten()[part],
        )
        theta, mean = self.parameters[name].detach().flatten()[part], self.ascent[name].flatten()[part].double()
        return theta, of_part, self._groups[name], mean

    @cached_property
    def _groups(self) -> Mapping[str, AdamGroup]:
        return self.state.group_of()


@dataclass(frozen=True)
class _FixedFactors:
    """What of one parameter's parts does not depend on the update, [elements] or one number.

    With v⁺ / (1 − β₂^{t+1}) = ``kept_v`` + ``fresh_v`` g² (``largest_v`` at least) and D its root plus ε, the parts are
    ``momentum`` / D, ``gradient`` Ȳ / D and ``decay_part`` / D, or ``decay_t`` where decay is decoupled; ``_t``: with v at t.
    """

    decay: Tensor
    kept_v: Tensor
    fresh_v: float
    largest_v: Tensor | None
    momentum: Tensor
    gradient: float
    decay_part: Tensor | None
    momentum_t: Tensor
    gradient_t: Tensor
    decay_t: Tensor


def _fixed_factors(
    theta: Tensor, moments: AdamMoments, group: AdamGroup, clip_factor: float, p: Tensor
) -> _FixedFactors:
    correction = 1.0 - group.beta2 ** (moments.step + 1)
    scale = group.learning_rate / (1.0 - group.beta1 ** (moments.step + 1))
    decay = group.weight_decay * theta
    coupled = None if group.decoupled_weight_decay else -(1.0 - group.beta1) * scale * decay
    momentum = -group.beta1 * scale * moments.exp_avg.to(theta)
    largest = moments.max_exp_avg_sq if group.amsgrad else None
    return _FixedFactors(
        decay=decay,
        kept_v=group.beta2 * moments.exp_avg_sq.to(theta) / correction,
        fresh_v=(1.0 - group.beta2) / correction,
        largest_v=None if largest is None else largest.to(theta) / correction,
        momentum=momentum,
        gradient=(1.0 - group.beta1) * clip_factor * scale,
        decay_part=coupled,
        momentum_t=momentum * p,
        gradient_t=(1.0 - group.beta1) * clip_factor * scale * p,
        decay_t=-group.learning_rate * decay if coupled is None else coupled * p,
    )


@dataclass(frozen=True)
class _ParameterStep:
    """The parts of one parameter's Δθ, and W with gradient = W Ȳ elementwise."""

    momentum: Tensor
    gradient: Tensor
    weight_decay: Tensor
    weight: Tensor


def _parameter_step(
    parameter: Tensor,
    moments: AdamMoments | None,
    group: AdamGroup,
    ascent: Tensor,
    clip_factor: float,
) -> _ParameterStep:
    y = ascent.double()
    theta = parameter.detach().to(y)
    if moments is None:
        moments = AdamMoments(0, torch.zeros_like(theta), torch.zeros_like(theta))
    denominator = _updated_root(moments, group, _seen(theta, group, y, clip_factor)) + group.eps
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


def _seen(theta: Tensor, group: AdamGroup, ascent: Tensor, clip_factor: float) -> Tensor:
    """The loss gradient that the moments see: clipped, with coupled weight decay."""
    return -clip_factor * ascent if group.decoupled_weight_decay else group.weight_decay * theta - clip_factor * ascent


def _updated_root(moments: AdamMoments, group: AdamGroup, gradient: Tensor) -> Tensor:
    """√(v⁺ / (1 − β₂^{t+1})), v⁺ the largest so far under amsgrad."""
    v = group.beta2 * moments.exp_avg_sq.to(gradient) + (1.0 - group.beta2) * gradient**2
    if group.amsgrad and moments.max_exp_avg_sq is not None:
        v = torch.maximum(v, moments.max_exp_avg_sq.to(gradient))
    return (v / (1.0 - group.beta2 ** (moments.step + 1))).sqrt()


def _log_denominator_slope(moments: AdamMoments, group: AdamGroup, gradient: Tensor) -> Tensor:
    """∂ log D / ∂g of one parameter."""
    root = _updated_root(moments, group, gradient)
    slope = (1.0 - group.beta2) * gradient / (1.0 - group.beta2 ** (moments.step + 1))
    if group.amsgrad and moments.max_exp_avg_sq is not None:
        plain = _updated_root(replace(moments, max_exp_avg_sq=None), group, gradient)
        slope = torch.where(root > plain, 0.0, slope)
    return torch.where(root > 0, slope / root, 0.0) / (root + group.eps)


def gradient_factors(state: AdamState, names: Collection[str]) -> dict[float, float] | None:
    """(1 − β₁) / (1 − β₁^{t+1}), the share of the fresh gradient in the step, by learning rate, of parameters with a gradient.

    None where parameters of one learning rate differ in it: their dots are not told apart.
    """
    found: dict[float, float] = {}
    for name, group in state.group_of().items():
        if name not in names:
            continue
        factor = (1.0 - group.beta1) / (1.0 - group.beta1 ** (state.moments[name].step + 1))
        if not math.isclose(found.setdefault(group.learning_rate, factor), factor, rel_tol=1e-9):
            return None
    return found


def spread_factors(state: AdamState, names: Collection[str], clip_factor: float) -> list[float]:
    """clip · Σ_k (1 − β₁) β₁^k / (1 − β₁^{t+1+k}) over k ≥ 0, the distinct ones of parameters with a gradient.

    At step t + k the optimizer gives this batch's gradient the weight of term k. So the preconditioned step η P Ȳ, times this,
    is what the batch does in all, over the steps to come, as long as P and the policy hold still.
    """
    groups = state.group_of()
    ages = dict.fromkeys((group.beta1, state.moments[name].step) for name, group in groups.items() if name in names)
    return [clip_factor * _sum_of_weights(beta1, step) for beta1, step in ages]


def _sum_of_weights(beta1: float, step: int) -> float:
    """Σ_{k≥0} (1 − β) β^k / (1 − β^{t+1+k}), to a relative 1e-12.

    Each term is a geometric series in β^{t+1+k}; summed over k first, they are Σ_{j≥0} β^{j(t+1)} (1 − β) / (1 − β^{j+1}),
    which needs few terms late in a run. What is left after J of them is at most
    β^{J(t+1)} / (1 − β^{t+1}) · (1 − β) / (1 − β^{J+1}).
    """
    ratio = beta1 ** (step + 1)
    total, first, chunk = 0.0, 0, 4096
    while True:
        j = np.arange(first, first + chunk, dtype=np.float64)
        total += float((ratio**j * (1.0 - beta1) / (1.0 - beta1 ** (j + 1.0))).sum())
        first += chunk
        rest = ratio**first / (1.0 - ratio) * (1.0 - beta1) / (1.0 - beta1 ** (first + 1))
        if rest <= 1e-12 * total:
            return total
        chunk = min(2 * chunk, 1 << 20)


def gradient_weights(state: AdamState, names: Collection[str], clip_factor: float) -> dict[float, float] | None:
    """By learning rate η, the weight η (1 − β₁) / (1 − β₁^{t+1}) · clip of P Ȳ in the step with v at t; None as above."""
    factors = gradient_factors(state, names)
    return None if factors is None else {rate: rate * factor * clip_factor for rate, factor in factors.items()}


def preconditioned_step(
    ascent: Mapping[str, Tensor], preconditioners: Mapping[str, Tensor], learning_rates: Mapping[str, float]
) -> dict[str, Tensor]:
    """Δθ = η P Ȳ by parameter name, float64."""
    return {name: learning_rates[name] * preconditioners[name].to(y.device) * y.double() for name, y in ascent.items()}
