"""Dumps of text are refused, and retokenised only where that is asked for, with every text counted that does not come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dumps import TEXT, Row, areal, lines, verl, written
from entropy_probe import InputError, group_rollouts, read_rollouts, write_rollouts
from entropy_probe.data.bundled_run import demo_folder
from entropy_probe.data.rollouts.formats.base import DumpOptions
from entropy_probe.data.rollouts.reading import read_files


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_folder() / "full" / "checkpoint-20")


@pytest.mark.parametrize("name", TEXT)
def test_text_is_refused_with_both_ways_out(name: str, tmp_path: Path) -> None:
    path = written(name, tmp_path)
    with pytest.raises(InputError) as refused:
        read_rollouts(path)
    said = str(refused.value)
    assert str(path) in said
    assert "no token ids" in said
    assert "`entropy-probe sample`" in said
    assert "entropy_probe.integrations.rows" in said


class Words:
    """A tokenizer of characters that does not know the letter q: what it gives for it is decoded as a blank."""

    bos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        own = [self.bos_token_id] if add_special_tokens else []
        return {"input_ids": own + [32 if letter == "q" else ord(letter) for letter in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(one) for one in ids if not (skip_special_tokens and one == self.bos_token_id))


@pytest.mark.parametrize("name", TEXT)
def test_retokenised_text_is_marked_and_what_does_not_come_back_is_counted(name: str, tmp_path: Path) -> None:
    output = {"verl": "output", "trl": "completion", "areal": "completion"}[name]

    def unknown(rows: list[Row]) -> None:
        rows[1][output] = "8q"
        rows[3][output] = "qqq"

    read = read_files(written(name, tmp_path, unknown), tokenizer=Words())
    assert [row.response for row in read.rollouts] == [None] * 4
    assert read.rollouts[1].response_ids == (ord("8"), 32)
    assert all(row.extra["retokenized"] is True for row in read.rollouts)
    special = (2,) if name != "areal" else ()
    assert read.rollouts[0].prompt_ids == (*special, *map(ord, "user\n1+7="))
    (note,) = read.notes
    assert "2 of 4 responses and 0 of their prompts do not come back" in note.seen
    assert ("special tokens were stripped" in note.seen) == (name != "areal")
    assert group_rollouts(read.rollouts).group_sizes == (2, 2)


def test_rows_that_were_retokenised_say_so_when_they_are_read_again(tmp_path: Path) -> None:
    rows = read_files(written("verl", tmp_path), tokenizer=Words()).rollouts
    write_rollouts(rows, tmp_path / "ours.jsonl")
    (note,) = read_files(tmp_path / "ours.jsonl").notes
    assert note.seen.startswith("the ids of 4 of 4 rows were made of text")


def test_a_real_tokenizers_text_comes_back(tokenizer: Any, tmp_path: Path) -> None:
    rows = [row | {"input": row["input"].removeprefix("user\n")} for row in verl()]
    read = read_files(lines(tmp_path / "50.jsonl", rows), tokenizer=tokenizer)
    assert "0 of 4 responses" in read.notes[0].seen
    assert [row.reward for row in read.rollouts] == [1, 0, 1, 0]


def test_verls_uid_names_the_prompt_and_trls_reward_is_taken_by_its_name(tmp_path: Path) -> None:
    def same(rows: list[Row]) -> None:
        for number, row in enumerate(rows):
            row["uid"] = f"u{number % 2}"
            row["input"] = f"{number % 2}"

    rows = read_files(written("verl", tmp_path, same), tokenizer=Words()).rollouts
    assert [row.prompt_id for row in rows] == ["u0", "u1", "u0", "u1"]
    rows = read_files(written("trl", tmp_path), options=DumpOptions(reward_key="is_right"), tokenizer=Words()).rollouts
    assert [row.reward for row in rows] == [1, 0, 1, 0]
    assert {row.advantage for row in rows} == {0.5}


def test_text_of_several_versions_of_the_weights_is_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "1.jsonl", [areal()[0], areal()[1] | {"tail_version": 4}])
    with pytest.raises(InputError, match=r"1.jsonl line 2 was sampled with weight versions 3, 4"):
        read_files(path, tokenizer=Words())


def test_an_empty_response_is_refused_and_not_left_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"50.jsonl line 2: the response is empty text"):
        read_files(written("verl", tmp_path, lambda rows: rows[1].update(output="")), tokenizer=Words())
