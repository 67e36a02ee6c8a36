"""The planner keeps what is asked for, and streams where it does not fit."""

from __future__ import annotations

from entropy_probe.gradients import Storage
from entropy_probe.units import Mode
from test_invariance import plan


def test_what_is_asked_for_is_kept_and_streamed_where_it_does_not_fit() -> None:
    pair = 2 * 2 * 1000 * 4  # memory of which one unit's vectors take their half

    def shape(**more: object) -> tuple[Mode, Storage, int]:
        found = plan(**more)
        return found.units.mode, found.storage, len(found.units.ranges)

    assert shape(memory_bytes=40 * pair) == (Mode.EXACT, Storage.STORED, 40)
    assert shape(memory_bytes=40 * pair, bytes_per_value=8) == (Mode.BLOCK, Storage.STORED, 20)
    assert shape(memory_bytes=39 * pair, mode=Mode.EXACT) == (Mode.EXACT, Storage.STREAMED, 40)
    assert shape(memory_bytes=20 * pair, blocks=20) == (Mode.BLOCK, Storage.STORED, 20)
    assert shape(memory_bytes=20 * pair, blocks=21) == (Mode.BLOCK, Storage.STREAMED, 21)
    assert shape(memory_bytes=50 * pair, mode=Mode.BLOCK) == (Mode.BLOCK, Storage.STORED, 16)
    assert shape(memory_bytes=5 * pair, mode=Mode.BLOCK) == (Mode.BLOCK, Storage.STREAMED, 16)
    assert shape(memory_bytes=5 * pair, mode=Mode.BLOCK, prompts=6) == (Mode.BLOCK, Storage.STORED, 3)
