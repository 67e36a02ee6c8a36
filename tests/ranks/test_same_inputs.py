"""Digests of inputs: equal for equal ones, another for any change; and what is said of ranks that differ."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from entropy_probe import InputError, Settings, group_rollouts, state_of_optimizer
from entropy_probe.common.arrays import FloatArray
from entropy_probe.data.rollouts import Rollout
from entropy_probe.data.rollouts.digest import digest_of_batch
from entropy_probe.optimizers.digest import digest_of_adam
from entropy_probe.optimizers.state import AdamState
from entropy_probe.ranks.collectives import Ranks
from entropy_probe.ranks.same_inputs import check_same_inputs, checksum, digest_of_settings, digest_of_tensors
from support import random_batch, random_rollouts, tiny_model, trained_optimizer

CHANGES: dict[str, Any] = {
    "prompt_ids": (5, 6), "response_ids": (9, 1), "reward": 0.25, "advantage": 0.5, "logprobs": (-1.0, -2.0), "cut": True,
    "prompt": "a", "response": "b", "micro_batch": 3, "window_tokens": 7.0, "max_completion_length": 9,
    "loss_type": "dapo", "step": 4, "on_policy": True, "extra": {"source": "here"}, "temperature": 1.0, "top_k": 0,
    "top_p": 1.0, "prompt_id": "other", "eos_ids": (1,), "padding_id": 0,
    "old_logprobs": (-1.0, -3.0), "ref_logprobs": (-1.0, -4.0), "loss_mask": (1, 0), "sampled": (True, False),
    "token_weight": (1.0, 0.5), "mini_batch": 2,
}  # fmt: skip

EVERYWHERE = {
    "temperature", "advantage", "micro_batch", "window_tokens", "max_completion_length", "loss_type", "step", "eos_ids",
    "old_logprobs", "ref_logprobs", "mini_batch",
}  # fmt: skip
"""Columns that every row of a batch must have, or agree about."""


def test_any_column_of_rollouts_changes_their_digest() -> None:
    assert CHANGES.keys() == {column.name for column in fields(Rollout)}

    def batch(**columns: Any) -> bytes:
        everywhere = {name: value for name, value in columns.items() if name in EVERYWHERE}
        rows = [replace(row, response_ids=(7, 1), **everywhere) for row in random_rollouts(3, 2)]
        return digest_of_batch(
            group_rollouts(replace(row, **columns) if row.prompt_id == "p1" else row for row in rows)
        )

    digests = [batch(), digest_of_batch(None), *(batch(**{name: value}) for name, value in CHANGES.items())]
    assert batch() == digests[0]
    assert len(set(digests)) == len(digests)
    first = random_batch(3, 2)
    assert digest_of_batch(replace(first, groups=first.groups[::-1])) != digest_of_batch(first)
    assert digest_of_batch(replace(first, temperature=0.5)) != digest_of_batch(first)


def test_settings_and_what_else_is_chosen_change_their_digest() -> None:
    digests = [
        digest_of_settings(Settings()),
        digest_of_settings(Settings(seed=1)),
        digest_of_settings(Settings(dtype=torch.float64)),
        digest_of_settings(Settings(learning_rate=1e-3)),
        digest_of_settings(Settings(learning_rate=np.nextafter(1e-3, 1))),
        digest_of_settings(Settings(), "fsdp2"),
    ]
    assert len(set(digests)) == len(digests)
    assert digest_of_settings(Settings(seed=1)) == digests[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.bool])
def test_a_checksum_is_that_of_the_bits_in_their_order(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(30).reshape(5, 6).remainder(7).to(dtype)
    found = checksum(tensor)
    monkeypatch.setattr("entropy_probe.ranks.same_inputs.CHUNK", 7)
    assert checksum(tensor.clone()) == found  # whatever the chunks
    assert checksum(tensor.T) != found
    assert checksum(tensor.flip(0)) != found
    changed = tensor.clone()
    changed[4, 5] = changed[4, 5].logical_not().to(dtype)
    assert checksum(changed) != found


def test_names_shapes_types_and_values_of_weights_change_their_digest() -> None:
    weight = torch.zeros(2, 3)
    touched = weight.clone()
    touched[1, 2] = torch.nextafter(torch.tensor(0.0), torch.tensor(1.0))
    digests = [
        digest_of_tensors({"a": weight}),
        digest_of_tensors({"b": weight}),
        digest_of_tensors({"a": weight.T}),
        digest_of_tensors({"a": weight.double()}),
        digest_of_tensors({"a": touched}),
        digest_of_tensors({"a": weight, "b": weight}),
    ]
    assert len(set(digests)) == len(digests)
    assert digest_of_tensors({"a": weight.clone()}) == digests[0]


def test_moments_steps_and_groups_change_the_digest_of_adam() -> None:
    def state() -> AdamState:
        model = tiny_model()
        return state_of_optimizer(trained_optimizer(model), model)

    adam = state()
    name, moments = next(iter(adam.moments.items()))
    variants = [
        replace(moments, step=moments.step + 1),
        replace(moments, exp_avg=moments.exp_avg * 2),
        replace(moments, exp_avg_sq=moments.exp_avg_sq * 2),
        replace(moments, max_exp_avg_sq=moments.exp_avg_sq),
    ]
    digests = [
        digest_of_adam(adam),
        digest_of_adam(adam.with_learning_rate(0.5)),
        *(digest_of_adam(replace(adam, moments={**adam.moments, name: variant})) for variant in variants),
    ]
    assert len(set(digests)) == len(digests)
    assert digest_of_adam(state()) == digests[0]


class Given(Ranks):
    """Ranks whose gathered numbers are given beforehand."""

    def gather_numbers(self, values: FloatArray) -> FloatArray:
        every = np.stack([values] * self.count)
        for rank, part in OTHERS:
            if values.shape[0] > part >= 0 and values.shape[0] > 1:
                every[rank, part, 31] += 1
            if part < 0:
                every[rank, 0, 0] += 1
        return every


OTHERS: list[tuple[int, int]] = []


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([(1, 0)], "rank 1 was given other rollouts than rank 0: all"),
        ([(1, 0), (2, 0), (3, 0), (3, 1)],
         "ranks 1, 2 and 3 were given other rollouts than rank 0, rank 3 was given other settings than rank 0: all"),
        ([(2, -1)], "some ranks were given inputs that others were not"),
    ],
)  # fmt: skip
def test_who_differs_in_what_is_said(others: list[tuple[int, int]], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"rollouts": bytes(32), "settings": bytes(range(32))}
    check_same_inputs(Given(1, 4), parts)
    monkeypatch.setitem(globals(), "OTHERS", others)
    with pytest.raises(InputError) as error:
        check_same_inputs(Given(1, 4), parts)
    assert str(error.value).startswith(said)
    check_same_inputs(Ranks(), parts)
