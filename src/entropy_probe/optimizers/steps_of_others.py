"""Each unit meets the step as the other units' mean would make it.

With B = Σ s_u prompts in all, the others' mean is Ȳ_−u = (B Ȳ − YS_u) / (B − s_u). XS_u is contracted with the parts of the
step from it (:mod:`~entropy_probe.optimizers.adamw_step`). v⁺ holds the square of the gradient g, so each unit has a
denominator of its own; what else is in the parts is computed once:

    g_−u = −clip · Ȳ_−u  [+ λ θ, coupled]      D_−u = √((β₂ v + (1 − β₂) g_−u²) / (1 − β₂^{t+1})) + ε

The gradient's part W Ȳ, with W = η (1 − β₁) clip / ((1 − β₁^{t+1}) D), answers to Ȳ elementwise by J:

    J = ∂(W Ȳ)/∂Ȳ = W + W Ȳ · clip · ∂ log D/∂g, since ∂g/∂Ȳ = −clip
    ∂ log D/∂g = (1 − β₂) g / ((1 − β₂^{t+1}) (D − ε) D), and 0 where amsgrad's earlier maximum is the larger

Where the loss has several terms, Ȳ = Σ_k Ȳᵏ, and a term's share of the gradient's part is W Ȳᵏ with the W of the whole Ȳ: all
terms share one v⁺. Shares add up to the part. One answers to Ȳᵏ by W and, with Ȳᵏ held, to Ȳ by W Ȳᵏ · clip · ∂ log D/∂g.

Source: docs/method.md, section 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from entropy_probe.optimizers.adamw_step import gradient_seen, parameter_step, updated_root
from entropy_probe.optimizers.preconditioner import ZeroV, preconditioner
from entropy_probe.optimizers.state import AdamGroup, AdamMoments, AdamState


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
        terms: of terms of the loss, the Ȳᵏ that Ȳ holds, by name.
    """

    parameters: Mapping[str, Tensor]
    state: AdamState
    ascent: Mapping[str, Tensor]
    clip_factor: float
    sizes: Sequence[int]
    zero_v: ZeroV = ZeroV.LEAVE_OUT
    terms: Sequence[Mapping[str, Tensor]] = ()

    @property
    def count(self) -> int:
        """Of the numbers that :meth:`along` gives a unit."""
        return 6 + 2 * len(self.terms)

    def along(
        self, name: str, part: slice, x: Tensor, y: Tensor, units: Sequence[int], terms: Sequence[Tensor] = ()
    ) -> Tensor:
        """What elements ``part`` of one parameter laid flat add to XS_u · part: float64 [units, 6 + 2 terms].

        Momentum, fresh gradient and weight decay with v at t + 1, then the same with v at t; then the terms' shares of the
        fresh gradient's part with v at t + 1, and with v at t.

        The same numbers as :func:`adamw_step` from each Ȳ_−u, with what does not depend on the unit taken out of them.

        Args:
            name: the parameter.
            part: of its elements.
            x: XS_u there, [units, elements], float32 or float64: the arithmetic is in its type.
            y: YS_u there.
            units: which these are.
            terms: YᵏS_u there, of every term.
        """
        theta, moments, group, mean = self._elements(name, part)
        own = torch.tensor([self.sizes[unit] for unit in units], dtype=x.dtype, device=x.device)[:, None]
        prompts = float(sum(self.sizes))

        def without_own(of_all: Tensor, of_unit: Tensor) -> Tensor:
            return (prompts * of_all.to(x) - of_unit) / (prompts - own)

        others = without_own(mean, y)
        of_terms = [
            without_own(ascent[name].flatten()[part].double(), of_unit)
            for ascent, of_unit in zip(self.terms, terms, strict=True)
        ]
        p = preconditioner(moments, group, self.zero_v).to(mean)
        fixed = _fixed_factors(theta.to(mean), moments, group, self.clip_factor, p)
        seen = others * -self.clip_factor
        if not group.decoupled_weight_decay:
            seen += fixed.decay.to(x)
        # √(v⁺ / (1 − β₂^{t+1})) + ε of every unit, in place: fresh memory costs more than the arithmetic.
        denominator = torch.addcmul(fixed.kept_v.to(x), seen, seen, value=fixed.fresh_v)
        if fixed.largest_v is not None:
            denominator = torch.maximum(denominator, fixed.largest_v.to(x))
        of_x = torch.div(x, denominator.sqrt_().add_(group.eps), out=denominator)
        by_t = [x @ part.to(x) for part in (fixed.momentum_t, fixed.decay_t)]
        momentum = of_x @ fixed.momentum.to(x)
        decay = by_t[1] if fixed.decay_part is None else of_x @ fixed.decay_part.to(x)
        shares = [(of_x * of_term).sum(1) * fixed.gradient for of_term in of_terms]
        gradient = of_x.mul_(others).sum(1) * fixed.gradient
        gradient_t = torch.mul(x, others, out=seen) @ fixed.gradient_t.to(x)
        shares += [torch.mul(x, of_term, out=seen) @ fixed.gradient_t.to(x) for of_term in of_terms]
        dots = (momentum, gradient, decay, by_t[0], gradient_t, by_t[1], *shares)
        return torch.stack([dot.double() for dot in dots], dim=1)

    def response(self, name: str, part: slice) -> Tensor:
        """J = ∂(fresh gradient's part)/∂Ȳ at Ȳ, elementwise, with what Ȳ does to v⁺: float64 [elements]."""
        mean, weight, slope = self._weight_and_slope(name, part)
        return weight + weight * mean * self.clip_factor * slope

    def term_responses(self, name: str, part: slice) -> list[tuple[Tensor, Tensor]]:
        """W, and Ȳᵏ ∂W/∂Ȳ, of every term: float64 [elements] each."""
        _, weight, slope = self._weight_and_slope(name, part)
        means = [ascent[name].flatten()[part].double() for ascent in self.terms]
        return [(weight, weight * mean * self.clip_factor * slope) for mean in means]

    def _weight_and_slope(self, name: str, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Ȳ, W and ∂ log D/∂g."""
        theta, moments, group, mean = self._elements(name, part)
        step = parameter_step(theta, moments, group, mean, self.clip_factor)
        seen = gradient_seen(theta.to(mean), group, mean, self.clip_factor)
        return mean, step.weight, _log_denominator_slope(moments, group, seen)

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


def _log_denominator_slope(moments: AdamMoments, group: AdamGroup, gradient: Tensor) -> Tensor:
    """∂ log D / ∂g of one parameter."""
    root = updated_root(moments, group, gradient)
    slope = (1.0 - group.beta2) * gradient / (1.0 - group.beta2 ** (moments.step + 1))
    if group.amsgrad and moments.max_exp_avg_sq is not None:
        plain = updated_root(replace(moments, max_exp_avg_sq=None), group, gradient)
        slope = torch.where(root > plain, 0.0, slope)
    return torch.where(root > 0, slope / root, 0.0) / (root + group.eps)
