"""How a step is rounded as it is stored, and what rounding leaves of it.

A weight in a narrow type moves only if its update reaches half the distance to its neighbour; a smaller one is lost
(:mod:`~entropy_probe.optimizers.stored_precision` has the arithmetic). Source: docs/method.md, section 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entropy_probe.common.choices import member
from entropy_probe.optimizers.stored_precision import Rounding
from entropy_probe.ranks.sharding import Sharding


@dataclass(frozen=True)
class RoundingRule:
    """How the optimizer rounds, and the seed of its random numbers."""

    how: Rounding = Rounding.NEAREST
    seed: int = 0

    def __post_init__(self) -> None:
        """Put the name of a rounding into the member, and refuse an unknown one."""
        object.__setattr__(self, "how", member("weight_rounding", self.how, Rounding))

    def generator(self, sharding: Sharding) -> torch.Generator:
        """The same on all ranks that hold the same, and each its own where they hold shards."""
        return torch.Generator().manual_seed(self.seed + (sharding.ranks.rank if sharding.sharded else 0))


NEAREST = RoundingRule()


@dataclass(frozen=True)
class Kept:
    """What rounding leaves of a step.

    Attributes:
        how: it was rounded.
        dtypes: narrow types in which weights are held.
        weights: held so, of all ranks.
        moved: share of them that the rounded step changes.
        moved_in_float32: share of them that the step would change if they were float32.
    """

    how: Rounding
    dtypes: tuple[torch.dtype, ...]
    weights: int
    moved: float
    moved_in_float32: float

    @property
    def types(self) -> str:
        """As in ``bfloat16``."""
        return " and ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)

    @property
    def said(self) -> str:
        """What moves, in words."""
        return (
            f"{100 * self.moved:.3g} % of {self.weights} {self.types} weights move; in float32 "
            f"{100 * self.moved_in_float32:.3g} % would"
        )


def mean_kept(found: Sequence[Kept]) -> Kept | None:
    """Shares averaged over steps of the same weights; None of none."""
    if not found:
        return None
    return replace(
        found[0],
        moved=sum(kept.moved for kept in found) / len(found),
        moved_in_float32=sum(kept.moved_in_float32 for kept in found) / len(found),
    )


@dataclass(frozen=True)
class RoundedStep:
    """Δθ = θ⁺ − θ by parameter name, float64; those in float32 or wider move as without rounding."""

    deltas: Mapping[str, Tensor]
    kept: Kept
