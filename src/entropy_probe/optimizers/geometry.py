"""The inner product of the probe, X · η P Y: everything that dots of unit vectors are taken with.

P and η come from the optimizer's state (:meth:`Geometry.of`), or are given (:meth:`Geometry.fixed`). δH₁ = −U_cross in this
inner product. Source: docs/method.md, sections 1 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_probe.optimizers.base import DotGroup, Metric, OptimizerState


@dataclass(frozen=True)
class GivenMetric:
    """P as given, by name; it knows nothing of elements without a gradient."""

    values: Mapping[str, Tensor]
    with_zeros: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Tensor:
        """P of one parameter."""
        return self.values[name]

    def chunk(self, name: str, part: slice) -> Tensor:
        """Elements ``part`` of P of one parameter laid flat."""
        return self.values[name].flatten()[part]

    def zeros(self, name: str) -> Tensor:
        """None."""
        return torch.zeros_like(self.values[name], dtype=torch.bool)

    def guides_zeros(self, name: str, part: slice) -> Tensor:
        """Zeros."""
        return torch.zeros_like(self.chunk(name, part), dtype=torch.float64)


@dataclass(frozen=True)
class Geometry:
    """P, η and the type of the vectors whose dots are taken.

    Attributes:
        metric: P by parameter name.
        groups: the dot group of every parameter, by name, with its η; in the order of the optimizer's groups.
        dtype: of stored unit vectors; None takes the weights', float32 at least.
    """

    metric: Metric
    groups: Mapping[str, DotGroup]
    dtype: torch.dtype | None = None

    @staticmethod
    def of(optimizer: OptimizerState, dtype: torch.dtype | None = None) -> Geometry:
        """P and η of an optimizer, :class:`~entropy_probe.optimizers.adam.Adam` for one; ``dtype`` of stored unit vectors."""
        return Geometry(optimizer.metric, optimizer.dot_groups(), dtype)

    @staticmethod
    def fixed(
        preconditioners: Mapping[str, Tensor],
        learning_rate: float | Mapping[str, float] = 1.0,
        dtype: torch.dtype | None = None,
    ) -> Geometry:
        """Of P that is given, without an optimizer.

        Args:
            preconditioners: P by parameter name.
            learning_rate: η, one for all or by parameter name; parameters of one η share a dot group.
            dtype: of stored unit vectors.
        """
        rates = learning_rate if isinstance(learning_rate, Mapping) else dict.fromkeys(preconditioners, learning_rate)
        distinct = {rate: DotGroup(index, rate) for index, rate in enumerate(dict.fromkeys(rates.values()))}
        return Geometry(GivenMetric(preconditioners), {name: distinct[rate] for name, rate in rates.items()}, dtype)

    @property
    def dot_groups(self) -> tuple[DotGroup, ...]:
        """The distinct dot groups, in the order of the optimizer's groups."""
        return tuple(dict.fromkeys(self.groups.values()))

    def learning_rate(self, name: str) -> float:
        """η of one parameter."""
        return self.groups[name].learning_rate

    def vector_dtype(self, weights: torch.dtype) -> torch.dtype:
        """The type of stored unit vectors, for weights of a type."""
        return self.dtype if self.dtype is not None else torch.promote_types(weights, torch.float32)

    def step(self, ascent: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Δθ = η P Ȳ by parameter name, float64: the step that δH₁ is about, with v at t.

        Args:
            ascent: Ȳ by parameter name.
        """
        return {
            name: self.learning_rate(name) * self.metric[name].to(y.device) * y.double() for name, y in ascent.items()
        }
