"""What ranks tell each other: sums of numbers, sums of parameter-length vectors, and shards of unit vectors that change hands.

(Σ_ranks X) · (Σ_ranks Y) holds products of different ranks' vectors, which no scalar of one rank carries: parameter-length
*sums* are reduced, or unit vectors change hands by shard, so that each rank holds all units' elements of its own span; all the
rest is numbers, or the U × U matrix of unit dots. No gradient of the length of the parameters is gathered. One process is one
rank: the same code, and nothing crosses. Every payload is counted. Source: docs/method.md, sections 8 and 9.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from entropy_probe.common.arrays import FloatArray
from entropy_probe.errors import InputError

BUCKET = 1 << 26
"""Bytes of small vectors that share one collective."""


class Kind(StrEnum):
    """What a collective carries."""

    NUMBERS = "numbers"
    SUMS = "sums"
    SHARDS = "shards"
    DIRECTIONS = "directions"


T = TypeVar("T")


@dataclass(frozen=True)
class Payload:
    """One collective as this rank saw it: what it handed over, its own part of an exchange apart."""

    kind: Kind
    elements: int
    bytes: int


@dataclass(frozen=True)
class Ranks:
    """The ranks that share the work of a probe.

    Attributes:
        rank: this one, from 0.
        count: N.
        group: torch.distributed's, None for one process.
        device: where the group's collectives want their tensors.
        sent: every payload so far.

    Example:
        One process is one rank. In a job of several, every rank makes them with ``Ranks.of_group()`` after
        ``torch.distributed.init_process_group()``, and calls the probe with the same rollouts:

        >>> from entropy_probe import Ranks
        >>> alone = Ranks()
        >>> alone.rank, alone.count, alone.backend
        (0, 1, None)
        >>> alone.sum_numbers([1.5, 2.0]).tolist()
        [1.5, 2.0]
    """

    rank: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sent: list[Payload] = field(default_factory=list, compare=False, repr=False)

    @staticmethod
    def of_group(group: dist.ProcessGroup | None = None) -> Ranks:
        """The ranks of an initialised process group; by default the world's."""
        group = group if group is not None else dist.group.WORLD
        # A group may have a backend for each kind of device.
        on_gpu = "nccl" in dist.get_backend_config(group) and torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        return Ranks(dist.get_rank(group), dist.get_world_size(group), group, device)

    @property
    def backend(self) -> str | None:
        """What carries the collectives, gloo or nccl; None without a group."""
        return None if self.group is None else "nccl" if self.device.type == "cuda" else "gloo"

    def sum_numbers(self, values: FloatArray) -> FloatArray:
        """Σ over ranks in float64, the same shape. What only one rank knows, the others give as 0."""
        values = np.asarray(values, dtype=np.float64)
        if self.count == 1:
            return values
        total = torch.from_numpy(values.copy()).to(self.device)
        self._count(Kind.NUMBERS, total)
        dist.all_reduce(total, group=self.group)
        found: FloatArray = total.cpu().numpy()
        return found

    def gather_numbers(self, values: FloatArray) -> FloatArray:
        """The values of every rank, [N, …]: a few numbers a rank, of one shape on all of them."""
        values = np.asarray(values, dtype=np.float64)
        every = np.zeros((self.count, *values.shape))
        every[self.rank] = values
        return self.sum_numbers(every)

    def alike(self, work: Callable[[], T]) -> T:
        """What ``work`` gives; where it refuses on one rank it refuses on all, in the same words: they would wait for that one.

        Every rank must call it; ``work`` itself has no collectives.

        Raises:
            InputError: that of the first rank that has one.
        """
        if self.count == 1:
            return work()
        problem = ""
        try:
            found = work()
        except InputError as error:
            problem = str(error)
        said = np.frombuffer(problem.encode(), dtype=np.uint8).astype(np.float64)
        lengths = self.gather_numbers(np.array([float(len(said))]))[:, 0].astype(int)
        if not lengths.any():
            return found
        first = int(np.flatnonzero(lengths)[0])
        every = self.gather_numbers(np.pad(said, (0, lengths.max() - len(said))))
        raise InputError(bytes(every[first, : lengths[first]].astype(np.uint8)).decode())

    def sum_vectors(self, vectors: Sequence[Tensor]) -> None:
        """Σ over ranks, in place; one type, small vectors in one bucket."""
        if self.count == 1:
            return
        for bucket in _buckets(vectors):
            together = torch.cat([vector.flatten() for vector in bucket]) if len(bucket) > 1 else bucket[0]
            sent = together.to(self.device)
            self._count(Kind.SUMS, sent)
            dist.all_reduce(sent, group=self.group)
            if len(bucket) > 1:
                for vector, part in zip(bucket, torch.split(sent, [v.numel() for v in bucket]), strict=True):
                    vector.copy_(part.view(vector.shape))
            elif sent is not together:
                together.copy_(sent)

    def exchange(self, parts: Tensor, given: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
        """Hand a part of a flat tensor to every rank; get what every rank has for this one.

        Args:
            parts: for rank 0, for rank 1, ….
            given: elements for each rank.
            sizes: elements that each rank has for this one.
        """
        if self.count == 1:
            return [parts]
        dtype, device, width = parts.dtype, parts.device, parts.element_size()
        sent = parts.to(self.device)
        received = torch.empty(sum(sizes), dtype=dtype, device=self.device)
        away = sent.numel() - given[self.rank]
        self.sent.append(Payload(Kind.SHARDS, away, away * width))
        # As bytes: not every backend exchanges every type.
        dist.all_to_all_single(
            received.view(torch.uint8),
            sent.view(torch.uint8),
            [size * width for size in sizes],
            [count * width for count in given],
            group=self.group,
        )
        return list(torch.split(received.to(device), list(sizes)))

    def gather_directions(self, part: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Every rank's span of directions that FSDP2's sharded ranks hold, flat: of one layer at a time, as its weights are.

        Args:
            part: this rank's, flat.
            sizes: elements of each rank's.
        """
        if self.count == 1:
            return [part]
        longest = max(sizes)
        padded = torch.zeros(longest, dtype=part.dtype, device=self.device)
        padded[: part.numel()] = part
        self._count(Kind.DIRECTIONS, padded)
        every = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(every, padded, group=self.group)
        return [found[:size].to(part.device) for found, size in zip(every, sizes, strict=True)]

    def sent_by_kind(self, since: int = 0) -> dict[Kind, Payload]:
        """Totals of what was sent after the first ``since`` payloads."""
        sent = self.sent[since:]
        return {
            kind: Payload(
                kind,
                sum(payload.elements for payload in sent if payload.kind is kind),
                sum(payload.bytes for payload in sent if payload.kind is kind),
            )
            for kind in Kind
        }

    def most_sent(self, since: int = 0) -> dict[Kind, Payload]:
        """By kind, the most elements and bytes that any rank handed over; nothing where there is one rank.

        Every rank must call it: the totals are gathered, which itself is not counted.

        Args:
            since: how many payloads this rank had sent before those that count.
        """
        if self.count == 1:
            return {}
        own = self.sent_by_kind(since)
        totals = np.array([[own[kind].elements, own[kind].bytes] for kind in Kind])
        most = replace(self, sent=[]).gather_numbers(totals).max(axis=0)
        return {
            kind: Payload(kind, int(elements), int(size)) for kind, (elements, size) in zip(Kind, most, strict=True)
        }

    def _count(self, kind: Kind, tensor: Tensor) -> None:
        self.sent.append(Payload(kind, tensor.numel(), tensor.numel() * tensor.element_size()))


ALONE = Ranks()


def _buckets(vectors: Sequence[Tensor]) -> list[list[Tensor]]:
    found: list[list[Tensor]] = []
    held = 0
    for vector in vectors:
        size = vector.numel() * vector.element_size()
        if not found or held + size > BUCKET:
            found.append([])
            held = 0
        found[-1].append(vector)
        held += size
    return found
