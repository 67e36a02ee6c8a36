"""How prompts become units and whether their vectors are kept, by the memory that is there.

EXACT while its vectors fit, else BLOCK with as many blocks as fit (16 or more), else EXACT streamed. The guide makes BLOCK the
default because EXACT was dear; this keeps its intent.
"""

from __future__ import annotations

from dataclasses import dataclass

from entropy_probe.errors import InputError
from entropy_probe.files import readable_size
from entropy_probe.gradients.interface import Storage
from entropy_probe.units import Mode, Units, block_units, exact_units

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


def make_plan(
    mode: Mode, blocks: int | None, *, prompts: int, parameters: int, bytes_per_value: int, memory_bytes: float
) -> Plan:
    """Choose units and storage.

    Args:
        mode: as asked; ``auto`` chooses.
        blocks: number of blocks where asked for; implies BLOCK.
        prompts: B.
        parameters: length of one vector.
        bytes_per_value: of a stored vector's element.
        memory_bytes: what may be used in all; vectors take at most ``VECTOR_SHARE`` of it.

    Raises:
        InputError: ``blocks`` with EXACT, or a number of blocks that B does not allow.
    """
    if blocks is not None and mode is Mode.EXACT:
        raise InputError("--blocks goes with --mode block; EXACT has one unit a prompt")
    per_unit = 2 * parameters * bytes_per_value
    fit = int(VECTOR_SHARE * memory_bytes // per_unit)

    def size(units: int) -> str:
        # Not what was free: the same run would then read differently from one time to the next.
        return f"{units} pairs of vectors take {readable_size(units * per_unit)}"

    if mode is Mode.BLOCK or blocks is not None:
        count = blocks if blocks is not None else max(2, min(LEAST_BLOCKS, prompts // 2))
        storage = Storage.STORED if count <= fit else Storage.STREAMED
        why = "asked for" if blocks is not None else f"by default ({LEAST_BLOCKS}, or half as many as prompts)"
        return Plan(block_units(prompts, count), storage, f"{count} blocks {why}: {size(count)}")
    if prompts <= fit:
        why = "asked for" if mode is Mode.EXACT else "its vectors fit"
        return Plan(exact_units(prompts), Storage.STORED, f"exact, {why}: {size(prompts)}")
    if mode is Mode.AUTO and fit >= LEAST_BLOCKS:
        return Plan(block_units(prompts, fit), Storage.STORED, f"{fit} blocks are what fits: {size(prompts)} for exact")
    why = (
        "asked for and its vectors do not fit" if mode is Mode.EXACT else f"fewer than {LEAST_BLOCKS} blocks would fit"
    )
    return Plan(exact_units(prompts), Storage.STREAMED, f"exact, streamed, {why}: {size(prompts)}")
