"""torch.distributed.checkpoint folders, as accelerate's SHARDED_STATE_DICT leaves them: weights and Adam state in shards.

``pytorch_model_fsdp_0/`` holds ``{"model": state_dict}``, ``optimizer_0/`` ``{"optimizer": {"state": {name: …},
"param_groups": […]}}``, both flattened to keys such as ``optimizer.state.<name>.exp_avg``. The folder's ``.metadata`` is a
pickle: it is read by an unpickler that knows torch's records of shapes and places and nothing else. Tensors and settings are
read with ``weights_only=True``. Each rank plans and reads alone, its own rows of every tensor; a stored shard that holds some
of them is read whole for the moment.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from entropy_probe.errors import InputError, one_line, out_of_memory, some_of

MODEL_FOLDER = "pytorch_model_fsdp_0"
OPTIMIZER_FOLDER = "optimizer_0"

BLOCK = 4096
"""Bytes that are read at one place of a stored part to tell folders apart."""

ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}
"""Everything that a .metadata names: records of shapes, types and places. None of it does anything when called."""


Part = tuple[tuple[int, ...], str, int, int]
"""A stored part of a tensor: where it is in the tensor, its file, where it is in that, and its length in bytes."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint's metadata does")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """torch's reader, whose metadata comes from an unpickler that executes nothing."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The folder's ``.metadata``.

        Raises:
            InputError: it is missing, damaged, or names anything beyond torch's records.
        """
        file = Path(self.path) / ".metadata"
        if not file.is_file():
            raise InputError(f"{self.path} has no .metadata; expected a torch.distributed.checkpoint folder")
        try:
            with file.open("rb") as opened:
                metadata = _MetadataUnpickler(opened).load()
        except Exception as error:  # damaged pickles raise anything
            if out_of_memory(error):
                raise
            raise InputError(f"{file} cannot be read without executing it: {one_line(error, 160)}") from error
        if (
            not isinstance(metadata, Metadata)
            or not isinstance(metadata.state_dict_metadata, dict)
            or not isinstance(metadata.storage_data, dict)
        ):
            raise InputError(f"{file} holds no torch.distributed.checkpoint metadata; the file is damaged")
        for key, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata) and not (
                isinstance(stored.size, torch.Size)
                and isinstance(stored.properties, TensorProperties)
                and isinstance(stored.properties.dtype, torch.dtype)
            ):
                raise InputError(f"{file} gives {key} no shape and type; the file is damaged")
        return metadata


class _SafePlanner(DefaultLoadPlanner):
    """torch's planner, which would unpickle what is not a tensor; here ``settings`` takes it, by key, weights only."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.settings: dict[str, Any] = {}

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.settings[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


@dataclass(frozen=True)
class DistributedFolder:
    """An opened folder and its metadata."""

    path: Path
    reader: SafeReader
    metadata: Metadata

    @staticmethod
    def open(path: Path) -> DistributedFolder:
        """Read the metadata.

        Raises:
            InputError: it is missing, damaged, or names anything beyond torch's records.
        """
        reader = SafeReader(path)
        return DistributedFolder(path, reader, reader.read_metadata())

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Stored tensors by key."""
        return {
            key: stored
            for key, stored in self.metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def sample(self, keys: Collection[str]) -> dict[str, Tensor]:
        """Bytes of the first, the middle and the last stored part of every tensor, the same on all ranks.

        Of each the middle, and the end, where torch writes a checksum of all of it. The names say key, whole shape, type and
        place.

        Raises:
            InputError: a file or part of one is missing or damaged.
        """
        stored = self.tensors()
        known = {key: f"{key} {tuple(stored[key].size)} {stored[key].properties.dtype}" for key in keys}
        parts: dict[str, list[Part]] = {key: [] for key in sorted(known)}
        found: dict[str, Tensor] = {}
        try:
            for index, part in self.metadata.storage_data.items():
                if index.fqn in parts:
                    at = tuple(index.offset or ())
                    parts[index.fqn].append((at, str(part.relative_path), int(part.offset), int(part.length)))
            places = [
                (file, start, min(BLOCK, length), f"{known[key]} {at}")
                for key, all_parts in parts.items()
                for at, file, offset, length in _three(sorted(all_parts))
                for start in sorted({offset + max(0, length - BLOCK) // 2, offset + max(0, length - BLOCK)})
            ]
            for file, blocks in groupby(sorted(places), key=lambda place: place[0]):
                with (self.path / file).open("rb") as opened:
                    for _, start, length, name in blocks:
                        opened.seek(start)
                        content = opened.read(length)
                        if len(content) < length:
                            raise EOFError(f"{file} ends before {name}")
                        found[f"{name} {start}"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        except Exception as error:  # a damaged file's metadata may name anything
            if out_of_memory(error):
                raise
            raise InputError(f"{self.path} is damaged or incomplete: {one_line(error, 200)}") from error
        return found

    def read(self, targets: Mapping[str, Tensor | None]) -> dict[str, Any]:
        """Fill the tensors, of a DTensor this rank's part; give the values of the other keys, whose target is None.

        No collective: the ranks read apart.

        Raises:
            InputError: a key, a file or part of one is missing or damaged.
        """
        planner = _SafePlanner()
        try:
            self.reader.set_up_storage_reader(self.metadata, True)
            planner.set_up_planner(dict(targets), self.metadata, True)
            (plan,) = planner.create_global_plan([self.reader.prepare_local_plan(planner.create_local_plan())])
            self.reader.read_data(planner.finish_plan(plan), planner).wait()
        except Exception as error:  # torch's planner and reader assert, look up and unpack
            if out_of_memory(error):
                raise
            raise InputError(f"{self.path} is damaged or incomplete: {one_line(error, 200)}") from error
        return planner.settings


@dataclass(frozen=True)
class DistributedWeights:
    """A folder's weights; ``keys`` are the stored keys by the model's."""

    folder: DistributedFolder
    keys: Mapping[str, str]

    @staticmethod
    def of_folder(path: Path) -> DistributedWeights:
        """The weights under ``model.``, where accelerate puts them, or as they are.

        Raises:
            InputError: the metadata cannot be read.
        """
        folder = DistributedFolder.open(path)
        stored = folder.tensors()
        # A causal language model has names outside "model." too, its head's for one, or is itself called otherwise.
        wrapped = all(key.startswith("model.") for key in stored)
        return DistributedWeights(folder, {key.removeprefix("model.") if wrapped else key: key for key in stored})

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """By the model's key."""
        stored = self.folder.tensors()
        return {key: tuple(stored[own].size) for key, own in self.keys.items()}

    def sample(self) -> dict[str, Tensor]:
        """A few bytes of every tensor, the same on all ranks.

        Raises:
            InputError: a file or part of one is missing or damaged.
        """
        return self.folder.sample(self.keys.values())

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Copy into every target what is stored under its key: of a DTensor this rank's rows alone.

        Raises:
            InputError: a file or part of one is missing or damaged.
        """
        self.folder.read({self.keys[key]: target for key, target in targets.items()})


@dataclass(frozen=True)
class DistributedOptimizer:
    """A folder's optimizer: its groups, ``params`` being names, and where the state is; ``prefix`` is that of all keys."""

    folder: DistributedFolder
    prefix: str
    settings: tuple[Mapping[str, Any], ...]

    @staticmethod
    def of_folder(path: Path) -> DistributedOptimizer:
        """Read the metadata and the groups.

        Raises:
            InputError: not an optimizer's folder, or damaged.
        """
        folder = DistributedFolder.open(path)
        keys = folder.metadata.state_dict_metadata
        prefix = "optimizer." if any(key.startswith("optimizer.") for key in keys) else ""
        of_groups = f"{prefix}param_groups."
        groups: dict[int, dict[str, Any]] = {}
        for key, value in folder.read({key: None for key in keys if key.startswith(of_groups)}).items():
            number, _, name = key.removeprefix(of_groups).partition(".")
            if number.isdecimal() and name:
                groups.setdefault(int(number), {})[name] = value
        if not groups or not all(isinstance(group.get("params"), list) for group in groups.values()):
            raise InputError(
                f"{path} holds no groups with their parameters' names; expected accelerate's optimizer folder"
            )
        return DistributedOptimizer(folder, prefix, tuple(groups[number] for number in sorted(groups)))

    def sample(self) -> dict[str, Tensor]:
        """A few bytes of every step and moment, the same on all ranks.

        Raises:
            InputError: a file or part of one is missing or damaged.
        """
        return self.folder.sample([key for key in self.folder.tensors() if key.startswith(f"{self.prefix}state.")])

    def read(self, trainable: Collection[str], mesh: DeviceMesh) -> dict[str, Any]:
        """As ``optimizer.pt`` would hold it, with names as ``param_names`` and DTensors of ``mesh``.

        Raises:
            InputError: damaged, or it trains a parameter that is not one of the model's, ``trainable``. Those that it does not
            train were frozen.
        """
        names = [str(name) for group in self.settings for name in group["params"]]
        # Names are known here: another order of the same shapes must not be guessed.
        strangers = sorted(set(names) - set(trainable))
        if strangers:
            raise InputError(
                f"{self.folder.path} trains what the model does not: {some_of(strangers)}; is it the optimizer of another "
                "model, or does freeze name too much?"
            )
        index = {name: number for number, name in enumerate(names)}
        entries: dict[int, dict[str, Tensor]] = {}
        targets: dict[str, Tensor | None] = {}
        for key, tensor in self.folder.tensors().items():
            name, _, field = key.removeprefix(f"{self.prefix}state.").rpartition(".")
            if not key.startswith(f"{self.prefix}state.") or name not in index:
                continue
            target = _empty(tensor, mesh)
            entries.setdefault(index[name], {})[field] = target
            targets[key] = target
        self.folder.read(targets)
        return {
            "state": entries,
            "param_groups": [
                {
                    **group,
                    "params": [index[str(name)] for name in group["params"]],
                    "param_names": [str(name) for name in group["params"]],
                }
                for group in self.settings
            ],
        }


def _three(parts: list[Part]) -> list[Part]:
    """The first, the middle and the last."""
    return [parts[number] for number in sorted({0, len(parts) // 2, len(parts) - 1}) if parts]


def _empty(stored: TensorStorageMetadata, mesh: DeviceMesh) -> Tensor:
    shape, dtype = torch.Size(stored.size), stored.properties.dtype
    if not shape:
        return torch.empty((), dtype=dtype)
    each = -(-shape[0] // mesh.size())
    first = min(mesh.get_local_rank() * each, shape[0])
    local = torch.empty((min(first + each, shape[0]) - first, *shape[1:]), dtype=dtype)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def keeps_weights_distributed(path: Path) -> bool:
    """Whether accelerate's folder of shards is all the weights that a checkpoint has."""
    return (path / MODEL_FOLDER).is_dir() and not any(path.glob("*.safetensors"))
