"""Tensors that ranks hold in parts: put together when they are read, whole or by rows, without a copy of what is left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_probe.checkpoints.files.saved import forget
from entropy_probe.checkpoints.files.stored import StoredTensor


@dataclass(frozen=True)
class FlatTensor(StoredTensor):
    """A tensor whose elements, in order, are those of flat ``pieces`` one after the other.

    ``mapped``: whether the pieces are pages of files, which this process need not keep.
    """

    pieces: tuple[Tensor, ...]
    mapped: bool

    @staticmethod
    def of(shape: Sequence[int], pieces: Sequence[Tensor], *, mapped: bool) -> FlatTensor:
        """The tensor of this shape.

        Raises:
            ValueError: the pieces hold another number of elements, or of several types.
        """
        held, types = sum(piece.numel() for piece in pieces), {piece.dtype for piece in pieces}
        if held != math.prod(shape) or len(types) != 1:
            raise ValueError(f"{held} elements of {len(types)} types for the shape {tuple(shape)}")
        # What is reshaped by copy is no page of a file any more.
        mapped = mapped and all(piece.is_contiguous() for piece in pieces)
        return FlatTensor(tuple(shape), types.pop(), tuple(piece.reshape(-1) for piece in pieces), mapped)

    def read(self, rows: slice | None = None) -> Tensor:
        """A copy of all, or of the rows."""
        first, stop = (0, self.shape[0] if self.shape else 1) if rows is None else (rows.start, rows.stop)
        each = math.prod(self.shape[1:])
        found = torch.empty((stop - first) * each, dtype=self.dtype)
        begin, end, at = first * each, stop * each, 0
        for piece in self.pieces:
            low, high = max(begin, at), min(end, at + piece.numel())
            if low < high:
                part = piece[low - at : high - at]
                found[low - begin : high - begin] = part
                if self.mapped:
                    forget(part)
            at += piece.numel()
        return found.view((stop - first, *self.shape[1:]) if self.shape else ())


@dataclass(frozen=True)
class JoinedTensor(StoredTensor):
    """A tensor that ranks cut along a dimension other than the first; ``pieces`` are theirs, in order."""

    dim: int
    pieces: tuple[Tensor, ...]
    mapped: bool

    def read(self, rows: slice | None = None) -> Tensor:
        """A copy of all, or of the rows."""
        parts = [piece if rows is None else piece[rows] for piece in self.pieces]
        found = torch.cat(parts, self.dim)
        if self.mapped:
            for piece in self.pieces:
                forget(piece)
        return found


def run_of(pieces: Sequence[Tensor], start: int, length: int) -> list[Tensor]:
    """Views of the elements from ``start`` on of flat pieces one after the other; fewer where these end before."""
    found, at = [], 0
    for piece in pieces:
        low, high = max(start, at), min(start + length, at + piece.numel())
        if low < high:
            found.append(piece[low - at : high - at])
        at += piece.numel()
    return found or [piece[:0] for piece in pieces[:1]]


def joined(shape: Sequence[int], dim: int, pieces: Sequence[Tensor], *, mapped: bool) -> StoredTensor:
    """The tensor that pieces along ``dim`` make.

    Raises:
        ValueError: they do not.
    """
    whole = list(shape)
    rest = whole[:dim] + whole[dim + 1 :]
    for piece in pieces:
        if list(piece.shape[:dim]) + list(piece.shape[dim + 1 :]) != rest and piece.numel():
            raise ValueError(f"a part of shape {tuple(piece.shape)} of {tuple(shape)}")
    if not whole[:dim]:
        return FlatTensor.of(shape, pieces, mapped=mapped)
    full = tuple(piece for piece in pieces if piece.numel())
    if sum(piece.shape[dim] for piece in full) != whole[dim] or len({piece.dtype for piece in full}) != 1:
        raise ValueError(f"parts of shapes {[tuple(piece.shape) for piece in pieces]} of {tuple(shape)}")
    mapped = mapped and all(piece.is_contiguous() for piece in full)
    return JoinedTensor(tuple(shape), full[0].dtype, dim, full, mapped)
