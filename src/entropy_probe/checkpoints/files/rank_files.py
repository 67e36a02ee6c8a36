"""``KIND_world_size_W_rank_R.pt``: what every rank of FSDP saved of its own, and what the ranks hold together.

verl's names; SkyRL and AReaL have taken them over. A tensor is a DTensor, which says how it was cut, or plain: then every rank
holds it whole, or a flat part of it that only the reader knows how to put together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from entropy_probe.checkpoints.files.pieces import joined
from entropy_probe.checkpoints.files.saved import Saved, dictionary, read_saved
from entropy_probe.checkpoints.files.stored import StoredTensor
from entropy_probe.errors import InputError, some_of

FILE = re.compile(r"(model|optim)_world_size_(\d+)_rank_(\d+)\.pt")


EXPECTED = {"model": "an FSDP rank's state_dict of a model", "optim": "an FSDP rank's state_dict of an optimizer"}
"""What the files of a kind are, in words."""

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What wrappers of torch put into names."""


@dataclass(frozen=True)
class Part:
    """What one rank holds of a tensor of ``shape``: all of it, or number ``index`` of ``count`` parts along ``dim``."""

    shape: tuple[int, ...]
    local: Tensor
    dim: int | None
    index: int
    count: int


@dataclass(frozen=True)
class RankFiles:
    """The opened files of all ranks, rank 0 first."""

    files: Sequence[Saved]

    @staticmethod
    def open(folder: Path, kind: str) -> RankFiles | None:
        """Map all of a kind, "model" or "optim"; None where there is none.

        Raises:
            InputError: a rank's file is missing or damaged, or they are of several world sizes.
        """
        count = world_size(folder, kind)
        if count is None:
            return None
        return RankFiles(
            [read_saved(folder / f"{kind}_world_size_{count}_rank_{rank}.pt", EXPECTED[kind]) for rank in range(count)]
        )

    @property
    def mapped(self) -> bool:
        """Whether the tensors of all are pages of the files."""
        return all(file.mapped for file in self.files)

    def dictionaries(self, *keys: str, of: str) -> list[Mapping[Any, Any]]:
        """What is under these keys in every rank's file.

        Raises:
            InputError: no dictionary.
        """
        return [dictionary(file, *keys, of=of) for file in self.files]

    def tensors(self) -> Iterator[tuple[str, StoredTensor, object]]:
        """Of a model's files: name, tensor and what rank 0 holds of it, in the order of the state_dict.

        Raises:
            InputError: the ranks hold other names, or do not hold a tensor together.
        """
        states = self.dictionaries(of=EXPECTED["model"])
        for file, state in zip(self.files, states, strict=True):
            if state.keys() != states[0].keys():
                other = sorted(map(str, state.keys() ^ states[0].keys()))
                raise InputError(
                    f"{file.path} and {self.files[0].path.name} differ in {some_of(other)}: not of one checkpoint"
                )
        for key, value in states[0].items():
            if isinstance(value, Tensor):
                yield live_name(str(key)), self.whole(str(key), [state[key] for state in states]), value

    def parts(self, name: str, values: Sequence[object]) -> list[Part]:
        """What every rank holds of one tensor.

        Raises:
            InputError: no tensor, or cut over other ranks than those whose files are there, or along several dimensions.
        """
        return [self._part(name, value, rank) for rank, value in enumerate(values)]

    def whole(self, name: str, values: Sequence[object]) -> StoredTensor:
        """The tensor that the ranks hold together.

        Raises:
            InputError: they hold no such tensor, or some of its parts are missing.
        """
        parts = self.parts(name, values)
        first = parts[0]
        by_index = {part.index: part for part in reversed(parts)}
        try:
            if any(part.shape != first.shape or part.dim != first.dim for part in parts):
                raise ValueError("ranks disagree about its shape")
            if sorted(by_index) != list(range(first.count)):
                raise ValueError(f"parts {sorted(by_index)} of {first.count}")
            pieces = [by_index[index].local for index in range(first.count)]
            return joined(first.shape, first.dim or 0, pieces, mapped=self.mapped)
        except ValueError as error:
            raise InputError(
                f"{self.files[0].path.parent}: the ranks' files do not hold {name} together ({error}); are they all of one "
                f"checkpoint? The first is {self.files[0].path.name}"
            ) from error

    def _part(self, name: str, value: object, rank: int) -> Part:
        path = self.files[rank].path
        if not isinstance(value, Tensor):
            raise InputError(f"{path}: {name} is a {type(value).__name__}; expected a tensor")
        if not isinstance(value, DTensor):
            return Part(tuple(value.shape), value, None, 0, 1)
        mesh, placements = value.device_mesh, value.placements
        with torch.no_grad():
            local = value.to_local()
        cuts = [(axis, p.dim) for axis, p in enumerate(placements) if type(p) is Shard]
        if len(cuts) > 1 or any(type(p) not in (Shard, Replicate) for p in placements):
            raise InputError(
                f"{path}: {name} is cut as {placements} over a mesh of {tuple(mesh.shape)}; expected FSDP's cut along one "
                "dimension (tensor and sequence parallel parts are not read)"
            )
        here = (mesh.mesh == rank).nonzero().tolist()
        if len(here) != 1 or len(self.files) % mesh.size():
            raise InputError(
                f"{path} was written by a rank of {mesh.size()} (mesh {mesh.mesh.flatten().tolist()[:8]}); its name says rank "
                f"{rank} of {len(self.files)}"
            )
        if not cuts:
            return Part(tuple(value.shape), local, None, 0, 1)
        axis, dim = cuts[0]
        return Part(tuple(value.shape), local, dim, here[0][axis], mesh.shape[axis])


def live_name(key: str) -> str:
    """The name in the model without torch's wrappers."""
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    return key


def world_size(folder: Path, kind: str) -> int | None:
    """How many ranks wrote the files of a kind; None where there is none.

    Raises:
        InputError: files of several world sizes, or a rank's is missing.
    """
    found: dict[int, list[int]] = {}
    for file in folder.glob(f"{kind}_world_size_*_rank_*.pt"):
        named = FILE.fullmatch(file.name)
        if named is not None:
            found.setdefault(int(named[2]), []).append(int(named[3]))
    if not found:
        return None
    if len(found) > 1:
        sizes = some_of([str(size) for size in sorted(found)])
        raise InputError(
            f"{folder} holds {kind}_world_size_*_rank_*.pt of several world sizes, {sizes}: more than one checkpoint; leave "
            "those of one there"
        )
    ((count, ranks),) = found.items()
    missing = [f"{kind}_world_size_{count}_rank_{rank}.pt" for rank in range(count) if rank not in ranks]
    if missing:
        raise InputError(
            f"{folder} has no {some_of(missing)}; every rank's file is needed, copy them from the ranks' disks"
        )
    return count
