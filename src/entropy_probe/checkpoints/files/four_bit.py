"""Weights that bitsandbytes stored in 4 bits: read as the numbers that its forward multiplies with; it need not be installed.

    NAME (uint8, two codes a byte), NAME.absmax, NAME.quant_map, NAME.quant_state.bitsandbytes__nf4 (JSON as bytes)
    with double quantisation also NAME.nested_absmax, NAME.nested_quant_map: absmax is itself in codes

A weight is quant_map[code] · absmax of its block, in float32, rounded to the type in the quant_state. Source: bitsandbytes
0.50, ``QuantState.as_dict`` and ``dequantize_4bit``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe.checkpoints.files.coded import CodedTensor
from entropy_probe.checkpoints.files.stored import StoredTensor
from entropy_probe.errors import InputError

STATE = ".quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class FourBitTensor(StoredTensor):
    """A weight in 4 bits, whose scales are in codes themselves or not; ``read`` gives the type that bitsandbytes restores."""

    path: Path
    name: str
    tensors: Mapping[str, StoredTensor]
    settings: Mapping[str, Any]

    def read(self, rows: slice | None = None) -> Tensor:
        """Dequantised, all of it or these rows."""
        try:
            absmax = self._part("absmax")
            if absmax.dtype is torch.uint8:
                nested = CodedTensor.of(
                    tuple(absmax.shape),
                    absmax,
                    self._part("nested_absmax"),
                    self._part("nested_quant_map"),
                    [int(self.settings["nested_blocksize"])],
                )
                absmax = nested.read() + float(self.settings["nested_offset"])
            codes, table = self.tensors[self.name].read(), self._part("quant_map")
            # Codes of an odd number of elements fill the last byte.
            count = 2 * codes.numel()
            flat = CodedTensor.of((count,), codes, absmax, table, [int(self.settings["blocksize"])], packed=True)
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"{self.path}: weight {self.name} in 4 bits is damaged: {error}") from error
        each = 1
        for size in self.shape[1:]:
            each *= size
        first, stop = (0, self.shape[0]) if rows is None else (rows.start, rows.stop)
        values = flat.read(slice(first * each, stop * each))
        return values.reshape(stop - first, *self.shape[1:]).to(self.dtype)

    def _part(self, part: str) -> Tensor:
        return self.tensors[f"{self.name}.{part}"].read()


def in_four_bits(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether some weight is in bitsandbytes' 4 bits."""
    return any(STATE in key for key in tensors)


def dequantised(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """All tensors, those in 4 bits as what they are read as; their parts are not among them.

    Raises:
        InputError: a record of settings that is damaged.
    """
    settings = {key.partition(STATE)[0]: _settings(path, key, tensors[key]) for key in tensors if STATE in key}
    parts = {f"{name}.{part}" for name in settings for part in PARTS}
    found: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        if STATE in key or key in parts:
            continue
        found[key] = tensor
        if key in settings:
            own = settings[key]
            found[key] = FourBitTensor(tuple(own["shape"]), TYPES[own["dtype"]], path, key, tensors, own)
    return found


def _settings(path: Path, key: str, stored: StoredTensor) -> Mapping[str, Any]:
    try:
        found = json.loads(bytes(stored.read().tolist()))
        shape = found["shape"]
        if (
            not all(isinstance(size, int) for size in shape)
            or found["dtype"] not in TYPES
            or int(found["blocksize"]) < 1
        ):
            raise ValueError(f"shape {shape}, type {found['dtype']}, blocks of {found['blocksize']}")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: {key} is no record of bitsandbytes' 4-bit weights: {error}") from error
    return found  # type: ignore[no-any-return]
