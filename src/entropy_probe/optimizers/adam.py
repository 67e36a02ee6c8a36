"""Adam and AdamW as the probe's optimizer: each question to the file that answers it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from entropy_probe.optimizers.adamw_step import adamw_deltas
from entropy_probe.optimizers.base import DotGroup, PreconditionerTest
from entropy_probe.optimizers.digest import digest_of_adam
from entropy_probe.optimizers.gradient_weights import dot_groups, gradient_factors, spread_factors
from entropy_probe.optimizers.preconditioner import Preconditioners, ZeroV
from entropy_probe.optimizers.rounded_step import rounded_adamw
from entropy_probe.optimizers.rounding import RoundedStep, RoundingRule
from entropy_probe.optimizers.state import AdamState
from entropy_probe.optimizers.steps_of_others import StepsOfOthers
from entropy_probe.optimizers.validation import validate_preconditioner
from entropy_probe.ranks.sharding import WHOLE, Sharding


@dataclass(frozen=True)
class Adam:
    """:class:`~entropy_probe.optimizers.base.OptimizerState` of Adam or AdamW; its methods are documented there.

    Attributes:
        state: groups and moments at t.
        zero_v: P of elements whose v is 0.
    """

    state: AdamState
    zero_v: ZeroV = ZeroV.LEAVE_OUT

    @property
    def group_rates(self) -> tuple[float, ...]:
        """η of every parameter group that holds parameters, in order."""
        return self.state.group_rates

    @cached_property
    def metric(self) -> Preconditioners:
        """P = 1 / (√v̂ + ε)."""
        return Preconditioners(self.state, self.zero_v)

    def dot_groups(self) -> dict[str, DotGroup]:
        """Groups alike in η, β₁ and t share one."""
        return dot_groups(self.state)

    def validate(
        self, shapes: Mapping[str, torch.Size], *, seed: int = 0, sharding: Sharding = WHOLE
    ) -> PreconditionerTest:
        """See :func:`~entropy_probe.optimizers.validation.validate_preconditioner`."""
        return validate_preconditioner(self.state, shapes, seed=seed, zero_v=self.zero_v, sharding=sharding)

    def settings(self) -> object:
        """The groups, and t by name."""
        return self.state.groups, {name: moments.step for name, moments in self.state.moments.items()}

    def digest(self) -> bytes:
        """Of groups and moments."""
        return digest_of_adam(self.state)

    def had_gradient(self, name: str) -> bool:
        """Whether v is not 0 in some element."""
        moments = self.state.moments.get(name)
        return moments is not None and bool((moments.exp_avg_sq != 0).any())

    def gradient_factors(self, names: Collection[str]) -> dict[DotGroup, float] | None:
        """(1 − β₁) / (1 − β₁^{t+1})."""
        return gradient_factors(self.state, names)

    def spread_factors(self, names: Collection[str], clip_factor: float) -> list[float]:
        """See :func:`~entropy_probe.optimizers.gradient_weights.spread_factors`."""
        return spread_factors(self.state, names, clip_factor)

    def deltas(
        self,
        parameters: Mapping[str, Tensor],
        ascent: Mapping[str, Tensor],
        *,
        max_grad_norm: float | None = None,
        sharding: Sharding = WHOLE,
    ) -> dict[str, Tensor]:
        """See :func:`~entropy_probe.optimizers.adamw_step.adamw_deltas`."""
        return adamw_deltas(parameters, self.state, ascent, max_grad_norm=max_grad_norm, sharding=sharding)

    def stored(
        self,
        parameters: Mapping[str, Tensor],
        ascent: Mapping[str, Tensor],
        unrounded: Mapping[str, Tensor],
        *,
        clip_factor: float,
        rule: RoundingRule,
        sharding: Sharding = WHOLE,
    ) -> RoundedStep | None:
        """See :func:`~entropy_probe.optimizers.rounded_step.rounded_adamw`."""
        return rounded_adamw(
            parameters, self.state, ascent, unrounded, clip_factor=clip_factor, rule=rule, sharding=sharding
        )

    def steps_of_others(
        self,
        parameters: Mapping[str, Tensor],
        ascent: Mapping[str, Tensor],
        clip_factor: float,
        sizes: Sequence[int],
        terms: Sequence[Mapping[str, Tensor]] = (),
    ) -> StepsOfOthers:
        """See :class:`~entropy_probe.optimizers.steps_of_others.StepsOfOthers`."""
        return StepsOfOthers(parameters, self.state, ascent, clip_factor, sizes, self.zero_v, tuple(terms))
