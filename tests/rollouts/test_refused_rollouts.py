"""Malformed rollouts are refused by the real command: exit code 2, one line, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from entropy_probe.data.rollouts import write_rollouts
from spoiled import CONTEXT, Place, refuse_run
from support import (
    VOCABULARY,
    random_rollouts,
)


def _row(number: int, **values: Any) -> Callable[[Place], object]:
    return lambda place: place.edit_rows(lambda rows: rows[number].update(values))


def _rows(**values: Any) -> Callable[[Place], object]:
    return lambda place: place.edit_rows(lambda rows: [row.update(values) for row in rows])


def _without_column(number: int, name: str) -> Callable[[Place], object]:
    return lambda place: place.edit_rows(lambda rows: rows[number].pop(name))


def _line(number: int, text: str) -> Callable[[Place], object]:
    def spoil(place: Place) -> None:
        lines = place.rollouts.read_text().splitlines()
        lines[number] = text
        place.rollouts.write_text("\n".join(lines) + "\n")

    return spoil


def _content(content: bytes) -> Callable[[Place], object]:
    return lambda place: place.rollouts.write_bytes(content)


def _keep(count: int) -> Callable[[Place], object]:
    return lambda place: place.edit_rows(lambda rows: rows.__delitem__(slice(count, None)))


ROLLOUTS: dict[str, tuple[Callable[[Place], object], tuple[str, ...]]] = {
    "malformed-json": (_line(2, '{"prompt_id": "p1", '), ("line 3", "not JSON")),
    "a-list": (_line(2, "[1, 2]"), ("line 3", "list")),
    "a-number-too-long": (_line(2, "1" * 5000), ("line 3",)),
    "nested-too-deep": (_line(2, "[" * 100_000), ("line 3",)),
    "empty-file": (_content(b""), ("rollouts.jsonl", "no rollouts")),
    "blank-lines": (_content(b"\n\n"), ("rollouts.jsonl", "no rollouts")),
    "not-utf8": (_content(b"\xff\xfe{}\n"), ("rollouts.jsonl", "UTF-8")),
    "missing-file": (lambda place: place.rollouts.unlink(), ("rollouts.jsonl", "does not exist")),
    "no-reward": (_without_column(1, "reward"), ("line 2", "reward")),
    "null-reward": (_row(1, reward=None), ("line 2", "reward")),
    "no-prompt-id": (_without_column(1, "prompt_id"), ("line 2", "prompt_id")),
    "no-response-ids": (_without_column(1, "response_ids"), ("line 2", "response_ids")),
    "nan-reward": (_row(3, reward=float("nan")), ("line 4", "reward", "nan")),
    "huge-reward": (_row(3, reward=10**400), ("line 4", "reward")),
    "text-reward": (_row(3, reward="1.0"), ("line 4", "reward", "str")),
    "boolean-advantage": (_row(3, advantage=True), ("line 4", "advantage", "bool")),
    "infinite-advantage": (_row(3, advantage=float("inf")), ("line 4", "advantage", "inf")),
    "advantages-in-some-rows": (_row(3, advantage=0.5), ("7 of 8", "advantage")),
    "one-response-a-prompt": (
        lambda place: place.edit_rows(lambda rows: rows.pop(3)),
        ("'p1'", "one response"),
    ),
    "one-prompt": (_keep(2), ("one prompt",)),
    "empty-prompt-ids": (_row(3, prompt_ids=[]), ("line 4", "prompt_ids", "empty")),
    "empty-response-ids": (_row(3, response_ids=[]), ("line 4", "response_ids", "empty")),
    "id-past-the-vocabulary": (_row(3, response_ids=[5, VOCABULARY]), ("'p1'", str(VOCABULARY), "vocabulary")),
    "huge-id": (_row(3, response_ids=[10**30]), ("'p1'", "vocabulary")),
    "negative-id": (_row(3, response_ids=[5, -1]), ("line 4", "response_ids", "-1")),
    "float-id": (_row(3, response_ids=[5.0]), ("line 4", "response_ids", "5.0")),
    "text-ids": (_row(3, response_ids=["5"]), ("line 4", "response_ids", "'5'")),
    "ids-as-text": (_row(3, response_ids="5 6"), ("line 4", "response_ids", "str")),
    "boolean-id": (_row(3, response_ids=[True]), ("line 4", "response_ids", "True")),
    "float-prompt-id": (_row(3, prompt_id=1.5), ("line 4", "prompt_id", "float")),
    "two-prompts-under-one-id": (_row(3, prompt_ids=[4, 4, 4, 4, 4, 4, 4, 4]), ("'p1'", "two different prompts")),
    "past-the-context": (_row(3, response_ids=[5] * CONTEXT), ("'p1'", str(CONTEXT), "context")),
    "temperature-0": (_rows(temperature=0), ("line 1", "temperature")),
    "negative-temperature": (_rows(temperature=-1.0), ("line 1", "temperature")),
    "temperatures-differ": (_row(3, temperature=0.5), ("temperature", "0.5")),
    "top-k": (_rows(top_k=50), ("top_k = 50",)),
    "top-p": (_rows(top_p=0.9), ("top_p = 0.9",)),
    "top-p-above-1": (_rows(top_p=2.5), ("top_p = 2.5",)),
    "min-p": (_rows(min_p=0.3), ("min_p = 0.3",)),
    "repetition-penalty": (_rows(repetition_penalty=1.4), ("repetition_penalty = 1.4",)),
    "loss-types-differ": (_row(0, loss_type="dapo"), ("loss_type",)),
    "too-few-logprobs": (_row(3, response_ids=[5, 6, 1], logprobs=[-1.0, -2.0]), ("line 4", "2 logprobs", "3")),
    "nan-logprob": (_row(3, response_ids=[5], logprobs=[float("nan")]), ("line 4", "logprobs")),
    "cut-as-text": (_row(3, cut="no"), ("line 4", "cut")),
    "window-tokens-0": (_rows(window_tokens=0), ("line 1", "window_tokens")),
    "max-completion-length-0": (_rows(max_completion_length=0), ("line 1", "max_completion_length")),
}


@pytest.mark.parametrize("name", ROLLOUTS)
def test_bad_rollouts_are_refused(name: str, place: Place) -> None:
    spoil, culprits = ROLLOUTS[name]
    spoil(place)
    refuse_run(place, *culprits)


def test_rollouts_of_a_wrong_suffix_or_damaged_parquet_are_refused(place: Place) -> None:
    wrong = place.root / "rollouts.csv"
    wrong.write_bytes(place.rollouts.read_bytes())
    refuse_run(place, "rollouts.csv", "'.csv'", rollouts=wrong)
    parquet = place.root / "rollouts.parquet"
    write_rollouts(random_rollouts(4, 2), parquet)
    whole = parquet.read_bytes()
    for damaged in (whole[:-20], whole[: len(whole) // 2], b"", b"PAR1 but no more", b"PAR1" + bytes(50) + b"PAR1"):
        parquet.write_bytes(damaged)
        refuse_run(place, "rollouts.parquet", "Parquet", rollouts=parquet)
    corrupted = bytearray(whole)
    corrupted[100:400] = bytes(300)
    parquet.write_bytes(bytes(corrupted))
    refuse_run(place, "rollouts.parquet", rollouts=parquet)
    refuse_run(place, str(place.checkpoint), rollouts=place.checkpoint)
