"""safetensors: the tensors of a file, or of a model's file or shards, by key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from entropy_probe.checkpoints.files.samples import windows
from entropy_probe.checkpoints.files.stored import StoredTensor
from entropy_probe.common.files import read_json
from entropy_probe.errors import InputError, one_line, out_of_memory

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""torch's types by safetensors' names; any other is of packed numbers, which are refused as quantised."""


@dataclass(frozen=True)
class SafetensorsTensor(StoredTensor):
    """The tensor under ``key`` of ``file``."""

    file: Path
    key: str

    def read(self, rows: slice | None = None) -> Tensor:
        """The whole tensor, or the rows alone."""
        with _opened(self.file) as opened:
            found: Tensor = opened.get_tensor(self.key) if rows is None else opened.get_slice(self.key)[rows]
            return found

    def sample(self) -> list[Tensor]:
        """Elements of the first, the middle and the last row; no whole row is read for them."""
        with _opened(self.file) as opened:
            # A single number has no slice.
            return [
                opened.get_slice(self.key)[window] if self.shape else opened.get_tensor(self.key)
                for window in windows(self.shape)
            ]


def tensors_of_model(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of ``model.safetensors``, or of the shards that its index names.

    Raises:
        InputError: there is neither, or one is damaged.
    """
    if (folder / WHOLE).is_file():
        return tensors_of_file(folder / WHOLE)
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder} holds neither {WHOLE} nor {INDEX}; expected one of them")
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise InputError(f"{folder / INDEX} has no weight_map from keys to files; the file is damaged")
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(shards.values())):
        found |= tensors_of_file(folder / name)
    lost = sorted(set(shards) - set(found))
    if lost:
        raise InputError(f"{folder / INDEX} lists {', '.join(lost[:3])}, which its shards do not hold")
    return found


def tensors_of_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
        InputError: it is missing or damaged.
    """
    with _opened(file) as opened:
        parts = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
        return {
            key: SafetensorsTensor(
                tuple(part.get_shape()), TYPES.get(part.get_dtype(), torch.uint8), file=file, key=key
            )
            for key, part in parts.items()
        }


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{file}: the weights cannot be read: {one_line(error)}") from error
