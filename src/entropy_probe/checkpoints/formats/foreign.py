"""Folders that other frameworks wrote and no format reads: each is recognised by the files that only it leaves, and named.

A format that reads one takes its row out of the table. A layout is looked for in the folder that was given, then in the
folders inside it, so that who gives a run's folder is told which inner one holds what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from entropy_probe.errors import InputError, some_of

CONVERT = (
    "convert it to a Trainer's folder: config.json, model.safetensors, and Adam's state as optimizer.pt, the state_dict of a "
    "torch.optim.AdamW with the list param_names in every group"
)
DEPTH = 3
"""How far down inner folders are looked into: a run's folder, its checkpoints, a step, one model's part of it."""

MOST_FOLDERS = 200
"""One depth alone is searched: what is given by mistake may be a whole disk."""


@dataclass(frozen=True)
class Layout:
    """One framework's checkpoint folder.

    Attributes:
        name: what it is, after "is a".
        detects: the telling files of a folder, relative to it; none where it is no such folder.
        advice: what its owner can do.
    """

    name: str
    detects: Callable[[Path], list[str]]
    advice: str


@dataclass(frozen=True)
class Recognised:
    """A folder of a known layout; ``where`` is the given folder or one inside it, ``files`` are relative to ``where``."""

    layout: Layout
    where: Path
    files: Sequence[str]


def _files(*patterns: str) -> Callable[[Path], list[str]]:
    """Detect by any file of these patterns; all are listed."""

    def detects(path: Path) -> list[str]:
        # No folders: Lightning calls the folder of DeepSpeed's or FSDP's files .ckpt, too.
        found = [file for pattern in patterns for file in sorted(path.glob(pattern)) if file.is_file()]
        return [str(file.relative_to(path)) for file in found]

    return detects


def _all_of(*patterns: str) -> Callable[[Path], list[str]]:
    """Detect only where every pattern finds a file; the first of each is listed."""

    def detects(path: Path) -> list[str]:
        found = [sorted(path.glob(pattern)) for pattern in patterns]
        return [str(files[0].relative_to(path)) for files in found] if all(found) else []

    return detects


DEEPSPEED = (
    "copy the files of all ranks, *_optim_states.pt and *_model_states.pt, from their disks into the folder that the file "
    "latest names"
)

LAYOUTS: tuple[Layout, ...] = (
    # Its ranks' files are on other machines' disks, or lost.
    Layout("DeepSpeed checkpoint without its ranks' files", _all_of("latest", "global_step[0-9]*"), DEEPSPEED),
    Layout(
        "Megatron checkpoint",
        _files(
            "common.pt",
            "mp_rank_*/model_optim_rng.pt",
            "mp_rank_*/distrib_optim.pt",
            "iter_*/common.pt",
            "iter_*/mp_rank_*/model_optim_rng.pt",
        ),
        f"Megatron's exporters keep weights alone; {CONVERT}",
    ),
    Layout(
        "torch.distributed.checkpoint (DCP) folder that is a part of a checkpoint, as accelerate's optimizer_0 is",
        _all_of(".metadata", "*.distcp"),
        "it is read as part of the checkpoint folder around it: give that",
    ),
    Layout(
        "checkpoint of FSDP's LOCAL_STATE_DICT, a part of flat vectors a rank",
        _files("pytorch_model_fsdp*_rank*.bin", "optimizer*_rank*.bin"),
        "save with SHARDED_STATE_DICT or FULL_STATE_DICT",
    ),
    Layout(
        "PyTorch Lightning checkpoint",
        _files("*.ckpt"),
        f"its state_dict holds the weights and its optimizer_states Adam's state; {CONVERT}",
    ),
    Layout(
        "torchtune folder",
        _files("recipe_state.pt", "recipe_state/*"),
        f"its recipe_state.pt holds Adam's state, beside the weights or in a folder of its own; {CONVERT}",
    ),
)


def recognise(path: Path) -> tuple[Recognised, ...]:
    """The foreign checkpoints in a folder: itself, or else those inside it, at most three folders down, or none."""
    return next(filter(None, (tuple(filter(None, map(_of, layer))) for layer in layers(path))), ())


def refuse_foreign(path: Path) -> None:
    """Name the framework whose checkpoint a folder is, or holds in folders inside it.

    Raises:
        InputError: it is such.
    """
    found = recognise(path)
    if not found:
        return
    first = found[0]
    what = f"a {first.layout.name} ({some_of(first.files)}), which is not read yet; {first.layout.advice}"
    if first.where == path:
        raise InputError(f"{path} is {what}")
    places = [str(known.where.relative_to(path)) for known in found if known.layout is first.layout]
    raise InputError(f"{path} holds in {some_of(places)} {what}")


def _of(folder: Path) -> Recognised | None:
    for layout in LAYOUTS:
        files = layout.detects(folder)
        if files:
            return Recognised(layout, folder, files)
    return None


def layers(path: Path) -> Iterator[list[Path]]:
    """The folder, those in it, those in them, and so on, three folders down."""
    layer = [path]
    for _ in range(DEPTH + 1):
        yield layer
        layer = [inner for folder in layer for inner in _folders(folder)][:MOST_FOLDERS]


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(inner for inner in path.iterdir() if inner.is_dir() and not inner.is_symlink())
    except OSError:
        return []
