"""`inspect` names every trainable parameter, the rule, and what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from entropy_probe.checkpoints.decay_rules import RULES
from support import (
    make_checkpoint,
    run_command,
    tiny_model,
)


def test_inspect_names_every_trainable_parameter_and_the_rule(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, "gemma2")
    outcome = run_command("inspect", checkpoint)
    assert outcome.code == 0
    assert not outcome.lines
    lines = [line.split() for line in outcome.out.splitlines()]
    sound = {words[0] for words in lines if words and words[-1] == "ok"}
    assert sound == {name for name, _ in tiny_model("gemma2").named_parameters()}
    assert RULES[0].name in " ".join(outcome.out.split())


def test_inspect_on_a_narrow_terminal_still_shows_whole_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = run_command("inspect", make_checkpoint(tmp_path)).out
    assert "\x1b[" in out
    assert "…" not in out


def test_inspect_points_at_the_parameter_whose_second_moment_is_missing(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path)
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    model = tiny_model()
    names = [name for names in RULES[0].groups(model) for name in names]
    del saved["state"][6]
    torch.save(saved, checkpoint / "optimizer.pt")
    outcome = run_command("inspect", checkpoint)
    assert outcome.code == 2
    assert len(outcome.lines) == 1
    (line,) = [line for line in outcome.out.splitlines() if line.startswith(names[6])]
    assert "no Adam state" in line
    assert sum(line.rstrip().endswith(" ok") for line in outcome.out.splitlines()) == len(names) - 1
    assert "1 without a usable Adam state" in outcome.out
