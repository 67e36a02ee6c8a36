"""The planner keeps what is asked for, and streams where it does not fit."""

from __future__ import annotations

import pytest

from entropy_probe.data.units import Mode, Units
from entropy_probe.gradients import Storage
from entropy_probe.gradients.plan import VECTOR_SHARE
from entropy_probe.pipeline.inputs import units_on_a_rank
from entropy_probe.ranks.collectives import Ranks
from entropy_probe.ranks.sharding import Sharding
from support import plan, random_batch


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


@pytest.mark.parametrize(
    ("count", "room", "blocks"),
    [
        (1, 15.9, None),
        (1, 20.5, 20),
        (3, 5.2, None),
        (3, 7.7, 21),
        (8, 1.9, None),
        (8, 3.2, 18),
        (16, 1.1, None),
        (16, 2.5, 25),
    ],
)
def test_no_rank_is_dealt_more_blocks_than_it_has_memory_for(count: int, room: float, blocks: int | None) -> None:
    """Blocks go whole: a number of them that fits all ranks' memory together may leave one rank with twice its share."""
    batch, pair = random_batch(60, 2), 2 * 1000 * 4
    sharding = Sharding(Ranks(0, count))

    def most(units: Units) -> float:
        found = units_on_a_rank(sharding, batch, units)
        assert found == max(len(share) for share in units.deal(batch.positions, count))
        return found

    found = plan(prompts=60, memory_bytes=room * pair / VECTOR_SHARE, most_held=most)
    if blocks is None:
        assert (found.units.mode, found.storage) == (Mode.EXACT, Storage.STREAMED)
    else:
        assert (found.units.mode, found.storage, len(found.units.ranges)) == (Mode.BLOCK, Storage.STORED, blocks)
        assert most(found.units) <= room
    asked = plan(prompts=60, blocks=17, memory_bytes=room * pair / VECTOR_SHARE, most_held=most)
    assert asked.storage is (Storage.STORED if most(asked.units) <= room else Storage.STREAMED)


def test_of_shards_every_rank_holds_its_part_of_all() -> None:
    units = plan(prompts=60).units
    assert units_on_a_rank(Sharding(Ranks(0, 8), sharded=True), random_batch(60, 2), units) == 60 / 8
