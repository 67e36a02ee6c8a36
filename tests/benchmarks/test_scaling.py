"""What ranks hand over is what benchmarks/scaling_formulas.py says, and docs/scaling.md is made from it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from entropy_probe.data.rollouts import write_rollouts
from entropy_probe.gradients import Storage
from entropy_probe.pipeline.settings import ShardingChoice
from entropy_probe.ranks.collectives import Kind
from entropy_probe.targets.choices import Estimator

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402
import scaling_formulas as formulas  # noqa: E402
import scaling_page  # noqa: E402

WIDTH = 16
SHARDED = formulas.Choice(ShardingChoice.FSDP2, Storage.STORED)
STORED = formulas.Choice(ShardingChoice.REPLICATED, Storage.STORED)


@pytest.mark.parametrize(
    "case",
    [
        scaling.Case(WIDTH, 6, 2, STORED),
        # Prompts split over microbatches, and uneven shares of units and rows.
        scaling.Case(WIDTH, 4, 3, SHARDED, Estimator.SCORE, microbatch=1),
    ],
    ids=["replicated", "fsdp2"],
)
def test_ranks_hand_over_what_the_formulas_say(case: scaling.Case, tmp_path: Path) -> None:
    scaling.write_checkpoint(tmp_path / f"width-{WIDTH}", WIDTH)
    rows = scaling.rollouts_of(case.units, case.tokens)
    write_rollouts(rows, tmp_path / f"rollouts-{case.units}-{case.tokens}.jsonl")
    row = scaling.measure(case, tmp_path)
    for kind in (Kind.SHARDS, Kind.SUMS, Kind.DIRECTIONS):
        one_more = [dict(expected) | {kind: expected[kind] + 1} for expected in row.expected]
        with pytest.raises(AssertionError, match=f"elements of {kind}"):
            scaling.check(case, row.found, one_more, 38)
    fewer = [dict(expected) | {Kind.NUMBERS: expected[Kind.NUMBERS] - 10_000} for expected in row.expected]
    with pytest.raises(AssertionError, match="numbers beyond"):
        scaling.check(case, row.found, fewer, 38)


def test_memory_that_does_not_fall_is_told() -> None:
    width, units, _ = scaling.SHAPES[-1]

    def row(ranks: int, memory: int) -> scaling.Row:
        found = scaling.Found({}, {}, memory, 0.0)
        return scaling.Row(scaling.Case(width, units, ranks, STORED), 10**6, [found], [], 0)

    vectors = 8 * 10**6 * units
    scaling.check_memory([row(1, vectors), row(2, vectors // 2)])
    with pytest.raises(AssertionError, match="grew by"):
        scaling.check_memory([row(1, vectors), row(2, vectors)])


@pytest.mark.parametrize(
    ("name", "parameters"), [("1.5B", 1_543_714_304), ("7B", 7_615_616_512), ("70B", 70_553_706_496)]
)
def test_shapes_have_the_parameters_of_the_models_they_are_named_after(name: str, parameters: int) -> None:
    """As Qwen2.5 and Llama 3 are published."""
    (model,) = (m for m in formulas.MODELS if m.name == name)
    assert model.parameters == parameters


def test_adapters_have_r_times_both_sides_of_every_projection() -> None:
    model = replace(formulas.MODELS[2], rank=16)
    # q and o: d + d; k and v: d / 8 + d; gate, up and down: d + f.
    d, f = 8192, 28672
    assert model.trained == 80 * 16 * (2 * 2 * d + 2 * (d // 8 + d) + 3 * (d + f))


def test_the_page_is_what_the_formulas_give() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    found = [name for _, name, _ in scaling_page.ROW.findall(page)]
    assert sorted(found) == sorted(scaling_page.TABLES)
    assert scaling_page.filled(page) == page, "run python benchmarks/scaling_page.py docs/scaling.md"
