"""Which format a checkpoint folder has: the one place that decides, and what is said where none fits."""

from __future__ import annotations

from pathlib import Path

from entropy_probe.checkpoints.formats.accelerate_full import AccelerateFull
from entropy_probe.checkpoints.formats.accelerate_sharded import AccelerateSharded
from entropy_probe.checkpoints.formats.base import ADAM_STATE, Format
from entropy_probe.checkpoints.formats.dcp import DcpFolder
from entropy_probe.checkpoints.formats.deepspeed import DeepSpeed
from entropy_probe.checkpoints.formats.foreign import layers, refuse_foreign
from entropy_probe.checkpoints.formats.fsdp_ranks import FsdpRanks
from entropy_probe.checkpoints.formats.trainer import TrainerFolder
from entropy_probe.errors import InputError, some_of

FORMATS: tuple[Format, ...] = (
    FsdpRanks(),
    DeepSpeed(),
    AccelerateSharded(),
    AccelerateFull(),
    DcpFolder(),
    TrainerFolder(),
)
"""All that are read. The first that detects a folder has it, so that the more special ones come first."""


def format_of(path: Path) -> Format:
    """The format of a checkpoint folder.

    Raises:
        InputError: no folder, empty, another framework's, around checkpoints that are read, or none of these.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; expected a checkpoint folder such as checkpoint-100")
    found = _detected(path)
    if found is None:
        refuse_misplaced(path)
        raise InputError(
            f"{path} has no optimizer.pt, no config.json and no weights, so it is no checkpoint that is read; expected a "
            "checkpoint folder such as checkpoint-100"
        )
    return found


def refuse_misplaced(path: Path) -> None:
    """Say what a folder is that lacks what is looked for.

    Raises:
        InputError: it is empty, holds checkpoints that are read, or is another framework's.
    """
    if _is_empty(path):
        raise InputError(f"{path} is empty; expected a checkpoint folder such as checkpoint-100")
    inside = [[folder for folder in layer if folder != path and _may_be_given(folder)] for layer in layers(path)]
    inner = [str(folder.relative_to(path)) for folder in next(filter(None, inside), [])]
    if inner:
        which = "that" if len(inner) == 1 else "one of them"
        raise InputError(f"{path} is not itself a checkpoint that is read, but holds {some_of(inner)}; give {which}")
    refuse_foreign(path)


def _detected(path: Path) -> Format | None:
    return next((known for known in FORMATS if known.detects(path)), None)


def _may_be_given(folder: Path) -> bool:
    """Whether all is there, or Adam's state: what is missing beside it is told by name where the folder is given."""
    found = _detected(folder)
    if found is None:
        return False
    files = found.files(folder)
    return all(file.names for file in files if file.required) or any(
        file.names for file in files if file.purpose.startswith(ADAM_STATE)
    )


def _is_empty(path: Path) -> bool:
    try:
        return next(path.iterdir(), None) is None
    except OSError:
        return False
