"""Tensors that are stored as codes: small integers, or floats of a byte, with a scale a block of the flattened tensor.

Element i is ``value(code_i) · scale[⌊i / block⌋]`` in float32, where ``value`` looks into a table (``qmap``), or is the code
itself (float8). That is the number that the optimizer's own code computes with: it dequantises alike, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from entropy_probe.checkpoints.files.stored import StoredTensor


@dataclass(frozen=True)
class CodedTensor(StoredTensor):
    """A tensor in codes; ``read`` gives float32.

    Attributes:
        codes: one an element, flat; two a byte where ``packed``, the first in the high bits.
        scale: one a block, float32, flat.
        qmap: the value of every code, or None where the codes are numbers.
        block: elements that share a scale; the last block may have fewer.
        packed: codes are of four bits.
    """

    codes: Tensor
    scale: Tensor
    qmap: Tensor | None
    block: int
    packed: bool

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        codes: Tensor,
        scale: Tensor,
        qmap: Tensor | None,
        blocks: Sequence[int],
        packed: bool = False,
    ) -> Self:
        """The first of the block sizes that gives as many blocks as there are scales.

        Raises:
            ValueError: numbers of codes, scales or table entries that fit no such tensor, or a code that the table lacks.
        """
        count = math.prod(shape)
        if codes.numel() * (2 if packed else 1) != count:
            raise ValueError(f"{codes.numel()} bytes of codes for a tensor of {tuple(shape)}")
        fitting = [block for block in blocks if block > 0 and -(-count // block) == scale.numel()]
        if not fitting or not scale.dtype.is_floating_point:
            raise ValueError(f"{scale.numel()} scales of {scale.dtype} for {count} elements")
        entries = 16 if packed else 256
        if qmap is not None and (
            qmap.numel() != entries or qmap.dtype is not torch.float32 or codes.dtype is not torch.uint8
        ):
            raise ValueError(f"codes of {codes.dtype} with a table of {qmap.numel()} values of {qmap.dtype}")
        if qmap is None and codes.dtype is not torch.float8_e4m3fn:
            raise ValueError(f"codes of {codes.dtype} without a table of values")
        return cls(tuple(shape), torch.float32, codes.reshape(-1), scale.reshape(-1).float(), qmap, fitting[0], packed)

    @property
    def least(self) -> float:
        """The smallest value above zero that a code has, as a share of the largest of its block."""
        if self.qmap is None:
            limits = torch.finfo(torch.float8_e4m3fn)
            return limits.smallest_normal * limits.eps / limits.max
        return float(self.qmap[self.qmap > 0].min()) / float(self.qmap.max())

    @property
    def has_zero(self) -> bool:
        """Whether a code means zero; without one, small values are raised to ``least``."""
        return self.qmap is None or bool((self.qmap == 0).any())

    def read(self, rows: slice | None = None) -> Tensor:
        """Dequantised, all of it or these rows: memory of its own."""
        each = math.prod(self.shape[1:])
        first, stop = (0, math.prod(self.shape)) if rows is None else (rows.start * each, rows.stop * each)
        shape = self.shape if rows is None else (rows.stop - rows.start, *self.shape[1:])
        found = torch.empty(stop - first, dtype=torch.float32)
        # Whole blocks at a time: looked-up codes as 64-bit indices would cost twice the dequantised tensor.
        step = max(1, CHUNK // self.block) * self.block
        begin = first
        while begin < stop:
            end = min(stop, (begin // step + 1) * step)
            found[begin - first : end - first] = self._values(begin, end)
            begin = end
        return found.reshape(shape)

    def _values(self, first: int, stop: int) -> Tensor:
        if self.packed:
            pairs = self.codes[first // 2 : -(-stop // 2)]
            codes = torch.stack([pairs >> 4, pairs & 15], dim=-1).reshape(-1)[first % 2 :][: stop - first]
        else:
            codes = self.codes[first:stop]
        values = codes.float() if self.qmap is None else self.qmap[codes.long()]
        blocks = torch.arange(first, stop) // self.block
        return values * self.scale[blocks]


CHUNK = 1 << 20
"""Elements that are dequantised at a time."""
