"""The examples run, and what they print is what they are about."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from entropy_probe import Settings, probe, read_batch, replay, state_of_optimizer

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_a_checkpoint_is_probed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("probe_checkpoint.py", monkeypatch)
    said = capsys.readouterr().out
    assert "the optimizer's next step lowers entropy by 0.0197 ± 0.0023 nats per response" in said
    assert said.count("realised, ") == 4


def test_trl_trains_recorded_and_probed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    run("live_in_trl.py", monkeypatch, "--steps", 3, "--out", tmp_path / "rollouts")
    said = capsys.readouterr().out
    assert re.findall(r"step (\d): entropy \d\.\d+ nats per response, predicted change [+-]0\.\d+ ±", said) == [
        "2",
        "3",
    ]
    assert sorted(p.name for p in (tmp_path / "rollouts").iterdir()) == [f"step-0000{n}.jsonl" for n in (1, 2, 3)]


def test_a_loop_of_ones_own_writes_rows_that_say_what_its_loss_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run("own_trainer_rows.py", monkeypatch, "--steps", 2, "--out", tmp_path)
    assert capsys.readouterr().out.count("realised on the same responses") == 1
    # The gradient that the probe makes of the rows is that of the loop's own loss.
    example: dict[str, Any] = runpy.run_path(str(EXAMPLES / "own_trainer_rows.py"))
    torch.manual_seed(1)
    model = example["make_model"]()
    optimizer = torch.optim.AdamW(model.parameters())
    rows = example["sample"](model, 1)
    example["loss_of"](model, rows).backward()
    norm = float(torch.sqrt(sum(((p.grad**2).sum() for p in model.parameters()), torch.zeros(()))))
    optimizer.step()
    with torch.no_grad():  # back to where the rows were sampled: the optimizer's state alone is wanted
        torch.manual_seed(1)
        for p, original in zip(model.parameters(), example["make_model"]().parameters(), strict=True):
            p.copy_(original)
    report = probe(model, state_of_optimizer(optimizer, model), rows, Settings(noise=False)).report
    assert report.adamw.gradient_norm == pytest.approx(norm, rel=1e-5)
    assert len(read_batch(tmp_path / "step-00002.jsonl").groups) == example["PROMPTS"]


@pytest.mark.long
def test_the_bundled_run_is_made_again_in_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    run("train_demo.py", monkeypatch, "--short", "--out", tmp_path)
    for kind in ("full", "lora"):
        run_of_kind = tmp_path / kind
        rollouts = run_of_kind / "rollouts" / "step-00002.jsonl"
        assert replay(run_of_kind / "checkpoint-1", run_of_kind / "checkpoint-2", rollouts).matched
