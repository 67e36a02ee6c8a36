"""Test-wide settings: models here are too small for two threads to help."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings
from transformers.utils import logging

from entropy_probe.data.rollouts import write_rollouts
from spoiled import Place
from support import make_checkpoint, random_rollouts

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
# A change is judged by the same examples each time; `pytest --hypothesis-profile=default` draws others.
settings.register_profile("same-examples", derandomize=True)
settings.load_profile("same-examples")
logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.fixture(scope="module", autouse=True)
def accelerate_as_new() -> Iterator[None]:
    """A trainer settles accelerate's precision for its whole process, in which any other file may come next."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    make_checkpoint(root / "checkpoint-3")
    write_rollouts(random_rollouts(4, 2), root / "rollouts.jsonl")
    return root


@pytest.fixture
def place(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    shutil.copytree(sound, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return Place(tmp_path / "work")
