"""Which responses go through a forward together.

A microbatch holds whole prompts where it can, because the entropy coefficient of a response needs the scores of all
responses to its prompt. Within a microbatch, responses of similar length share a strip: what is padded is computed for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PADDING = 0.125
"""The share of a strip's positions that may be padding before a new strip is begun."""

STRIP_POSITIONS = 1024
"""A strip of fewer positions is not worth a forward of its own."""


@dataclass(frozen=True)
class Microbatch:
    """Rows (flat, in order) whose graphs stand in memory together; ``whole`` where it holds every response of its prompts."""

    rows: range
    whole: bool


def microbatches(
    group_sizes: Sequence[int],
    unit_of_row: Sequence[int],
    size: int,
    prompts: range | None = None,
    *,
    within_units: bool,
) -> list[Microbatch]:
    """Consecutive rows, at most ``size`` at a time; a prompt with more responses than that is split.

    Args:
        group_sizes: G_n.
        unit_of_row: the unit of each response.
        size: responses at a time.
        prompts: those whose rows are asked for; None for all.
        within_units: whether no microbatch may hold two units' rows.
    """
    found: list[Microbatch] = []
    prompts = range(len(group_sizes)) if prompts is None else prompts
    start = stop = sum(group_sizes[: prompts.start])
    for group in group_sizes[prompts.start : prompts.stop]:
        crosses = within_units and stop > start and unit_of_row[stop] != unit_of_row[start]
        if stop > start and (stop - start + group > size or crosses):
            found.append(Microbatch(range(start, stop), whole=True))
            start = stop
        stop += group
        if group > size:
            pieces = range(start, stop, size)
            found.extend(Microbatch(range(first, min(first + size, stop)), whole=False) for first in pieces)
            start = stop
    if stop > start:
        found.append(Microbatch(range(start, stop), whole=True))
    return found


def strips(rows: Sequence[int], lengths: Sequence[int], unit_of_row: Sequence[int]) -> list[tuple[int, ...]]:
    """``rows`` in groups of similar ``lengths`` (indexed by row), each in order of unit and row."""
    found: list[list[int]] = []
    used = 0
    for row in sorted(rows, key=lambda r: (-lengths[r], r)):
        if found:
            longest = lengths[found[-1][0]]
            computed = longest * (len(found[-1]) + 1)
            padded = computed - used - lengths[row]
            if padded <= PADDING * computed or longest * len(found[-1]) < STRIP_POSITIONS:
                found[-1].append(row)
                used += lengths[row]
                continue
        found.append([row])
        used = lengths[row]
    return [tuple(sorted(strip, key=lambda r: (unit_of_row[r], r))) for strip in found]
