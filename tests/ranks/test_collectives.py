"""Spans and deals of ranks, and that one process is one rank over which nothing crosses."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from entropy_probe.errors import InputError
from entropy_probe.ranks.collectives import ALONE, Kind, Payload, Ranks
from entropy_probe.ranks.dealing import deal
from entropy_probe.ranks.sharding import even_spans, row_spans
from rank_processes import on_ranks

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
    assert torch.equal(ALONE.exchange(vector, [3], [3])[0], vector)
    assert ALONE.sent == []
    assert ALONE.backend is None
    assert ALONE.most_sent() == {}


def test_the_most_that_any_rank_sent_is_by_kind_and_leaves_its_own_gather_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(rank=0, count=2)
    sent = [Payload(Kind.SHARDS, 5, 40), Payload(Kind.SHARDS, 2, 16), Payload(Kind.NUMBERS, 1, 8)]
    ranks.sent.extend(sent)

    def as_the_other_adds(total: Tensor, **_: Any) -> None:
        total[1] += torch.tensor([[4.0, 32.0], [6.0, 24.0], [3.0, 12.0], [0.0, 0.0]], dtype=torch.float64)

    monkeypatch.setattr(dist, "all_reduce", as_the_other_adds)
    assert ranks.most_sent() == {
        Kind.NUMBERS: Payload(Kind.NUMBERS, 4, 32),
        Kind.SUMS: Payload(Kind.SUMS, 6, 24),
        Kind.SHARDS: Payload(Kind.SHARDS, 7, 56),
        Kind.DIRECTIONS: Payload(Kind.DIRECTIONS, 0, 0),
    }
    assert ranks.most_sent(since=1)[Kind.SHARDS] == Payload(Kind.SHARDS, 3, 16)
    assert ranks.sent == sent


def test_what_one_rank_refuses_all_refuse_in_its_words() -> None:
    def work(ranks: Ranks) -> list[str | int]:
        def fails(which: int, words: str) -> int:
            if ranks.rank >= which:
                raise InputError(f"{words} {ranks.rank}")
            return ranks.rank

        found: list[str | int] = [ranks.alike(lambda: fails(3, "never"))]
        for which, words in ((1, "θ of"), (0, "x")):
            with pytest.raises(InputError) as refused:
                ranks.alike(partial(fails, which, words))
            found.append(str(refused.value))
        return found

    assert on_ranks(3, work) == [[rank, "θ of 1", "x 0"] for rank in range(3)]
