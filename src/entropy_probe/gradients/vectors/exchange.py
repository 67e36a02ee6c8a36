"""Unit vectors change hands by shard: a rank gives away its units' elements of others' spans, and gets all units' of its own.

Afterwards a dot of any two units is a sum of what every rank finds on its span, so that the U × U matrix is all that is left to
sum. A rank hands over 2 n U / N elements, and no vector is whole anywhere. Source: docs/method.md, section 8.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from entropy_probe.gradients.vectors.unit_vectors import UnitVectors, uninitialised
from entropy_probe.ranks.collectives import BUCKET, Ranks
from entropy_probe.ranks.sharding import Sharding


class Shards(Protocol):
    """Elements of units' vectors that can be read; of all there are, or of this rank's spans."""

    @property
    def values(self) -> Mapping[str, Tensor]:
        """By parameter name; the last dimension is the elements that are here."""

    @property
    def arithmetic(self) -> torch.dtype:
        """Of products and of sums over elements."""

    @property
    def reached(self) -> set[str]:
        """Parameters that some response of some rank reaches."""

    def of(self, name: str, units: Sequence[int]) -> Tensor:
        """[units, channels, elements]."""

    def first(self, name: str) -> int:
        """Which element of the parameter laid flat, as this rank holds θ and Adam's state, the first one here is."""


@dataclass(frozen=True)
class ExchangedVectors:
    """All units' elements of this rank's spans."""

    values: dict[str, Tensor]
    arithmetic: torch.dtype
    reached: set[str]
    places: Mapping[int, int]
    sharding: Sharding

    def of(self, name: str, units: Sequence[int]) -> Tensor:
        """[units, channels, elements], a view where they lie in order."""
        places = [self.places[unit] for unit in units]
        if places == list(range(places[0], places[0] + len(places))):
            return self.values[name][places[0] : places[0] + len(places)]
        return self.values[name][places]

    def first(self, name: str) -> int:
        """See :class:`Shards`."""
        return self.sharding.first(name)


def exchanged(vectors: UnitVectors, units_of_rank: Sequence[Sequence[int]], sharding: Sharding) -> Shards:
    """All units' shards from every rank's own units' whole vectors, which are given up on the way.

    Args:
        vectors: of this rank's units, settled; ``reached`` says what any rank's responses reach.
        units_of_rank: by rank, all of them.
        sharding: whose elements are whose.
    """
    if sharding.ranks.count == 1:
        return vectors
    own, counts = units_of_rank[sharding.ranks.rank], [len(units) for units in units_of_rank]
    starts = [0, *itertools.accumulate(counts)]
    dtype, device, channels = vectors.layout
    found: dict[str, Tensor] = {}
    for piece in swapped(lambda name: vectors.of(name, own), list(vectors.values), counts, channels, dtype, sharding):
        name, part = piece.name, piece.part
        if name not in found:
            found[name] = uninitialised((sum(counts), channels, _count(sharding.own(name))), dtype, device)
        for start, values in zip(starts, piece.of_rank, strict=False):
            found[name][start : start + len(values), :, part.start : part.start + values.shape[-1]] = values
        if piece.last:
            vectors.give_up(name)
    places = {unit: place for place, unit in enumerate(itertools.chain.from_iterable(units_of_rank))}
    return ExchangedVectors(found, vectors.arithmetic, vectors.reached, places, sharding)


@dataclass(frozen=True)
class Piece:
    """Elements of one parameter that have come.

    Attributes:
        name: the parameter.
        part: which of this rank's span; a shorter span ends before it.
        of_rank: by rank, what it had: [its units, channels, elements].
        last: whether this was the end of the parameter, on all ranks.
    """

    name: str
    part: slice
    of_rank: list[Tensor]
    last: bool


def swapped(
    whole: Callable[[str], Tensor],
    names: Sequence[str],
    counts: Sequence[int],
    channels: int,
    dtype: torch.dtype,
    sharding: Sharding,
) -> Iterator[Piece]:
    """Every rank's vectors of this rank's spans, some at a time.

    Args:
        whole: this rank's vectors of a parameter, [its units, channels, elements].
        names: of the parameters; the same on all ranks.
        counts: units of every rank.
        channels: C.
        dtype: of the values.
        sharding: whose elements are whose.
    """
    ranks = sharding.ranks
    # From the largest count, so that every rank cuts alike.
    most = max(1, BUCKET // max(1, max(counts) * channels * dtype.itemsize * ranks.count))
    for pieces in _buckets(sharding, names, most):
        mine = counts[ranks.rank] * channels
        given = [
            mine * sum(_count(_part(sharding, name, to, part)) for name, part in pieces) for to in range(ranks.count)
        ]
        sent = torch.cat(
            [
                whole(name)[:, :, _part(sharding, name, to, part)].flatten()
                for to in range(ranks.count)
                for name, part in pieces
            ]
        )
        lengths = [_count(_part(sharding, name, ranks.rank, part)) for name, part in pieces]
        received = ranks.exchange(sent, given, [count * channels * sum(lengths) for count in counts])
        del sent
        apart = [
            torch.split(flat, [n * channels * length for length in lengths])
            for n, flat in zip(counts, received, strict=True)
        ]
        for number, ((name, part), length) in enumerate(zip(pieces, lengths, strict=True)):
            of_rank = [flat[number].view(n, channels, length) for n, flat in zip(counts, apart, strict=True)]
            yield Piece(name, part, of_rank, part.stop >= _longest(sharding, name))


def reached_anywhere(reached: set[str], names: Sequence[str], ranks: Ranks) -> set[str]:
    """The union over ranks."""
    flags = ranks.sum_numbers(np.array([float(name in reached) for name in names]))
    return {name for name, flag in zip(names, flags, strict=True) if flag}


def _buckets(sharding: Sharding, names: Sequence[str], most: int) -> list[list[tuple[str, slice]]]:
    """Parts of every rank's span, counted from its begin, that go in one exchange: ``most`` elements of a rank at a time."""
    found: list[list[tuple[str, slice]]] = []
    held = most
    for name in names:
        longest = _longest(sharding, name)
        for start in range(0, max(longest, 1), most):
            part = slice(start, min(start + most, longest))
            if held + part.stop - part.start > most:
                found.append([])
                held = 0
            found[-1].append((name, part))
            held += part.stop - part.start
    return found


def _longest(sharding: Sharding, name: str) -> int:
    return max(_count(span) for span in sharding.spans[name])


def _part(sharding: Sharding, name: str, rank: int, part: slice) -> slice:
    span = sharding.spans[name][rank]
    return slice(min(span.start + part.start, span.stop), min(span.start + part.stop, span.stop))


def _count(span: slice) -> int:
    return len(range(span.start, span.stop))
