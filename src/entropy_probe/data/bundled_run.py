"""The bundled data: checkpoints of a real GRPO run, with rollouts (see ``examples/train_demo.py``, which made them)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path


@dataclass(frozen=True)
class DemoFiles:
    """What ``entropy-probe demo`` probes; ``max_completion_length`` is the run's Dr. GRPO constant."""

    checkpoint: Path
    rollouts: Path
    max_completion_length: int


def demo_folder() -> Path:
    """The folder of the bundled data."""
    return Path(str(resources.files("entropy_probe") / "demo_data"))


def demo_files() -> DemoFiles:
    """The checkpoint and rollouts that ``demo.json`` names."""
    folder = demo_folder()
    index = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    return DemoFiles(folder / index["checkpoint"], folder / index["rollouts"], int(index["max_completion_length"]))
