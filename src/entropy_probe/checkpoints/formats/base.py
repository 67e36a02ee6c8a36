"""What a checkpoint format tells of a folder: whether it is one, what is in it, and where each tensor's values are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from entropy_probe.checkpoints.files.stored import StoredOptimizer, StoredTensor
from entropy_probe.checkpoints.files.trainer_state import TrainerState


@dataclass(frozen=True)
class StoredWeights:
    """A whole model's weights.

    Attributes:
        tensors: by the live model's parameter and buffer names. A name may lack the prefix of the model inside the one with a
            head, and every tied tensor may be there under one name or under all.
        pretrained: the folder, if transformers' ``from_pretrained`` reads the same weights from it. One process then leaves it
            to transformers, which renames and merges what older versions stored otherwise; ``tensors`` are as in the file.
        forward: the type that the trainer cast them to for its forward, where they are its optimizer's master weights; None
            where the forward took them as they are, or the folder does not say.
    """

    tensors: Mapping[str, StoredTensor]
    pretrained: Path | None = None
    forward: torch.dtype | None = None


@dataclass(frozen=True)
class StoredAdapter:
    """A PEFT adapter's weights and configuration.

    Attributes:
        settings: what adapter_config.json holds; ``base_model_name_or_path`` may name the base, relative to the checkpoint.
        tensors: by the names of PEFT's state dict, with or without the adapter's own name in them.
        pretrained: the folder, if PEFT's ``from_pretrained`` reads the same adapter from it; as for weights.
        forward: as for weights.
        name: the adapter's own, which is in the names of its parameters.
    """

    settings: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    pretrained: Path | None = None
    forward: torch.dtype | None = None
    name: str = "default"


ADAM_STATE = "Adam state"
"""The purpose of the files without which a folder is no checkpoint to probe."""


@dataclass(frozen=True)
class FoundFile:
    """A kind of file, what it is for, the names found, and whether the probe needs one."""

    pattern: str
    purpose: str
    names: tuple[str, ...]
    required: bool


class Format(Protocol):
    """One layout of checkpoint folders. Nothing is read before it is asked for, and of tensors only what is asked for.

    Every method takes a folder that ``detects`` has accepted, and raises InputError, in one line, for what is damaged.
    """

    @property
    def name(self) -> str:
        """What people call such a folder, after "a" or "an"."""

    def detects(self, path: Path) -> bool:
        """Whether a folder is of this format, told by the names of files in it."""

    def files(self, path: Path) -> tuple[FoundFile, ...]:
        """The kinds of files in the folder; with every required one it can be probed."""

    def world_size(self, path: Path) -> int | None:
        """How many ranks wrote the folder; None where it does not say."""

    def configuration(self, path: Path) -> Path | None:
        """The folder whose config.json describes the whole model; None where a base must be given."""

    def weights(self, path: Path) -> StoredWeights | None:
        """The whole model's weights; None where there are none that are read, as beside an adapter."""

    def adapter(self, path: Path) -> StoredAdapter | None:
        """The PEFT adapter that was trained; None where the model itself was."""

    def optimizer(self, path: Path) -> StoredOptimizer | None:
        """Adam's groups and state; None where there is none that is read."""

    def trainer_state(self, path: Path) -> TrainerState:
        """Which step the checkpoint is of, and what the trainer logged on the way there."""


def found_file(path: Path, pattern: str, purpose: str, *, required: bool) -> FoundFile:
    """The names that match a pattern in a folder."""
    names = tuple(sorted(str(file.relative_to(path)) for file in path.glob(pattern)))
    return FoundFile(pattern, purpose, names, required)
