"""torch.distributed.checkpoint (DCP) folders: tensors in shards, and settings, under flattened keys.

A folder's ``.metadata`` is a pickle: it is read by an unpickler that knows torch's records of shapes and places and nothing
else. Tensors and settings are read with ``weights_only=True``. Whole tensors are read, or rows of them; a stored shard that
holds some of these is read whole for the moment. No process group is needed, whoever wrote the folder.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from entropy_probe.checkpoints.files.stored import StoredTensor
from entropy_probe.compat.distributed_checkpoints import ALLOWED
from entropy_probe.errors import InputError, one_line, out_of_memory

BLOCK = 4096
"""Bytes that are read at one place of a stored part to tell folders apart."""

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


class _SettingsPlanner(DefaultLoadPlanner):
    """torch's planner, which would unpickle what is not a tensor; here ``settings`` takes it, by key, weights only."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.settings: dict[str, Any] = {}

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.settings[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


class _RowsPlanner(DefaultLoadPlanner):
    """Reads into ``target`` the rows of one tensor that begin at ``first``."""

    def __init__(self, key: str, first: int, target: Tensor) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.key, self.first, self.target = key, first, target

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata[self.key]
        assert isinstance(stored, TensorStorageMetadata)
        begin = [self.first] + [0] * (self.target.dim() - 1) if self.target.dim() else []
        chunk = ChunkStorageMetadata(torch.Size(begin), self.target.size())
        items = create_read_items_for_chunk_list(self.key, stored, [chunk])
        # What no part covers would stay as memory happened to be.
        held = sum(item.lengths.numel() for item in items)
        if held < self.target.numel():
            raise ValueError(f"{held} of {self.target.numel()} elements of {self.key} are there")
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.target


@dataclass(frozen=True)
class DistributedFolder:
    """An opened folder and its metadata; ``parts`` are the stored parts of every key."""

    path: Path
    reader: SafeReader
    metadata: Metadata
    parts: Mapping[str, list[Part]]

    @staticmethod
    def open(path: Path) -> DistributedFolder:
        """Read the metadata.

        Raises:
            InputError: it is missing, damaged, or names anything beyond torch's records.
        """
        reader = SafeReader(path)
        metadata = reader.read_metadata()
        parts: dict[str, list[Part]] = {}
        with _whatever_is_damaged(path):
            for index, part in metadata.storage_data.items():
                where = (tuple(index.offset or ()), str(part.relative_path), int(part.offset), int(part.length))
                parts.setdefault(index.fqn, []).append(where)
        return DistributedFolder(path, reader, metadata, parts)

    @property
    def keys(self) -> Collection[str]:
        """Keys of tensors and settings."""
        return self.metadata.state_dict_metadata.keys()

    def tensors(self) -> dict[str, StoredTensor]:
        """Stored tensors by key."""
        return {
            key: DistributedTensor(tuple(stored.size), stored.properties.dtype, folder=self, key=key)
            for key, stored in self.metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def settings(self, keys: Collection[str]) -> dict[str, Any]:
        """The values of keys that are no tensors.

        Raises:
            InputError: a key, a file or part of one is missing or damaged.
        """
        planner = _SettingsPlanner()
        self.follow(planner, dict.fromkeys(keys))
        return planner.settings

    def follow(self, planner: DefaultLoadPlanner, targets: dict[str, Any]) -> None:
        """Read what a planner asks for; no collective.

        Raises:
            InputError: a key, a file or part of one is missing or damaged.
        """
        with _whatever_is_damaged(self.path):
            self.reader.set_up_storage_reader(self.metadata, True)
            planner.set_up_planner(targets, self.metadata, True)
            (plan,) = planner.create_global_plan([self.reader.prepare_local_plan(planner.create_local_plan())])
            self.reader.read_data(planner.finish_plan(plan), planner).wait()


@dataclass(frozen=True)
class DistributedTensor(StoredTensor):
    """The tensor under ``key`` of ``folder``."""

    folder: DistributedFolder
    key: str

    def read(self, rows: slice | None = None) -> Tensor:
        """The whole tensor, or the rows, put together from the stored parts that hold some of them."""
        first, stop = (0, self.shape[0] if self.shape else 0) if rows is None else (rows.start, rows.stop)
        found = torch.empty((stop - first, *self.shape[1:]) if self.shape else (), dtype=self.dtype)
        if found.numel():
            self.folder.follow(_RowsPlanner(self.key, first, found), {})
        return found

    def sample(self) -> list[Tensor]:
        """Bytes of the first, the middle and the last stored part: of each the middle, and the end.

        torch writes a checksum of all of a part at its end.
        """
        found = []
        with _whatever_is_damaged(self.folder.path):
            for at, file, offset, length in _three(sorted(self.folder.parts[self.key])):
                with (self.folder.path / file).open("rb") as opened:
                    for start in sorted({offset + max(0, length - BLOCK) // 2, offset + max(0, length - BLOCK)}):
                        opened.seek(start)
                        content = opened.read(min(BLOCK, length))
                        if len(content) < min(BLOCK, length):
                            raise EOFError(f"{file} ends before {self.key} {at}")
                        found.append(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        return found


@contextmanager
def _whatever_is_damaged(path: Path) -> Iterator[None]:
    """torch's planner and reader assert, look up and unpack; a damaged file's metadata may name anything."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{path} is damaged or incomplete: {one_line(error, 200)}") from error


def _three(parts: list[Part]) -> list[Part]:
    """The first, the middle and the last."""
    return [parts[number] for number in sorted({0, len(parts) // 2, len(parts) - 1}) if parts]
