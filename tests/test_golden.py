"""Golden reports: what moves code about changes no number. Each field of two whole reports is as it was when they were written.

After a change that is meant to change them ``python tests/test_golden.py`` writes them again; the commit says why they changed.
"""

from __future__ import annotations

import json
import math
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from entropy_probe import Settings, probe_checkpoint, read_rollouts, write_rollouts
from entropy_probe.statistics.linearity import SweepRange

GOLDEN = Path(__file__).parent / "data" / "golden"
DEMO = Path(str(files("entropy_probe"))) / "demo_data"
KINDS = ("full", "lora")
PROMPTS = 6
OF_THE_RUN = ("timing", "versions")
RELATIVE, ABSOLUTE = 1e-7, 1e-10
"""Float64 repeats to 1e-12 on other machines; where such numbers cancel, less is left."""
DIFFERENCED = ("curvature", "second_order", "linear_until", "slope", "r_squared")
DIFFERENCED_RELATIVE = 1e-4
"""Of finite differences, in which rounding shows as 1e-6."""
ROUNDING = ("noise_floor", "self_test_residual", "curvature_error", "curvature_h")
ROUNDINGS = 100.0
"""What is a rounding error may be that many times as large on another machine, or as small."""


def report_of(kind: str, folder: Path) -> dict[str, Any]:
    """Part of a run's bundled step, with what needs no further file, by settings that do not look at the machine."""
    rows = read_rollouts(DEMO / kind / "rollouts" / "step-00021.jsonl")
    prompts = list(dict.fromkeys(row.prompt_id for row in rows))[:PROMPTS]
    rollouts = folder / "rollouts.jsonl"
    write_rollouts((row for row in rows if row.prompt_id in prompts), rollouts)
    settings = Settings(
        dtype=torch.float64,
        microbatch_size=40,
        memory_bytes=1e9,
        split=2,
        sweep=SweepRange.parse("0.5:2:2"),
        what_if_fall=0.01,
    )
    base = DEMO / "base" if kind == "lora" else None
    result = probe_checkpoint(DEMO / kind / "checkpoint-20", rollouts, settings, base=base, device="cpu")
    text = json.dumps(result.report.to_dict(), ensure_ascii=False)
    found: dict[str, Any] = json.loads(text.replace(str(DEMO), "demo_data").replace(str(folder), "folder"))
    return {name: value for name, value in found.items() if name not in OF_THE_RUN}


def differences(found: Any, expected: Any, where: str = "report") -> list[str]:
    """Every place where two reports differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        places = (
            [f"{where}: has {sorted(found.keys() ^ expected.keys())} on one side"]
            if found.keys() != expected.keys()
            else []
        )
        for name in found.keys() & expected.keys():
            places += differences(found[name], expected[name], f"{where}.{name}")
        return places
    if isinstance(expected, list) and isinstance(found, list):
        if len(found) != len(expected):
            return [f"{where}: {len(found)} entries, not {len(expected)}"]
        return [
            p for n, (a, b) in enumerate(zip(found, expected, strict=True)) for p in differences(a, b, f"{where}[{n}]")
        ]
    if isinstance(expected, float) and isinstance(found, float):
        name = where.rpartition(".")[2].partition("[")[0]
        low, high = sorted((abs(found), abs(expected)))
        if name in ROUNDING and high <= ROUNDINGS * max(1e-12, low):
            return []
        if math.isclose(
            found, expected, rel_tol=DIFFERENCED_RELATIVE if name in DIFFERENCED else RELATIVE, abs_tol=ABSOLUTE
        ):
            return []
    elif found == expected and type(found) is type(expected):
        return []
    return [f"{where}: {found!r}, not {expected!r}"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_report_is_as_it_was(kind: str, tmp_path: Path) -> None:
    expected = json.loads((GOLDEN / f"{kind}.json").read_text(encoding="utf-8"))
    found = differences(report_of(kind, tmp_path), expected)
    assert not found, "\n".join(found[:20])


def test_the_comparison_sees_a_number_a_word_and_a_field_that_changed() -> None:
    one = {"a": 1.0, "b": ["x", 2], "noise_floor": 1e-13}
    assert differences(one, {"a": 1.0, "b": ["x", 2], "noise_floor": 5e-14}) == []
    assert len(differences(one, {"a": 1.000001, "b": ["y", 2.0], "noise_floor": 1e-9, "c": None})) == 5


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for each in KINDS:
        with tempfile.TemporaryDirectory() as place:
            report = report_of(each, Path(place))
        text = json.dumps(report, indent=1, ensure_ascii=False, sort_keys=True)
        (GOLDEN / f"{each}.json").write_text(text + "\n", encoding="utf-8")
