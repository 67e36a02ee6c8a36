"""DeepSpeed's files of one step: what each rank wrote, opened and held to each other.

``mp_rank_00_model_states.pt`` (ZeRO 3: ``zero_pp_rank_R_mp_rank_00_model_states.pt``) has the module, the names and shapes of
every optimizer group (``param_shapes``) and what was frozen; ``[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt`` a rank's part
of the flat master weights and moments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe.checkpoints.files.rank_files import live_name
from entropy_probe.checkpoints.files.saved import Record, Saved, dictionary, read_saved
from entropy_probe.errors import InputError, some_of

MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
UNREAD = ("layer_*_model_states.pt", "*expp_rank_*_optim_states.pt", "layer_*-model_*-model_states.pt")
"""Experts or layers in files of their own."""

OF_MODEL, OF_OPTIMIZER = "DeepSpeed's model states", "DeepSpeed's optimizer states"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelStates:
    """The model states, rank 0's first; below ZeRO 3 there is one file for all.

    Attributes:
        files: as opened.
        module: rank 0's state_dict by name; under ZeRO 3 parameters have no elements there.
        groups: for every flat vector of the optimizer, names and shapes in order; None where it has none.
        frozen: names and shapes of parameters that are not trained.
        tied: names that are another parameter's too.
        world_size: of data parallel ranks; None where the file does not say.
        step: optimizer steps, by DeepSpeed's count.
    """

    files: Sequence[Saved]
    module: Mapping[str, Tensor]
    groups: Sequence[Shapes] | None
    frozen: Shapes
    tied: frozenset[str]
    world_size: int | None
    step: int | None

    @staticmethod
    def open(folder: Path) -> ModelStates | None:
        """Map them; None where there are none.

        Raises:
            InputError: damaged, of several steps, or of ranks that split the model.
        """
        found = _by_rank(folder, "*mp_rank_*_model_states.pt", MODEL)
        if not found:
            return None
        files = [read_saved(file, OF_MODEL) for file in found.values()]
        states = [dictionary(file, of=OF_MODEL) for file in files]
        steps = [_whole(state.get("global_steps")) for state in states]
        for file, step in zip(files, steps, strict=True):
            if step != steps[0]:
                raise InputError(
                    f"{file.path} is of step {step}, {files[0].path.name} of {steps[0]}: copy one step's files"
                )
        first, path = states[0], files[0].path
        module = dictionary(files[0], "module", of=OF_MODEL)
        groups = first.get("param_shapes")
        frozen = first.get("frozen_param_shapes") or {}
        tied = first.get("shared_params") or {}
        if groups is not None and not (isinstance(groups, Sequence) and all(isinstance(g, Mapping) for g in groups)):
            raise InputError(f"{path}: param_shapes is a {type(groups).__name__}; expected a list of dictionaries")
        if not isinstance(frozen, Mapping) or not isinstance(tied, Mapping):
            raise InputError(f"{path}: frozen_param_shapes or shared_params is no dictionary; the file is damaged")
        return ModelStates(
            files=files,
            module={live_name(str(key)): value for key, value in module.items() if isinstance(value, Tensor)},
            groups=None if groups is None else [_shapes(group) for group in groups],
            frozen=_shapes(frozen),
            tied=frozenset(live_name(str(name)) for name in tied),
            world_size=_whole(first.get("dp_world_size")),
            step=steps[0],
        )

    @property
    def path(self) -> Path:
        """Of rank 0's file."""
        return self.files[0].path

    @property
    def mapped(self) -> bool:
        """Whether the tensors are pages of the files."""
        return all(file.mapped for file in self.files)

    @property
    def forward(self) -> torch.dtype | None:
        """The type of the module's parameters."""
        trained = {name for group in self.groups or () for name in group}
        found = [value for name, value in self.module.items() if not trained or name in trained]
        return next((value.dtype for value in found if value.is_floating_point()), None)

    def fragments(self, name: str) -> list[Tensor]:
        """The ranks' parts of a frozen parameter under ZeRO 3.

        Raises:
            InputError: a rank's file has none.
        """
        found = []
        for file in self.files:
            kept = dictionary(file, "frozen_param_fragments", of=OF_MODEL)
            part = next((value for key, value in kept.items() if live_name(str(key)) == name), None)
            if not isinstance(part, Tensor):
                raise InputError(f"{file.path} has no part of the frozen parameter {name}; the file is damaged")
            found.append(part)
        return found


@dataclass(frozen=True)
class OptimizerStates:
    """The optimizer states of all ranks, rank 0's first: ``states`` is what is under optimizer_state_dict."""

    files: Sequence[Saved]
    states: Sequence[Mapping[str, Any]]

    @staticmethod
    def open(folder: Path, world_size: int | None) -> OptimizerStates | None:
        """Map them; None where there are none.

        Raises:
            InputError: damaged, a rank's is missing, or of another world size.
        """
        found = _by_rank(folder, "*_optim_states.pt", OPTIM)
        if not found:
            return None
        count = world_size if world_size is not None else max(found) + 1
        example = next(iter(found.values())).name
        missing = [OPTIM_RANK.sub(f"zero_pp_rank_{rank}_", example, 1) for rank in range(count) if rank not in found]
        if missing:
            raise InputError(
                f"{folder} has no {some_of(missing)}; {count} ranks wrote the checkpoint, and every rank's file is needed: "
                "copy them from the ranks' disks"
            )
        if len(found) > count:
            raise InputError(
                f"{folder} holds {found[max(found)].name}, and its model states say that {count} ranks wrote it: files of "
                "several checkpoints; leave one's there"
            )
        files = [read_saved(file, OF_OPTIMIZER) for file in found.values()]
        states = [dictionary(file, "optimizer_state_dict", of=OF_OPTIMIZER) for file in files]
        for file, state in zip(files, states, strict=True):
            said = state.get("partition_count")
            counts = [_whole(value) for value in (said if isinstance(said, list) else [said])]
            if any(value not in (None, count) for value in counts):
                raise InputError(
                    f"{file.path} is of {counts[0]} ranks, and {count} ranks' files are there; copy one checkpoint's"
                )
        return OptimizerStates(files, states)

    @property
    def path(self) -> Path:
        """Of rank 0's file."""
        return self.files[0].path

    @property
    def mapped(self) -> bool:
        """Whether the tensors are pages of the files."""
        return all(file.mapped for file in self.files)

    @property
    def count(self) -> int:
        """Of ranks."""
        return len(self.files)

    def settings(self, name: str) -> Mapping[str, Any]:
        """A part of DeepSpeed's configuration; empty where the files have none."""
        found = self.files[0].content.get("ds_config")
        part = found.get(name) if isinstance(found, Mapping) else None
        return part if isinstance(part, Mapping) else {}


OPTIM_RANK = re.compile(r"zero_pp_rank_\d+_")


def fragment(value: object) -> tuple[int, int] | None:
    """(start, number of elements) of a parameter in a rank's flat vector, from DeepSpeed's record; None where it is none."""
    if not isinstance(value, Record):
        return None
    held = dict(zip(("numel", "start"), value.arguments, strict=False)) | dict(value.state)
    start, numel = _whole(held.get("start")), _whole(held.get("numel"))
    return None if start is None or numel is None else (start, numel)


def _by_rank(folder: Path, pattern: str, named: re.Pattern[str]) -> dict[int, Path]:
    """Files by rank in order."""
    for unread in UNREAD:
        strange = sorted(file.name for file in folder.glob(unread))
        if strange:
            raise InputError(
                f"{folder} holds {some_of(strange)}: experts or layers in files of their own (expert or pipeline parallel), "
                "which are not read"
            )
    found: dict[int, Path] = {}
    for file in folder.glob(pattern):
        match = named.fullmatch(file.name)
        if match is None:
            continue
        if int(match[2]):
            raise InputError(f"{file} is of a rank that has a part of the model (tensor parallel), which is not read")
        rank = int(match[1] or 0)
        if rank in found:
            raise InputError(f"{folder} holds both {found[rank].name} and {file.name}; leave one checkpoint's there")
        found[rank] = file
    return dict(sorted(found.items()))


def _shapes(group: Mapping[Any, Any]) -> Shapes:
    return {live_name(str(name)): tuple(int(size) for size in shape) for name, shape in group.items()}


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
