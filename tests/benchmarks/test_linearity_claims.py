"""The claims of benchmarks/linearity.py on part of a bundled checkpoint: slope 1, the rest quadratic; planted bugs fail."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from entropy_probe.data.bundled_run import demo_folder

FILE = Path(__file__).parents[2] / "benchmarks" / "linearity.py"
CHECKPOINT = demo_folder() / "full" / "checkpoint-60"
ROLLOUTS = demo_folder() / "full" / "rollouts" / "checkpoint-60.jsonl"


@pytest.fixture(scope="module")
def linearity() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("linearity", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["linearity"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["linearity"]


@pytest.fixture(scope="module")
def lines(linearity: ModuleType) -> Any:
    """Shared: what a line has evaluated once is not evaluated again."""
    return linearity.lines(CHECKPOINT, ROLLOUTS, prompts=4)


@pytest.mark.long
def test_both_steps_on_both_batches_are_linear_and_then_quadratic(linearity: ModuleType, lines: Any) -> None:
    seen = [
        linearity.figures(line.curve(m), row.predicted, row.noise_floor) for line, rows in lines for m, row in enumerate(rows)
    ]  # fmt: skip
    assert len(seen) == 8
    for figures in seen:
        assert figures.slope == pytest.approx(1.0, abs=0.01)
        assert figures.r_squared >= 0.9999
        assert figures.drowned or figures.exponent == pytest.approx(2.0, abs=0.05)
        assert figures.holds


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_a_linear_term_that_is_off_by_two_percent_fails(linearity: ModuleType, lines: Any, factor: float) -> None:
    # The preconditioned step on its own batch, AdamW's held out.
    for line, rows in lines[::3]:
        for m, row in enumerate(rows):
            assert not linearity.figures(line.curve(m), factor * row.predicted, row.noise_floor).holds


def test_a_curve_without_a_linear_part_does_not_pass(linearity: ModuleType) -> None:
    assert not linearity.figures(lambda alpha: alpha**1.02 + 1e-3 * alpha**2, 1.0, 1e-15).holds


def test_a_third_order_that_reaches_into_the_range_is_told_and_not_passed(linearity: ModuleType) -> None:
    found = linearity.figures(lambda alpha: alpha + 1e-4 * alpha**2 + 0.01 * alpha**3, 1.0, 1e-16)
    assert not found.is_quadratic
    assert found.inner_exponent == pytest.approx(2.0, abs=0.05)
