"""Units: what the U-statistic pairs. EXACT: every prompt alone. BLOCK: contiguous runs of prompts.

Prompts stand in the order of their first row; block sizes differ by at most one, larger ones first. Blocks follow that
order and not the microbatches, so that results do not depend on memory. Source: docs/method.md, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from entropy_probe.errors import InputError
from entropy_probe.ranks.dealing import deal


class Mode(StrEnum):
    """How prompts become units, the things that U_cross pairs.

    ``exact``: every prompt is a unit. ``block``: a run of neighbouring prompts is a unit. ``auto``: exact where the vectors fit
    into memory, else blocks (16 or more), else exact in two streamed passes without the matrix of dots. A report says which was
    taken and why. Source: docs/method.md, section 3.

    Example:
        >>> from entropy_probe import Mode, Settings
        >>> Mode("block")
        <Mode.BLOCK: 'block'>
        >>> settings = Settings(mode="block", blocks=16)
    """

    AUTO = "auto"
    EXACT = "exact"
    BLOCK = "block"


@dataclass(frozen=True)
class Units:
    """A partition of prompts 0..B−1 into consecutive runs; ``ranges[u]`` are the prompts of unit u."""

    mode: Mode
    ranges: tuple[range, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """s_u, prompts in each unit."""
        return tuple(len(prompts) for prompts in self.ranges)

    @property
    def of_prompts(self) -> list[int]:
        """The unit of every prompt."""
        return [unit for unit, prompts in enumerate(self.ranges) for _ in prompts]

    def of_rows(self, group_sizes: Sequence[int]) -> list[int]:
        """The unit of every response, flat; ``group_sizes`` are the prompts' G_n."""
        return [unit for unit, size in zip(self.of_prompts, group_sizes, strict=True) for _ in range(size)]

    def prompts(self, units: range) -> range:
        """The prompts of consecutive units."""
        return range(self.ranges[units.start].start, self.ranges[units.stop - 1].stop) if units else range(0)

    def deal(self, positions: Sequence[int], count: int) -> list[range]:
        """Consecutive units for every one of ``count`` ranks, level in the ``positions`` of their prompts."""
        return deal([sum(positions[n] for n in prompts) for prompts in self.ranges], count)


def exact_units(prompts: int) -> Units:
    """One unit a prompt."""
    return Units(Mode.EXACT, tuple(range(n, n + 1) for n in range(prompts)))


def block_units(prompts: int, blocks: int) -> Units:
    """``blocks`` contiguous runs, sizes differing by at most one, larger ones first.

    Raises:
        InputError: fewer than two blocks, or more blocks than prompts.
    """
    if blocks < 2:
        raise InputError(f"{blocks} blocks; the cross-unit estimator needs at least 2")
    if blocks > prompts:
        raise InputError(f"{blocks} blocks for {prompts} prompts; give at most one block a prompt")
    small, larger = divmod(prompts, blocks)
    ranges = []
    start = 0
    for block in range(blocks):
        size = small + (block < larger)
        ranges.append(range(start, start + size))
        start += size
    return Units(Mode.BLOCK, tuple(ranges))
