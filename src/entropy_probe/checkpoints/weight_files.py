"""Stored weights by key: their shapes, and rows of them read into place without the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from entropy_probe.checkpoints.samples import windows
from entropy_probe.common.files import read_json
from entropy_probe.errors import InputError

INDEX = "model.safetensors.index.json"


class StoredWeights(Protocol):
    """Weights on disk.

    ``shapes`` holds every tensor's whole shape by key.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """By key."""

    def sample(self) -> dict[str, Tensor]:
        """A few elements of every tensor, the same on all ranks; the names say key and whole shape."""

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Copy into every target, in its type, what is stored under its key: of a DTensor this rank's rows alone."""


@dataclass(frozen=True)
class SafetensorsWeights:
    """One safetensors file or the shards of an index; ``files`` says where each key is."""

    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    @staticmethod
    def of_folder(path: Path) -> SafetensorsWeights:
        """``model.safetensors``, or the shards that its index names.

        Raises:
            InputError: there is neither, or the index is damaged.
            OSError, SafetensorError: a file is missing or damaged.
        """
        if (path / "model.safetensors").is_file():
            return SafetensorsWeights.of_files([path / "model.safetensors"])
        if not (path / INDEX).is_file():
            raise InputError(f"{path} holds neither model.safetensors nor {INDEX}; expected one of them")
        shards = read_json(path / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise InputError(f"{path / INDEX} has no weight_map from keys to files; the file is damaged")
        found = SafetensorsWeights.of_files([path / name for name in sorted(set(shards.values()))])
        lost = sorted(set(shards) - set(found.files))
        if lost:
            raise InputError(f"{path / INDEX} lists {', '.join(lost[:3])}, which its shards do not hold")
        return found

    @staticmethod
    def of_files(files: list[Path]) -> SafetensorsWeights:
        """All keys of some files.

        Raises:
            OSError, SafetensorError: a file is missing or damaged.
        """
        places: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a dict)
                    places[key] = file
                    shapes[key] = tuple(opened.get_slice(key).get_shape())
        return SafetensorsWeights(places, shapes)

    def sample(self) -> dict[str, Tensor]:
        """Elements of the first, the middle and the last row of every tensor, in the type that is stored.

        Raises:
            OSError, SafetensorError: a file is damaged.
        """
        found: dict[str, Tensor] = {}
        for file in sorted(set(self.files.values())):
            with safe_open(file, framework="pt") as opened:
                for key in sorted(key for key, place in self.files.items() if place == file):
                    shape = self.shapes[key]
                    for number, window in enumerate(windows(shape)):
                        # Of a single number there is no slice.
                        part = opened.get_slice(key)[window] if shape else opened.get_tensor(key)
                        found[f"{key} {shape} {number}"] = part
        return found

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Copy into every target what is stored under its key: of a DTensor this rank's rows alone.

        Raises:
            OSError, SafetensorError: a file is damaged.
        """
        for file in sorted({self.files[key] for key in targets}):
            with safe_open(file, framework="pt") as opened:
                for key, target in targets.items():
                    if self.files[key] != file:
                        continue
                    if not isinstance(target, DTensor):
                        target.copy_(opened.get_tensor(key))
                        continue
                    rows = own_rows(target)
                    # An empty slice is nothing to ask a file for.
                    if rows.start < rows.stop:
                        target.to_local().copy_(opened.get_slice(key)[rows.start : rows.stop])


def own_rows(sharded: DTensor) -> slice:
    """This rank's rows of a tensor that FSDP2 cut along dimension 0: ⌈rows / N⌉ each, the last ones fewer or none."""
    rows, count, rank = sharded.shape[0], sharded.device_mesh.size(), sharded.device_mesh.get_local_rank()
    each = -(-rows // count)
    return slice(min(rank * each, rows), min((rank + 1) * each, rows))
