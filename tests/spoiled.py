"""A sound checkpoint with sound rollouts for a test to spoil, and what a refusal must look like."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support import (
    Outcome,
    fingerprint,
    hf_groups,
    run_command,
    tiny_model,
)

CONTEXT = 64
Row = dict[str, Any]
NORM = "model.layers.1.input_layernorm.weight"


@dataclass(frozen=True)
class Place:
    """A folder with a sound checkpoint and sound rollouts in it, for a test to spoil."""

    root: Path

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint-3"

    @property
    def rollouts(self) -> Path:
        return self.root / "rollouts.jsonl"

    @property
    def optimizer(self) -> Path:
        return self.checkpoint / "optimizer.pt"

    @property
    def weights(self) -> Path:
        return self.checkpoint / "model.safetensors"

    def names(self) -> list[str]:
        """Parameter names in the order of the optimizer's indices."""
        model = tiny_model()
        names = {id(p): name for name, p in model.named_parameters()}
        return [names[id(p)] for group in hf_groups(model) for p in group["params"]]

    def edit_optimizer(self, change: Callable[[dict[str, Any]], object]) -> None:
        saved = torch.load(self.optimizer, weights_only=True)
        change(saved)
        torch.save(saved, self.optimizer)

    def edit_weights(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights, metadata={"format": "pt"})

    def edit_rows(self, change: Callable[[list[Row]], object]) -> None:
        rows = [json.loads(line) for line in self.rollouts.read_text().splitlines()]
        change(rows)
        self.rollouts.write_text("".join(json.dumps(row) + "\n" for row in rows))


def assert_refused(outcome: Outcome, *culprits: str) -> None:
    assert outcome.code == 2, (outcome.code, outcome.err)
    assert len(outcome.lines) == 1, outcome.err
    assert outcome.err.endswith("\n")
    assert "Traceback" not in outcome.err
    for culprit in culprits:
        assert culprit in outcome.lines[0], (culprit, outcome.lines[0])


def refuse(place: Place, arguments: Sequence[str | Path], *culprits: str) -> None:
    """The command is refused, and no file under the working folder appears, disappears or changes."""
    before = fingerprint(place.root)
    outcome = run_command(*arguments)
    assert_refused(outcome, *culprits)
    assert fingerprint(place.root) == before


def refuse_run(place: Place, *culprits: str, options: Sequence[str] = (), rollouts: Path | None = None) -> None:
    chosen = place.rollouts if rollouts is None else rollouts
    outputs = ["--json", place.root / "report.json", "--out", place.root / "report"]
    refuse(place, ["run", place.checkpoint, "--rollouts", chosen, *outputs, *options], *culprits)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
