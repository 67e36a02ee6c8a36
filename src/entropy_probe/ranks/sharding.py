"""Which flat elements of every parameter are whose."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from entropy_probe.ranks.collectives import ALONE, Ranks


@dataclass(frozen=True)
class Sharding:
    """Which flat elements of every parameter are whose.

    Attributes:
        ranks: who shares the work.
        spans: by parameter name, every rank's run of the parameter laid flat.
        sharded: whether a rank holds θ, Adam's state, Ȳ and steps of its own span alone (FSDP2), or of all (replicated).
    """

    ranks: Ranks = ALONE
    spans: Mapping[str, tuple[slice, ...]] = field(default_factory=dict)
    sharded: bool = False

    @property
    def replicated(self) -> bool:
        """Whether there are several ranks, and each holds all parameters."""
        return self.ranks.count > 1 and not self.sharded

    def own(self, name: str) -> slice:
        """This rank's span."""
        return self.spans[name][self.ranks.rank]

    def first(self, name: str) -> int:
        """Where this rank's span begins in what it holds of θ and of Adam's state laid flat."""
        return 0 if self.sharded or self.ranks.count == 1 else self.own(name).start

    def held(self, name: str, shape: torch.Size) -> torch.Size:
        """The shape of what this rank holds of a parameter of this whole shape, of its θ, Adam's state, Ȳ and steps."""
        if not self.sharded:
            return shape
        own, row = self.own(name), max(math.prod(shape[1:]), 1)
        return torch.Size([(own.stop - own.start) // row, *shape[1:]])

    def total(self, value: float) -> float:
        """Σ over all elements, from the sum over those that this rank holds."""
        return float(self.ranks.sum_numbers(np.array([value]))[0]) if self.sharded else value

    def norm(self, norm: float) -> float:
        """L2 over all elements, from that over those that this rank holds."""
        return math.sqrt(self.total(norm**2)) if self.sharded else norm


WHOLE = Sharding()


def even_spans(shapes: Mapping[str, torch.Size], count: int) -> dict[str, tuple[slice, ...]]:
    """Spans of equal length, one element more or less."""
    return {
        name: tuple(slice(rank * n // count, (rank + 1) * n // count) for rank in range(count))
        for name, n in ((name, math.prod(shape)) for name, shape in shapes.items())
    }


def row_spans(shapes: Mapping[str, torch.Size], count: int) -> dict[str, tuple[slice, ...]]:
    """Spans of whole rows as FSDP2 cuts dimension 0: ⌈rows / N⌉ each, the last ones fewer or none."""
    found = {}
    for name, shape in shapes.items():
        rows, columns = shape[0], math.prod(shape[1:])
        each = -(-rows // count)
        cuts = [min(rank * each, rows) * columns for rank in range(count + 1)]
        found[name] = tuple(slice(start, stop) for start, stop in itertools.pairwise(cuts))
    return found
