"""Work dealt to ranks in level shares."""

from __future__ import annotations

from collections.abc import Sequence


def deal(weights: Sequence[int], count: int) -> list[range]:
    """Consecutive items for every rank, so that sums of ``weights`` are about level: an item goes where its middle falls.

    A rank may get none: there are fewer items than ranks, or one weighs more than a rank's share.
    """
    total, start, reached = sum(weights), 0, 0
    rank_of = []
    for weight in weights:
        rank_of.append(min(count - 1, int(count * (reached + weight / 2) / total)) if total else 0)
        reached += weight
    found = []
    for rank in range(count):
        stop = start + rank_of[start:].count(rank)
        found.append(range(start, stop))
        start = stop
    return found
