"""What the probe needs of an optimizer, whichever it is.

An elementwise optimizer moves θ along an ascent direction Ȳ by Δθ = η P Ȳ, with one number P ≥ 0 for every element of every
parameter, which does not depend on Ȳ. So every inner product of the probe is X · η P Y. An optimizer says what its η and P are,
which parameters it weighs alike, and what its own next step is, in the parts that add up to it. One optimizer is one file that
satisfies :class:`OptimizerState`; Adam's is :mod:`~entropy_probe.optimizers.adam`. An optimizer whose step multiplies whole
matrices (Muon, Shampoo) has no such P and is refused by name. Source: docs/method.md, sections 1 and 6.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from entropy_probe.optimizers.rounding import RoundedStep, RoundingRule
from entropy_probe.ranks.sharding import WHOLE, Sharding


@dataclass(frozen=True)
class DotGroup:
    """Parameters whose dots are summed together: no step weighs them apart.

    Parameter groups of the optimizer that agree in all that weighs a fresh gradient share one, so that many groups do not
    cost a matrix of unit dots each.

    Attributes:
        index: of the first parameter group of the optimizer that is in it.
        learning_rate: η.
    """

    index: int
    learning_rate: float


@dataclass(frozen=True)
class PreconditionerTest:
    """A test dot of two fixed random vectors over all parameters, without P and with it."""

    plain_dot: float
    preconditioned_dot: float


class Metric(Protocol):
    """P of every parameter, by name, whole or some elements at a time."""

    def __getitem__(self, name: str, /) -> Tensor:
        """P of one parameter, in its shape, float64."""

    def chunk(self, name: str, part: slice) -> Tensor:
        """Elements ``part`` of P of one parameter laid flat."""

    @property
    def with_zeros(self) -> frozenset[str]:
        """Parameters some element of which has had no gradient yet, so that the optimizer's own P is 1/ε there."""

    def zeros(self, name: str) -> Tensor:
        """Which elements of one parameter have had no gradient yet, in its shape."""

    def guides_zeros(self, name: str, part: slice) -> Tensor:
        """1/ε at those of elements ``part`` that have had no gradient yet, and 0 elsewhere, float64; ε is above 0."""


class Look(Protocol):
    """What else to take dots with, once Ȳ is known, some elements of one parameter at a time."""

    @property
    def count(self) -> int:
        """K, how many directions."""

    def along(
        self, name: str, part: slice, x: Tensor, y: Tensor, units: Sequence[int], terms: Sequence[Tensor] = ()
    ) -> Tensor:
        """XS_u · V_uk over these elements: [units, K] from x and y [units, elements].

        V may depend on YS_u, and on the YᵏS_u of terms of the loss, [units, elements] each.
        """

    def response(self, name: str, part: slice) -> Tensor:
        """J of these elements, float64 [elements]."""

    def term_responses(self, name: str, part: slice) -> Sequence[tuple[Tensor, Tensor]]:
        """Of every term of the loss, how its share of the gradient's part answers to Ȳᵏ and, with Ȳᵏ held, to Ȳ."""


class OptimizerState(Protocol):
    """An optimizer between two steps: its P, its η, and the step that it takes next.

    Tensors are by parameter name; of shards, all is of this rank's elements.
    """

    @property
    def group_rates(self) -> tuple[float, ...]:
        """η of every parameter group that holds parameters, in order."""

    @property
    def metric(self) -> Metric:
        """P."""

    def dot_groups(self) -> Mapping[str, DotGroup]:
        """The dot group of every parameter, in the order of the parameter groups."""

    def validate(
        self, shapes: Mapping[str, torch.Size], *, seed: int = 0, sharding: Sharding = WHOLE
    ) -> PreconditionerTest:
        """Every trainable parameter has a usable state, and a dot product through P is finite.

        Raises:
            InputError: names the first parameter that has none.
        """

    def settings(self) -> object:
        """Settings and step numbers, which all ranks must share; its ``repr`` is compared."""

    def digest(self) -> bytes:
        """Of the whole state, by which ranks that should hold the same find out whether they do."""

    def had_gradient(self, name: str) -> bool:
        """Whether a gradient other than zero came to one parameter in training; False of one without a state."""

    def gradient_factors(self, names: Collection[str]) -> dict[DotGroup, float] | None:
        """f with f η P Ȳ what the fresh gradient adds to the step with P as it is now, by dot group.

        None where the parameters of one dot group differ in it.

        Args:
            names: of the parameters that have a gradient.
        """

    def spread_factors(self, names: Collection[str], clip_factor: float) -> list[float]:
        """f with f η P Ȳ what the gradient does in all, over the steps to come; the distinct ones of ``names``."""

    def deltas(
        self,
        parameters: Mapping[str, Tensor],
        ascent: Mapping[str, Tensor],
        *,
        max_grad_norm: float | None = None,
        sharding: Sharding = WHOLE,
    ) -> dict[str, Tensor]:
        """Δθ of the optimizer's own step from θ on the loss gradient −Ȳ, clipped, float64."""

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
        """The same step as the weights are stored; None where all are held in float32 or wider.

        Raises:
            InputError: the step leaves the range of the narrow type.
        """

    def steps_of_others(
        self,
        parameters: Mapping[str, Tensor],
        ascent: Mapping[str, Tensor],
        clip_factor: float,
        sizes: Sequence[int],
        terms: Sequence[Mapping[str, Tensor]] = (),
    ) -> Look:
        """XS_u along momentum, fresh gradient and weight decay of the step that the other units' mean Ȳ_−u would make.

        Six directions: the three parts, then the same with P as it is now (``sizes`` are the prompts of every unit). Then the
        shares of ``terms``, the Ȳᵏ that Ȳ holds, in the fresh gradient's part, and the same with P as it is now.
        """


def distinct_rates(optimizer: OptimizerState) -> list[float]:
    """The distinct learning rates of an optimizer, in the order of its parameter groups."""
    return list(dict.fromkeys(optimizer.group_rates))


def gradient_weights(
    optimizer: OptimizerState, names: Collection[str], clip_factor: float
) -> dict[DotGroup, float] | None:
    """By dot group, the weight η · factor · clip of P Ȳ in the step with P as it is now; None where there is no one factor.

    Args:
        optimizer: whose step it is.
        names: of the parameters that have a gradient.
        clip_factor: of the gradient.
    """
    factors = optimizer.gradient_factors(names)
    if factors is None:
        return None
    return {group: group.learning_rate * factor * clip_factor for group, factor in factors.items()}
