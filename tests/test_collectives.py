"""Spans and deals of ranks, and that one process is one rank over which nothing crosses."""

from __future__ import annotations

import numpy as np
import torch

from entropy_probe.collectives import ALONE, deal, even_spans, row_spans

SHAPES = {"table": torch.Size([7, 3]), "bias": torch.Size([2])}


def test_units_are_dealt_in_order_and_level() -> None:
    assert deal([1] * 7, 4) == [range(2), range(2, 3), range(3, 5), range(5, 7)]
    assert deal([100, 1], 3) == [range(0), range(1), range(1, 2)]


def test_spans_cover_every_element_once() -> None:
    for spans in (even_spans(SHAPES, 4), row_spans(SHAPES, 4)):
        for name, shape in SHAPES.items():
            covered = [k for span in spans[name] for k in range(span.start, span.stop)]
            assert covered == list(range(shape.numel()))


def test_spans_of_rows_are_what_torch_chunks() -> None:
    chunks = torch.arange(21).view(7, 3).chunk(4)
    assert [span.stop - span.start for span in row_spans(SHAPES, 4)["table"]] == [chunk.numel() for chunk in chunks]


def test_over_one_rank_nothing_crosses() -> None:
    vector = torch.ones(3)
    ALONE.sum_vectors([vector])
    assert ALONE.sum_numbers(np.array([2.0]))[0] == 2.0
    assert torch.equal(ALONE.exchange([vector], [3])[0], vector)
    assert ALONE.sent == []
