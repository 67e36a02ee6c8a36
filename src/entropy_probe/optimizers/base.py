"""What the probe needs of an optimizer, whichever it is.

The step of an elementwise optimizer along an ascent direction Ȳ is Δθ = η P Ȳ to first order in its fresh gradient, with one
positive number P for every element of every parameter. So every inner product of the probe is X · η P Y, and a
:class:`Metric` gives P. Source: docs/method.md, sections 1 and 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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


class Metric(Protocol):
    """P of every parameter, by name: a mapping to whole tensors, float64, that also gives P some elements at a time."""

    def __getitem__(self, name: str, /) -> Tensor:
        """P of one parameter, in its shape."""

    def __iter__(self) -> Iterator[str]:
        """Names of parameters."""

    def chunk(self, name: str, part: slice) -> Tensor:
        """Elements ``part`` of P of one parameter laid flat."""

    @property
    def with_zeros(self) -> frozenset[str]:
        """Parameters some element of which has had no gradient yet, so that the optimizer's P is 1/ε there."""

    def guides_zeros(self, name: str, part: slice) -> Tensor:
        """1/ε at those of elements ``part`` that have had no gradient yet, and 0 elsewhere, float64; ε is above 0."""
