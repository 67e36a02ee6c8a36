"""``convert`` writes a trainer's dump as our rows; ``run`` and ``replay`` take it, and several files, as they are."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from dumps import EXACT, TEXT, lines, open_instruct, without_tools, written
from entropy_probe import InputError, read_rollouts, write_rollouts
from entropy_probe.data.bundled_run import demo_folder
from spoiled import Place, assert_refused
from support import run_command

TOKENIZER = demo_folder() / "full" / "checkpoint-20"


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_convert_writes_the_rows_that_the_dump_holds(name: str, suffix: str, tmp_path: Path) -> None:
    path, out = written(name, tmp_path), tmp_path / f"ours{suffix}"
    outcome = run_command("convert", path, "--out", out)
    assert outcome.code == 0, outcome.err
    assert "4 responses to 2 prompts written to" in " ".join(outcome.out.split())
    assert read_rollouts(out) == read_rollouts(path)
    assert run_command("convert", path, "--from", name, "--out", out).code == 0


def test_convert_takes_a_step_of_several_files(tmp_path: Path) -> None:
    for shard, step in enumerate((3, 4)):
        lines(tmp_path / f"a_{shard}.jsonl", open_instruct(without_tools(), step))
    out = tmp_path / "ours.jsonl"
    assert_refused(run_command("convert", tmp_path / "a_*.jsonl", "--out", out), "2 steps (3, 4)")
    assert not out.exists()
    assert run_command("convert", tmp_path / "a_*.jsonl", "--step", "4", "--out", out).code == 0
    assert {row.step for row in read_rollouts(out)} == {5}


@pytest.mark.parametrize("name", TEXT)
def test_text_is_refused_and_retokenised_where_the_user_insists(name: str, tmp_path: Path) -> None:
    def bare(rows: list[dict[str, Any]]) -> None:  # letters that the bundled tokenizer knows
        for row in rows:
            column = "input" if name == "verl" else "prompt"
            row[column] = row[column].removeprefix("user\n")

    path, out = written(name, tmp_path, bare), tmp_path / "ours.jsonl"
    assert_refused(run_command("convert", path, "--out", out), "no token ids")
    assert not out.exists()
    outcome = run_command("convert", path, "--retokenize", "--tokenizer", TOKENIZER, "--out", out)
    assert outcome.code == 0, outcome.err
    assert "0 of 4 responses" in " ".join(outcome.out.split())
    assert all(json.loads(line)["retokenized"] for line in out.read_text().splitlines())


def test_bad_options_of_convert_are_refused(tmp_path: Path) -> None:
    path, out = written("nemo-rl", tmp_path), tmp_path / "ours.jsonl"
    assert_refused(run_command("convert", path, "--out", tmp_path / "x.csv"), "'.csv'")
    assert_refused(run_command("convert", path, "--retokenize", "--out", out), "go together")
    both = ["--retokenize", "--tokenizer", TOKENIZER]
    assert_refused(run_command("convert", path, *both, "--out", out), "holds exact token ids")
    assert_refused(
        run_command("convert", path, "--retokenize", "--tokenizer", tmp_path, "--out", out), "tokenizer_config"
    )
    assert_refused(run_command("convert", path, "--from", "elsewhere", "--out", out), "elsewhere")
    assert_refused(run_command("convert", path, "--from", "slime", "--out", out), "line 1 has no tokens")
    write_rollouts(read_rollouts(path), out)
    assert_refused(run_command("convert", out, "--out", tmp_path / "again.jsonl"), "rows of ours already")
    assert not (tmp_path / "again.jsonl").exists()


class Reached:
    """Stands in for the work: keeps its arguments and refuses."""

    def __call__(self, *positional: Any, **named: Any) -> Any:
        self.positional, self.named = positional, named
        raise InputError("the work was reached")


def test_several_files_of_run_and_replay_reach_the_work_as_a_list(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = ["--rollouts", "a.jsonl", "--rollouts", "b.jsonl"]
    work = Reached()
    monkeypatch.setattr(importlib.import_module("entropy_probe.cli.run"), "probe_checkpoint", work)
    options = [*two, "--evaluation-rollouts", "c.jsonl", "--evaluation-rollouts", "d.jsonl"]
    assert_refused(run_command("run", place.checkpoint, *options), "the work was reached")
    assert work.positional[1] == [Path("a.jsonl"), Path("b.jsonl")]
    assert work.named["evaluation_rollouts"] == [Path("c.jsonl"), Path("d.jsonl")]
    monkeypatch.setattr(importlib.import_module("entropy_probe.cli.replay").replay_check, "replay", work)
    assert_refused(run_command("replay", place.checkpoint, place.root, *two), "the work was reached")
    assert work.positional[2] == [Path("a.jsonl"), Path("b.jsonl")]


def test_run_takes_a_dump_and_its_report_says_which(place: Place) -> None:
    written("open-instruct", place.root)
    written("nemo-rl", place.root)
    run = ["run", place.checkpoint, "--device", "cpu", "--no-noise", "--json", "report.json", "--length-weight", "grpo"]
    outcome = run_command(*run, "--rollouts", "run_rollouts_000000.jsonl")
    assert outcome.code == 0, outcome.err
    config = json.loads(Path("report.json").read_text())["config"]
    assert config["rollouts"] == "run_rollouts_000000.jsonl (open-instruct's traces)"
    written("verl", place.root)
    assert_refused(run_command(*run, "--rollouts", "50.jsonl"), "50.jsonl is verl's rollout data")
    assert_refused(run_command(*run, "--rollouts", "*.jsonl"), "one batch is of one layout")


def test_a_batch_in_several_files_is_probed_as_in_one(place: Place) -> None:
    rows = read_rollouts(place.rollouts)
    for rank in (0, 1):
        write_rollouts(rows[rank::2], place.root / f"part-rank{rank}.jsonl")
    run = ["run", place.checkpoint, "--device", "cpu", "--no-noise", "--dtype", "float64"]
    assert run_command(*run, "--rollouts", "part-rank*.jsonl", "--json", "parts.json").code == 0
    write_rollouts([*rows[::2], *rows[1::2]], place.root / "whole.jsonl")
    assert run_command(*run, "--rollouts", "whole.jsonl", "--json", "whole.json").code == 0
    found, expected = (json.loads(Path(name).read_text()) for name in ("parts.json", "whole.json"))
    assert found["first_order"] == expected["first_order"]
    assert found["config"]["rollouts"] == "part-rank0.jsonl, part-rank1.jsonl"
