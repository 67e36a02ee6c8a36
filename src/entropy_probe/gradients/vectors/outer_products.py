"""Sequences' weight gradients g_i = left_iᵀ right_i, formed a chunk at a time so that what reads them finds them in cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CACHED = 1 << 20
"""Elements of g_i, over the sequences formed together, that are read while they are in cache: 4 MiB in float32."""

MOST_ROWS = 8
"""Sequences whose g_i are formed together."""

SHORT = 24
"""Below so many positions a sequence, products of left and right with something else cost less than forming g_i."""


class OuterProducts:
    """Forms chunks of g_i in memory that is used again, because freshly allocated memory has to be paged in."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        """Products are taken in ``dtype``."""
        self._scratch = torch.empty(CACHED, dtype=dtype, device=device)

    def fits(self, elements: int) -> bool:
        """Whether so many elements, over all sequences, are one chunk."""
        return elements <= len(self._scratch)

    def chunks(self, left: Tensor, right: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Elements of a parameter [p, q], flat, and their g_i, [n, elements]; good until the next chunk.

        Args:
            left: [n, T, p].
            right: [n, T, q].
        """
        left, right = left.transpose(1, 2).to(self._scratch.dtype), right.to(self._scratch.dtype)
        count, rows, columns = len(left), left.shape[1], right.shape[2]
        step = max(1, len(self._scratch) // (count * columns))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            shape = (count, stop - start, columns)
            size = count * (stop - start) * columns
            out = self._scratch[:size].view(shape) if self.fits(size) else None
            g = torch.bmm(left[:, start:stop], right, out=out)
            yield slice(start * columns, stop * columns), g.flatten(1)
