"""How prompts become units and whether their vectors are kept, by the memory that is there.

EXACT while its vectors fit, else BLOCK with as many blocks as fit (16 or more), else EXACT streamed. The guide makes BLOCK the
default because EXACT was dear; this keeps its intent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from entropy_probe.common.choices import member
from entropy_probe.common.files import readable_size
from entropy_probe.data.units import Mode, Units, block_units, exact_units
from entropy_probe.errors import InputError
from entropy_probe.gradients.interface import Storage

LEAST_BLOCKS = 16
"""Fewer units than this make error bars too wide to choose BLOCK unasked."""

VECTOR_SHARE = 0.5
"""The share of the memory that unit vectors may take; the rest is for activations, sums and one unit's gradients."""


@dataclass(frozen=True)
class Plan:
    """The chosen units and storage, and why."""

    units: Units
    storage: Storage
    reason: str


def all_in_one_place(units: Units) -> float:
    """Units whose vectors one process holds."""
    return float(len(units.ranges))


def make_plan(
    mode: Mode,
    blocks: int | None,
    *,
    prompts: int,
    parameters: int,
    bytes_per_value: int,
    memory_bytes: float,
    most_held: Callable[[Units], float] = all_in_one_place,
    vectors: int = 2,
) -> Plan:
    """Choose units and storage.

    Args:
        mode: as asked; ``auto`` chooses.
        blocks: number of blocks where asked for; implies BLOCK.
        prompts: B.
        parameters: length of one vector.
        bytes_per_value: of a stored vector's element.
        memory_bytes: what one process may use in all; vectors take at most ``VECTOR_SHARE`` of it.
        vectors: of a unit: X and Y, and those of further targets.
        most_held: of how many units' vectors the rank that holds most has room to find.

    Raises:
        InputError: ``blocks`` with EXACT, a number of blocks that B does not allow, or a mode that is not known.
    """
    mode = member("mode", mode, Mode)
    if blocks is not None and mode is Mode.EXACT:
        raise InputError("a number of blocks goes with mode block; EXACT has one unit a prompt")
    per_unit = vectors * parameters * bytes_per_value
    sets = "pairs of vectors" if vectors == 2 else f"sets of {vectors} vectors"
    room = VECTOR_SHARE * memory_bytes / per_unit

    def fits(units: Units) -> bool:
        return most_held(units) <= room

    def size(units: int) -> str:
        # Not what was free: the same run would then read differently from one time to the next.
        return f"{units} {sets} take {readable_size(units * per_unit)}"

    def in_blocks(count: int, why: str) -> Plan:
        units = block_units(prompts, count)
        storage = Storage.STORED if fits(units) else Storage.STREAMED
        return Plan(units, storage, f"{count} blocks {why}: {size(count)}")

    if blocks is not None:
        return in_blocks(blocks, "asked for")
    exact = exact_units(prompts)
    match mode:
        case Mode.BLOCK:
            count = max(2, min(LEAST_BLOCKS, prompts // 2))
            return in_blocks(count, f"by default ({LEAST_BLOCKS}, or half as many as prompts)")
        case Mode.EXACT:
            if fits(exact):
                return Plan(exact, Storage.STORED, f"exact, asked for: {size(prompts)}")
            why = "asked for and its vectors do not fit"
        case Mode.AUTO:
            if fits(exact):
                return Plan(exact, Storage.STORED, f"exact, its vectors fit: {size(prompts)}")
            # Blocks are dealt whole, so that one rank may get one more than its part: fewer are tried until that fits too.
            most = min(prompts - 1, int(room * prompts / most_held(exact)))
            for count in range(most, LEAST_BLOCKS - 1, -1):
                units = block_units(prompts, count)
                if fits(units):
                    return Plan(units, Storage.STORED, f"{count} blocks are what fits: {size(prompts)} for exact")
            why = f"fewer than {LEAST_BLOCKS} blocks would fit"
        case unknown:
            assert_never(unknown)
    return Plan(exact, Storage.STREAMED, f"exact, streamed, {why}: {size(prompts)}")
