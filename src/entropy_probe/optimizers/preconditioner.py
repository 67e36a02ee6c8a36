"""Adam's elementwise preconditioner P = 1 / (√v̂ + ε), v̂ = v / (1 − β₂^t), by parameter name.

The step that Adam takes along an ascent direction Ȳ is Δθ = η P Ȳ, so every dot product of the probe is X P Y: ``sqrt``
gives P^½ for both sides, X̃ = P^½ X and Ỹ = P^½ Y. (P on both sides would give X P² Y.) With amsgrad the running
maximum of v takes v's place. An element with v = 0 has had no gradient yet, and P = 1/ε there, 10⁸ by default: such
elements are left out of P (P = 0) unless the guide's text is asked for. Source: docs/method.md, sections 1 and 6;
Kingma & Ba (2015); torch.optim.AdamW, whose ε stands outside the square root.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor

from entropy_probe.optimizers.state import AdamGroup, AdamMoments, AdamState, second_moment


class ZeroV(StrEnum):
    """P of an element whose second moment v is exactly 0, because no earlier batch gave it a gradient.

    ``leave-out``: P = 0, so the element is in neither δH₁ nor the preconditioned step; a report counts such elements and says
    what they would add. ``guide``: P = 1/ε, 10⁸ by default, as the formula says literally; δH₁ is then mostly their noise.
    Source: docs/method.md, section 6.

    Example:
        >>> from entropy_probe import Settings, ZeroV
        >>> ZeroV("leave-out")
        <ZeroV.LEAVE_OUT: 'leave-out'>
        >>> settings = Settings(zero_v="guide")
    """

    LEAVE_OUT = "leave-out"
    GUIDE = "guide"


def preconditioner(moments: AdamMoments, group: AdamGroup, zero_v: ZeroV = ZeroV.LEAVE_OUT) -> Tensor:
    """P of one parameter in float64, the shape of v.

    Raises:
        ValueError: t = 0, where v̂ is 0/0 and P undefined.
    """
    if moments.step < 1:
        raise ValueError(f"Adam has taken {moments.step} steps; its preconditioner is defined from the first step on")
    v = second_moment(moments, group)
    bias_correction = 1.0 - group.beta2**moments.step
    # In place on one copy: at the size of a model each temporary costs as much as the arithmetic.
    v_hat = v.to(torch.float64, copy=True).div_(bias_correction)
    p = v_hat.sqrt_().add_(group.eps).reciprocal_()
    return p if zero_v is ZeroV.GUIDE else p.masked_fill_(v == 0, 0.0)


@dataclass(frozen=True)
class Preconditioners(Mapping[str, Tensor]):
    """P of every parameter, by name, float64, computed when asked for: of a large model no copy stands in memory."""

    state: AdamState
    zero_v: ZeroV = ZeroV.LEAVE_OUT

    def __getitem__(self, name: str) -> Tensor:
        """P of one parameter."""
        return preconditioner(self.state.moments[name], self._groups[name], self.zero_v)

    def __iter__(self) -> Iterator[str]:
        """Names, in the state's order."""
        return iter(self.state.moments)

    def __len__(self) -> int:
        """Number of parameters."""
        return len(self.state.moments)

    def chunk(self, name: str, part: slice) -> Tensor:
        """Elements ``part`` of P of one parameter laid flat: computed while they are in cache."""
        moments = self.state.moments[name]
        largest = moments.max_exp_avg_sq
        return preconditioner(
            replace(
                moments,
                exp_avg_sq=moments.exp_avg_sq.flatten()[part],
                max_exp_avg_sq=None if largest is None else largest.flatten()[part],
            ),
            self._groups[name],
            self.zero_v,
        )

    def zeros(self, name: str) -> Tensor:
        """Where v of one parameter is exactly 0, the shape of v."""
        return second_moment(self.state.moments[name], self._groups[name]) == 0

    def guides_zeros(self, name: str, part: slice) -> Tensor:
        """1/ε where v is 0, and 0 elsewhere: what the guide's P has there, float64; ε is above 0."""
        group = self._groups[name]
        zeros = second_moment(self.state.moments[name], group).flatten()[part] == 0
        return torch.zeros(zeros.shape, dtype=torch.float64, device=zeros.device).masked_fill_(zeros, 1.0 / group.eps)

    @cached_property
    def with_zeros(self) -> frozenset[str]:
        """Parameters some element of which has v = 0, of what this rank holds."""
        return frozenset(name for name in self.state.moments if bool(self.zeros(name).any()))

    @cached_property
    def _groups(self) -> Mapping[str, AdamGroup]:
        return self.state.group_of()
