"""Which few elements of a stored tensor tell one checkpoint from another: the same ones whoever asks, whatever its shard."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH = 1024
"""The most elements that are read at one place."""


def windows(shape: Sequence[int]) -> list[tuple[slice, ...]]:
    """Indices of up to three runs of up to ``WIDTH`` elements: in the first, the middle and the last row of every dimension.

    A number has one, (); a tensor without elements none.
    """
    if 0 in shape:
        return []
    widths = [1] * (len(shape) - 1) + [min(WIDTH, rows) for rows in shape[-1:]]
    starts = [[(rows - width) * part // 2 for rows, width in zip(shape, widths, strict=True)] for part in range(3)]
    found = [tuple(slice(start, start + width) for start, width in zip(at, widths, strict=True)) for at in starts]
    return [window for number, window in enumerate(found) if window not in found[:number]]
