"""Rollouts made in Python are checked as a file's rows are, whatever library their ids come from; rows may be dicts."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from entropy_probe import InputError, Rollout, group_rollouts, read_rollouts, write_rollouts
from support import random_rollouts

PLAIN: dict[str, Any] = {
    "prompt_id": "a", "prompt_ids": (3, 4), "response_ids": (5, 6, 1), "reward": 0.5, "logprobs": (-0.5, -1.0, -0.25),
}  # fmt: skip


@pytest.mark.parametrize(
    "given",
    [
        {"prompt_ids": [3, 4], "response_ids": [5, 6, 1], "logprobs": [-0.5, -1, -0.25]},
        {
            "response_ids": np.array([5, 6, 1], dtype=np.uint16),
            "logprobs": np.array([-0.5, -1.0, -0.25], dtype=np.float32),
        },
        {"prompt_ids": torch.tensor([3, 4]), "logprobs": torch.tensor([-0.5, -1.0, -0.25], requires_grad=True)},
        {"logprobs": torch.tensor([-0.5, -1.0, -0.25], dtype=torch.bfloat16)},
        {"response_ids": [np.int64(5), torch.tensor(6), 1], "reward": np.float32(0.5)},
        {"reward": torch.tensor(0.5), "prompt_id": np.str_("a")},
    ],
)
def test_lists_arrays_and_tensors_become_tuples_of_pythons_own_numbers(given: dict[str, Any]) -> None:
    found = Rollout(**(PLAIN | given))
    assert found == Rollout(**PLAIN)
    assert {type(token) for token in found.prompt_ids + found.response_ids} == {int}
    assert {type(value) for value in (found.reward, *(found.logprobs or ()))} == {float}
    assert type(found.prompt_id) is str


def test_an_integer_of_numpy_names_the_same_prompt_as_pythons() -> None:
    row, other = random_rollouts(2, 1)
    rows = [replace(row, prompt_id=7), replace(row, prompt_id=np.int64(7))] + [replace(other, prompt_id=8)] * 2
    assert [group.prompt_id for group in group_rollouts(rows).groups] == [7, 8]


WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "nan reward": ({"reward": float("nan")}, ("'a'", "reward is nan")),
    "infinite reward of a tensor": ({"reward": torch.tensor(float("inf"))}, ("reward is inf",)),
    "boolean advantage": ({"advantage": np.bool_(True)}, ("advantage is a bool",)),
    "nan for logprobs": ({"logprobs": float("nan")}, ("logprobs is a float",)),
    "no reward": ({"reward": None}, ("neither a reward nor an advantage",)),
    "nan advantage": ({"advantage": float("nan")}, ("advantage is nan",)),
    "nan logprob": ({"logprobs": (-1.0, float("nan"), -1.0)}, ("logprobs is nan",)),
    "minus infinity": ({"logprobs": (-1.0, float("-inf"), -1.0)}, ("logprobs is -inf",)),
    "probability above 1": ({"logprobs": (-1.0, 1.0, -1.0)}, ("logprobs holds 1", "none above 0")),
    "too few logprobs": ({"logprobs": (-1.0,)}, ("1 logprobs for 3",)),
    "empty prompt": ({"prompt_ids": ()}, ("prompt_ids is empty",)),
    "empty response": ({"response_ids": torch.tensor([], dtype=torch.long), "logprobs": None}, ("response_ids is empty",)),
    "negative id": ({"response_ids": np.array([5, -100, 1])}, ("response_ids holds -100",)),
    "float ids": ({"response_ids": torch.tensor([5.0, 6.0, 1.0])}, ("response_ids holds 5.0",)),
    "boolean id": ({"response_ids": (5, True, 1)}, ("response_ids holds True",)),
    "a mask for ids": ({"response_ids": torch.tensor([True, True, False])}, ("response_ids holds True",)),
    "ids of a batch": ({"response_ids": torch.tensor([[5, 6, 1]])}, ("response_ids holds [5, 6, 1]",)),
    "one id": ({"response_ids": 5}, ("response_ids is a int",)),
    "text for ids": ({"prompt_ids": "3 4"}, ("prompt_ids is a str",)),
    "greedy": ({"temperature": 0.0}, ("temperature is 0.0", "above 0")),
    "infinite temperature": ({"temperature": float("inf")}, ("temperature is inf",)),
    "float top_k": ({"top_k": 50.5}, ("top_k is 50.5", "integer")),
    "infinite top_k": ({"top_k": float("inf")}, ("top_k is inf", "integer")),
    "text top_p": ({"top_p": "1"}, ("top_p is a str",)),
    "cut as a number": ({"cut": 1}, ("cut is 1",)),
    "negative end token": ({"eos_ids": (-1,)}, ("eos_ids holds -1",)),
    "boolean prompt_id": ({"prompt_id": True}, ("prompt_id is a bool",)),
    "float prompt_id": ({"prompt_id": 1.0}, ("prompt_id is a float",)),
    "no prompt_id": ({"prompt_id": None}, ("prompt_id is a NoneType",)),
    "no mapping": ({"extra": [1]}, ("extra is a list",)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused_in_a_file_is_refused_in_python_in_one_line(name: str) -> None:
    values, culprits = WRONG[name]
    with pytest.raises(InputError) as caught:
        Rollout(**(PLAIN | values))
    for culprit in culprits:
        assert culprit in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_logprobs_above_0_by_rounding_are_taken() -> None:
    assert Rollout(**(PLAIN | {"logprobs": (1e-6, -1.0, 0.0)})).logprobs == (1e-6, -1.0, 0.0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"reward": True}, {"reward": 1.0}),
        ({"reward": np.bool_(False)}, {"reward": 0.0}),
        ({"top_k": 0.0, "step": np.float64(7.0)}, {"top_k": 0, "step": 7}),
        ({"max_completion_length": 50.0}, {"max_completion_length": 50}),
        (dict.fromkeys(("step", "temperature", "cut", "prompt", "eos_ids"), float("nan")), {}),
        ({"micro_batch": np.float32("nan")}, {}),
    ],
)
def test_truth_values_are_rewards_and_a_tables_floats_and_holes_are_integers_and_nothing(
    given: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = Rollout(**(PLAIN | given))
    assert found == Rollout(**(PLAIN | expected))
    for name, value in expected.items():
        assert type(getattr(found, name)) is type(value)


def test_rows_may_be_dicts_among_records() -> None:
    rows = random_rollouts(3, 2)
    dicts: list[Any] = [
        {
            "prompt_id": r.prompt_id,
            "prompt_ids": list(r.prompt_ids),
            "response_ids": np.array(r.response_ids),
            "reward": r.reward,
        }
        for r in rows
    ]
    assert group_rollouts(dicts) == group_rollouts(rows) == group_rollouts([*rows[:3], *dicts[3:]])


@pytest.mark.parametrize(
    ("spoil", "culprits"),
    [
        ({"reward": float("nan")}, ("row 3", "reward is nan")),
        ({"response_ids": []}, ("row 3", "response_ids is empty")),
        ({"prompt_ids": None}, ("row 3 has no prompt_ids",)),
    ],
)
def test_a_dict_that_breaks_the_schema_is_named_by_its_number(
    spoil: dict[str, Any], culprits: tuple[str, ...], tmp_path: Path
) -> None:
    rows: list[Any] = [dict(PLAIN, prompt_id=n // 2) for n in range(4)]
    rows[3] |= spoil
    for take in (group_rollouts, lambda given: write_rollouts(given, tmp_path / "rows.jsonl")):
        with pytest.raises(InputError) as caught:
            take(rows)
        for culprit in culprits:
            assert culprit in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_is_no_row_is_refused() -> None:
    with pytest.raises(InputError, match="row 0 is a str"):
        group_rollouts("rollouts.jsonl")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the rollouts are a int; expected rows"):
        group_rollouts(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="row 1 is a tuple"):
        group_rollouts([*random_rollouts(1, 1), (3, 4)])  # type: ignore[list-item]


def test_dicts_are_written_as_records_are(tmp_path: Path) -> None:
    write_rollouts([dict(PLAIN, response_ids=torch.tensor([5, 6, 1]), turn=np.int64(3))], tmp_path / "rows.jsonl")
    assert read_rollouts(tmp_path / "rows.jsonl") == [Rollout(**PLAIN, extra={"turn": 3})]


def test_what_a_batch_derives_is_derived_once_and_is_no_part_of_what_it_is() -> None:
    """Rebuilt for every row, the responses of 32,768 rows took half a minute."""
    rows = random_rollouts(3, [2, 3, 2])
    batch, same = group_rollouts(rows), group_rollouts(rows)
    assert batch.responses is batch.responses
    assert batch.group_sizes is batch.group_sizes
    assert batch.positions is batch.positions
    assert batch == same
    assert batch.of_prompts([2, 0]).responses == (*batch.groups[2].responses, *batch.groups[0].responses)
    assert replace(batch, groups=batch.groups[:2]).group_sizes == (2, 3)
    copied = pickle.loads(pickle.dumps(batch))
    assert copied == same
    assert copied.responses == same.responses
