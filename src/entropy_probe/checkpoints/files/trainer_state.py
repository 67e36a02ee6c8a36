"""``trainer_state.json``: which step a checkpoint is of, and what the Trainer logged on the way there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_probe.common.files import read_json

TRAINING_KEY = "learning_rate"
"""What the Trainer writes into every training entry of its log and into no evaluation entry or summary."""


@dataclass(frozen=True)
class TrainerState:
    """``global_step`` is None where the file is missing or does not say; ``log`` holds the training entries, as written."""

    global_step: int | None
    log: tuple[Mapping[str, Any], ...]

    def logged(self, name: str, step: int) -> float | None:
        """A metric of the entry for that step; None where there is no such entry or number."""
        for entry in self.log:
            if entry.get("step") == step:
                value = entry.get(name)
                if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                    return float(value)
                return None
        return None

    def averaged_from(self, step: int) -> int:
        """The first of the steps that the entry for ``step`` averages over: the one after the entry before it."""
        earlier = [entry["step"] for entry in self.log if isinstance(entry.get("step"), int) and entry["step"] < step]
        return max(earlier, default=0) + 1


def read_trainer_state(folder: Path) -> TrainerState:
    """Of a checkpoint folder; empty where it has no such file.

    Raises:
        InputError: the file is not a JSON object.
    """
    file = folder / "trainer_state.json"
    if not file.is_file():
        return TrainerState(None, ())
    content = read_json(file)
    step, history = content.get("global_step"), content.get("log_history")
    entries = history if isinstance(history, list) else []
    return TrainerState(
        step if isinstance(step, int) and not isinstance(step, bool) else None,
        tuple(entry for entry in entries if isinstance(entry, dict) and TRAINING_KEY in entry),
    )
