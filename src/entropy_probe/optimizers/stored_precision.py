"""What becomes of a step where the optimizer holds the weights in bfloat16 or float16 and keeps no float32 copy of them.

A weight moves only if its update reaches half the distance to its neighbour, so most small updates are lost. torch's Adam and
AdamW keep moments in the parameter's own type: moments in a narrow type, of weights that hold nothing wider, say that no
float32 copy was there. bitsandbytes and torchao keep moments in types of their own and never a copy of the weights: there the
weights alone say it. With rd the rounding to that type, θ⁺ is

    fused kernel, bitsandbytes, torchao    rd(θ + Δθ), Δθ in float32, to nearest
    else                                   every operation of the step rounded to nearest
    stochastic                             θ + Δθ, Δθ in float32, rounded up or down with E[θ⁺] = θ + Δθ

Sources: torch.optim.AdamW and its fused kernel, whose arithmetic is float32, as is that of bitsandbytes and torchao; torchao's
bf16_stochastic_round; IEEE 754.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from entropy_probe.optimizers.state import AdamGroup, AdamMoments, Library

STORAGE_TYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Narrowest first; whatever none of them holds is float64."""

NARROW_TYPES = (torch.bfloat16, torch.float16)
"""Types of weights in which a small update is lost."""


class Rounding(StrEnum):
    """How an optimizer rounds the weights that it holds in bfloat16 or float16 without a float32 copy.

    ``nearest``: an update below half the distance to the next number is lost, as in torch's own AdamW. ``stochastic``: rounded
    up or down at random with E[θ⁺] = θ + Δθ, as in torchao's. A checkpoint does not say which.

    Example:
        >>> from entropy_probe import Rounding, Settings
        >>> Rounding("stochastic")
        <Rounding.STOCHASTIC: 'stochastic'>
        >>> settings = Settings(weight_rounding="stochastic")
    """

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"

    @property
    def adverb(self) -> str:
        """As in: rounded to nearest."""
        return {Rounding.NEAREST: "to nearest", Rounding.STOCHASTIC: "stochastically"}[self]


def holds(dtype: torch.dtype, weights: Tensor) -> bool:
    """Whether a type holds every element exactly."""
    return torch.equal(weights.to(dtype).to(weights.dtype), weights)


def storage_type(weights: Tensor) -> torch.dtype:
    """The narrowest type that holds every element exactly: what the weights were stored in, whatever they are loaded as."""
    return next((dtype for dtype in STORAGE_TYPES if holds(dtype, weights)), torch.float64)


def narrow_type(theta: Tensor, moments: AdamMoments, group: AdamGroup) -> torch.dtype | None:
    """The narrow type in which the optimizer holds a parameter; None where it is float32 or wider.

    Args:
        theta: the parameter, in whatever type it is loaded as.
        moments: its own, in the type that the optimizer keeps them in.
        group: its settings, which say whether moments are of the parameter's type.
    """
    if group.library is not Library.TORCH:
        return next((dtype for dtype in NARROW_TYPES if holds(dtype, theta)), None)
    dtype = moments.exp_avg.dtype
    if dtype not in NARROW_TYPES or moments.exp_avg_sq.dtype is not dtype or not holds(dtype, theta):
        return None
    return dtype


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """ulp: the distance between neighbours in ``dtype`` at each value's size, float64."""
    limits = torch.finfo(dtype)
    exponent = torch.frexp(values.double().abs().clamp(min=limits.smallest_normal))[1]
    # |x| = m 2^e with m in [½, 1), and eps is the distance above 1 = ½ · 2¹.
    return torch.ldexp(torch.full_like(values, limits.eps, dtype=torch.float64), exponent - 1)


def rounded_to_nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """rd(x), float64."""
    return values.to(dtype).double()


def rounded_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """One of x's two neighbours, or x itself where the type holds it, drawn so that the mean is x: float64."""
    ulp = spacing(values, dtype)
    draws = torch.rand(values.shape, generator=generator, dtype=torch.float64).to(values.device)
    # Powers of two and their multiples: neither quotient nor product is rounded.
    return torch.floor(values.double() / ulp + draws) * ulp


def shrunk_then_added(theta: Tensor, delta: Tensor, decay: float, dtype: torch.dtype) -> Tensor:
    """θ + Δθ rounded twice: θ times 1 − η λ, whose factor is a float32; then the rest added. float64."""
    factor = float(torch.tensor(1.0 - decay, dtype=torch.promote_types(dtype, torch.float32)))
    shrunk = rounded_to_nearest(theta * factor, dtype)
    return rounded_to_nearest(shrunk + (delta + decay * theta), dtype)


def stepped_in_type(theta: Tensor, moments: AdamMoments, group: AdamGroup, gradient: Tensor) -> Tensor:
    """θ⁺ of torch's Adam or AdamW without its fused kernel: every operation in ``theta``'s type, and so rounded to it.

    Args:
        theta: θ, in the narrow type.
        moments: at t, left as they are.
        group: the parameter's settings.
        gradient: that the optimizer is given, of the loss, in the narrow type.
    """
    first = moments.exp_avg.to(theta, copy=True)
    second = moments.exp_avg_sq.to(theta, copy=True)
    if group.weight_decay != 0.0:
        if group.decoupled_weight_decay:
            theta = theta * (1.0 - group.learning_rate * group.weight_decay)
        else:
            gradient = gradient.add(theta, alpha=group.weight_decay)
    first.lerp_(gradient, 1.0 - group.beta1)
    second.mul_(group.beta2).addcmul_(gradient, gradient, value=1.0 - group.beta2)
    if group.amsgrad and moments.max_exp_avg_sq is not None:
        second = torch.maximum(moments.max_exp_avg_sq.to(second), second)
    correction = 1.0 - group.beta2 ** (moments.step + 1)
    denominator = (second.sqrt() / correction**0.5).add_(group.eps)
    scale = group.learning_rate / (1.0 - group.beta1 ** (moments.step + 1))
    return theta.addcdiv(first, denominator, value=-scale)
