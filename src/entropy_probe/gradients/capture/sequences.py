"""Which rows of a forward belong to which sequence, which sequence to which unit, and with what coefficients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

IDLE = (-1,)
"""The units of a strip that is run for the sake of other ranks alone; no unit has this number."""


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of one strip that belong to one unit."""

    unit: int
    rows: slice


@dataclass(frozen=True)
class Mixing:
    """How each sequence's gradient enters X_u and Y_u.

    ``weights`` is [channels, n]: a sequence's coefficient in each channel. ``channels`` says which of (X, Y) they are: both
    for one backward with unit coefficients, one where X and Y need a backward each.
    """

    weights: Tensor
    channels: slice


@dataclass(frozen=True)
class Strip:
    """The rows of one forward: n sequences padded to L, sorted by unit.

    The mixing is known only once all scores of the prompts in it are, after the forwards; it is written then.
    """

    units: tuple[int, ...]
    length: int
    mixing: list[Mixing] = field(default_factory=list)

    @property
    def count(self) -> int:
        """n, sequences."""
        return len(self.units)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Runs of rows of one unit."""
        found: list[Segment] = []
        start = 0
        for row in range(1, self.count + 1):
            if row == self.count or self.units[row] != self.units[start]:
                found.append(Segment(self.units[start], slice(start, row)))
                start = row
        return tuple(found)

    def mix(self, mixing: Mixing) -> None:
        """Set the coefficients of the next backward."""
        self.mixing[:] = [mixing]
        vars(self).pop("block_weights", None)

    @cached_property
    def block_weights(self) -> Tensor:
        """All units' coefficients at once, block-diagonal: [units · channels, n]."""
        (mixing,) = self.mixing
        channels = len(mixing.weights)
        blocks = mixing.weights.new_zeros((len(self.segments), channels, self.count))
        for block, segment in zip(blocks, self.segments, strict=True):
            block[:, segment.rows] = mixing.weights[:, segment.rows]
        return blocks.flatten(0, 1)

    def by_sequence(self, tensor: Tensor) -> Tensor | None:
        """``tensor`` with one leading entry a sequence, [n, …]; None where its rows cannot be told apart.

        Taken as told apart: a leading n (the length is never n, see :func:`padded_length`), a flattened n · L, and anything at
        all where there is one sequence. Not a matrix of n rows of features: a router may have picked as many tokens as there
        are sequences, from wherever it liked.
        """
        picked = tensor.dim() == 2 and tensor.is_floating_point() and self.count > 1
        if tensor.dim() and tensor.shape[0] == self.count and not picked:
            return tensor
        if tensor.dim() and tensor.shape[0] == self.count * self.length:
            apart: Tensor = tensor.unflatten(0, (self.count, self.length))
            return apart
        return tensor.unsqueeze(0) if self.count == 1 else None

    def single(self, row: int) -> Strip:
        """One of the rows by itself, with its coefficients."""
        strip = replace(self, units=(self.units[row],), mixing=[])
        for mixing in self.mixing:
            strip.mix(replace(mixing, weights=mixing.weights[:, row : row + 1]))
        return strip


def padded_length(lengths: Sequence[int]) -> int:
    """The longest, or one more where it is the number of sequences: a leading n must not be a leading L."""
    longest = max(lengths)
    return longest + 1 if longest == len(lengths) else longest


def row_chunks(rows: slice, most: int) -> Iterator[slice]:
    """``rows`` in pieces of at most ``most``."""
    for start in range(rows.start, rows.stop, most):
        yield slice(start, min(start + most, rows.stop))
