"""Columns with a value a response token: which tokens were drawn, what the loss leaves out, log-probs of three policies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from entropy_probe import InputError, Rollout, group_rollouts, read_batch, write_rollouts
from entropy_probe.data.rollouts import SpecialIds, refuse_unsampled
from entropy_probe.model.padding import pad_right

IDS = (6, 7, 8, 9, 1)


def rows(**columns: Any) -> list[Rollout]:
    """Four rows; the last one has the further columns."""
    found = [Rollout(f"p{n // 2}", (3 + n // 2, 4, 5), IDS, 0.0, advantage=0.5) for n in range(4)]
    return [*found[:3], replace(found[3], **columns)]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a mask too short": ({"loss_mask": [1, 0]}, "2 loss_mask for 5 response tokens"),
    "a mask too long": ({"sampled": [True] * 8}, "8 sampled for 5 response tokens"),
    "an alias too short": ({"extra": {"tool_mask": [1, 1]}}, "2 tool_mask for 5 response tokens"),
    "weights in a mask": ({"loss_mask": [1, 0.5, 1, 1, 1]}, "loss_mask holds 0.5; expected 0 and 1"),
    "nothing drawn": ({"sampled": [0] * 5}, "sampled is false at every response token"),
    "masks that disagree": (
        {"sampled": [1, 1, 0, 1, 1], "extra": {"env_mask": [1, 0, 0, 1, 1]}},
        "env_mask and another column say different tokens",
    ),
    "reference log-probs above 0": ({"ref_logprobs": [-1, -1, 0.5, -1, -1]}, "ref_logprobs holds 0.5"),
    "a hole among old log-probs": ({"old_logprobs": [-1, -1, float("nan"), -1, -1]}, "old_logprobs is nan"),
    "advantages too few": ({"advantage": [0.5, 0.5]}, "2 advantage for 5 response tokens"),
    "a row without reward and advantage": ({"reward": None, "advantage": None}, "neither a reward nor an advantage"),
    "a whole row not drawn": ({"extra": {"response_mask": 0}}, "response_mask = 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_column_is_refused_with_its_row(name: str) -> None:
    columns, said = WRONG[name]
    with pytest.raises(InputError) as caught:
        group_rollouts(rows(**columns))
    assert said in str(caught.value)
    assert "'p1'" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["sampled", "response_mask", "tool_mask", "env_mask"])
@pytest.mark.parametrize("kind", ["list", "array", "tensor"])
def test_tokens_that_were_not_drawn_are_context_alone(name: str, kind: str) -> None:
    mask = {"list": [1, 1, 0, 0, 1], "array": np.array([1, 1, 0, 0, 1.0]), "tensor": torch.tensor([1, 1, 0, 0, 1]) > 0}[
        kind
    ]
    given = {"sampled": mask} if name == "sampled" else {"extra": {name: mask}}
    batch = group_rollouts(rows(**given, logprobs=(-1, -2, 0, 0, -3)))
    row = batch.responses[3]
    assert (row.tokens, row.sampled_places, row.length) == (3, (0, 1, 4), 8)
    assert batch.lengths == (5, 5, 5, 3)
    assert row.at_sampled(row.logprobs or ()) == (-1.0, -2.0, -3.0)
    padded = pad_right(batch.responses[2:], torch.device("cpu"))
    assert padded.targets.tolist() == [*IDS, 6, 7, 1]
    assert padded.positions.tolist() == [2, 3, 4, 5, 6, 2, 3, 6]
    assert padded.attention_mask.sum().item() == 16


def test_values_of_responses_find_their_tokens_past_those_that_were_not_drawn() -> None:
    padded = pad_right(rows(sampled=[1, 0, 1, 0, 1])[2:], torch.device("cpu"))
    positions = torch.arange(2 * 8).view(2, 8, 1)
    assert torch.equal(padded.of_tokens(padded.on_responses(positions))[:, 0], padded.rows * 8 + padded.positions)


def test_a_mask_of_ones_says_nothing() -> None:
    assert rows(sampled=[True] * 5)[3] == rows()[3]


def test_a_turn_may_end_before_the_words_of_another() -> None:
    special = SpecialIds(end=(1,), stop=(1,))
    turn = (6, 1, 8, 9, 1)
    ends = rows(response_ids=turn)
    with pytest.raises(InputError, match="go on after an end token"):
        refuse_unsampled(group_rollouts(ends), special, "the rollouts")
    refuse_unsampled(group_rollouts([*ends[:3], replace(ends[3], sampled=(1, 1, 0, 1, 1))]), special, "the rollouts")
    with pytest.raises(InputError, match="go on after an end token"):
        refuse_unsampled(
            group_rollouts([*ends[:3], replace(ends[3], sampled=(1, 1, 1, 0, 1))]), special, "the rollouts"
        )


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rewards_may_be_missing_where_every_row_has_an_advantage(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rollouts.{kind}"
    write_rollouts([replace(row, reward=None) for row in rows()], path)
    assert {row.reward for row in read_batch(path).responses} == {None}


def test_a_column_of_tokens_is_laid_end_to_end_without_what_was_not_drawn() -> None:
    every = {"ref_logprobs": [-1.0, -2.0, -3.0, -4.0, -5.0]}
    batch = group_rollouts([replace(row, **every) for row in rows(sampled=[0, 1, 1, 1, 1])])
    assert batch.of_tokens("ref_logprobs") == (*[-1.0, -2.0, -3.0, -4.0, -5.0] * 3, -2.0, -3.0, -4.0, -5.0)
    assert batch.of_tokens("old_logprobs") is None
    with pytest.raises(InputError, match="3 of 4 rows have no ref_logprobs"):
        group_rollouts(rows(**every))
