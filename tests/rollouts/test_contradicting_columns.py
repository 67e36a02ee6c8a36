"""Columns that say that a row was sampled, or that its loss was, otherwise than the probe takes it are refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from entropy_probe import InputError, Rollout, group_rollouts, read_batch, write_rollouts

RESPONSE = 4
PROMPT = 3


def rows(**extra: Any) -> list[Rollout]:
    """Four rows; the last one has the further columns."""
    found = [Rollout(f"p{n // 2}", (3 + n // 2, 4, 5), (6, 7, 8, 1), 0.0, temperature=0.8) for n in range(4)]
    return [*found[:3], replace(found[3], extra=extra)]


MASK = "were not sampled by the policy, or are not in the loss"
REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    # masks
    **{
        name: ({name: [1, 1, 0, 1]}, (f"{name} with 0 at 1 of 4", MASK))
        for name in (
            "completion_mask", "loss_masks", "action_mask",
            "assistant_masks", "token_loss_mask", "generation_mask", "some_other_mask",
        )
    },
    "a mask over prompt and response": ({"loss_masks": [0, 0, 0, 1, 1, 0, 0]}, ("loss_masks with 0 at 2 of 4", MASK)),
    "a mask that counts the prompt": ({"loss_masks": [0, 1, 1, 1, 1, 1, 1]}, ("1 at 2 of 3 prompt tokens",)),
    "booleans": ({"action_mask": [True, False, True, True]}, ("action_mask with 0 at 1 of 4",)),
    "a tensor": ({"completion_mask": torch.tensor([1.0, 1.0, 1.0, 0.0])}, ("completion_mask with 0 at 1 of 4",)),
    "all zeros": ({"loss_masks": np.zeros(4)}, ("loss_masks with 0 at 4 of 4",)),
    "a mask too short": ({"action_mask": [1, 1]}, ("action_mask of 2 values", "expected 4")),
    "a mask of weights": ({"loss_masks": [1, 0.5, 1, 1]}, ("loss_masks holds 0.5",)),
    "a whole row left out": ({"sample_mask": 0.0}, ("sample_mask = 0.0", "not in the trainer's loss")),
    "labels": ({"labels": [-100, -100, -100, 6, -100, 8, 1]}, ("labels with 0 at 1 of 4", MASK)),
    # further terms of the loss
    **{
        name: ({name: 0.04}, (f"{name} = 0.04", "KL term"))
        for name in ("kl_beta", "kl_coef", "kl_loss_coef", "init_kl_coef", "kl_penalty", "reference_policy_kl_penalty")
    },
    **{
        name: ({name: 0.01}, (f"{name} = 0.01", "entropy term"))
        for name in ("entropy_coeff", "entropy_loss_coef", "ent_coef")
    },
    "a KL loss": ({"use_kl_loss": True}, ("use_kl_loss = True", "KL term")),
    "a coefficient as text": ({"kl_coef": "0.04"}, ("kl_coef = '0.04'",)),
    "a router's loss": ({"router_aux_loss_coef": 0.001}, ("router_aux_loss_coef = 0.001",)),
    # weights
    **{
        name: ({name: [1.0, 1.0, 0.5, 1.0]}, (f"{name} = 0.5 at response token 2", "weights its tokens"))
        for name in ("importance_sampling_ratio", "rollout_is_weights", "token_weights", "loss_weights", "weights", "ratio")
    },
    **{
        f"{name}, another spelling": ({name: 0.04}, (f"{name} = 0.04", "KL term"))
        for name in ("kl_coefficient", "kl_penalty_weight", "beta_kl", "algorithm.kl_ctrl.kl_coef")
    },
    **{
        f"{name}, another spelling": ({name: 0.01}, (f"{name} = 0.01", "entropy term"))
        for name in ("entropy_coefficient", "ent_coeff", "entropy_bonus_coeff", "actor.entropy_coeff")
    },
    "another router's loss": ({"moe_aux_loss_coeff": 0.001}, ("moe_aux_loss_coeff = 0.001",)),
    "within the loss's settings": ({"loss_config": {"kl_coef": 0.04}}, ("loss_config.kl_coef = 0.04", "KL term")),
    "within a configuration": ({"config": {"lr": 1.0, "kl_coef": 0.1}}, ("config.kl_coef = 0.1", "KL term")),
    "arguments of a sampler": ({"sampling_args": {"top_p": 0.9}}, ("sampling_args.top_p = 0.9",)),
    **{
        f"{name}, of tokens": ({name: [1.0, 1.0, 0.5, 1.0]}, (f"{name} = 0.5 at response token 2",))
        for name in ("loss_multiplier", "token_level_weights", "rollout_is", "is_ratio", "advantage_weights")
    },
    "a multiplier of the row": ({"loss_multiplier": 0.0}, ("loss_multiplier = 0.0",)),
    "mask": ({"mask": [1, 1, 0, 1]}, ("mask with 0 at 1 of 4",)),
    "mask of the row": ({"mask": 0}, ("mask = 0", "not in the trainer's loss")),
    "another mask of the row": ({"sample_loss_mask": 0}, ("sample_loss_mask = 0", "not in the trainer's loss")),
    "one weight for the row": ({"sample_weight": 2.0}, ("sample_weight = 2.0",)),
    "too few weights": ({"is_weights": [1.0]}, ("is_weights of 1 values", "4")),
    "advantages of tokens": ({"advantages": [0.5, 0.5, 0.5, 0.25]}, ("advantages", "which is not read")),
    # the sampler
    **{
        name: ({name: value}, (f"was sampled with {name} = ", "not the policy's"))
        for name, value in {
            "typical_p": 0.9, "min_new_tokens": 4, "suppress_tokens": [7], "bad_words_ids": [[7]], "num_beams": 4,
            "guidance_scale": 1.5, "forced_eos_token_id": 1, "do_sample": False, "logit_bias": {"7": -100.0},
            "min_tokens": 3, "presence_penalty": 0.5, "top_h": 0.4,
        }.items()
    },
    "a bias within": ({"sampling_params": {"logit_bias": np.array([0.0, 2.0])}}, ("sampling_params.logit_bias = [0.0, 2.0]",)),
    "biases in pairs": ({"sequence_bias": [[[5], 0.0], [[6], 1.0]]}, ("sequence_bias = ",)),
    "an empty schema": ({"guided_json": {}}, ("guided_json = {}",)),
    "parameters as JSON text": ({"sampling_params": '{"top_p": 0.9}'}, ("sampling_params.top_p = 0.9",)),
    "a controller of a KL term": ({"kl_ctrl": {"type": "fixed", "kl_coef": 0.1}}, ("kl_ctrl = {'kl_coef': 0.1", "KL term")),
    "a controller that names no coefficient": ({"kl_ctrl": {"horizon": 0}}, ("kl_ctrl = ",)),
    "padding among the ids": ({"padding_mask": [0, 0, 1, 1]}, ("padding_mask with both 0 and 1", "are padding")),
    "overlong rows": ({"overlong_mask": [0, 0, 0, 0]}, ("overlong_mask with 0 at 4 of 4", "overlong responses are left out")),
    "a loss mask of a padding's name": ({"pad_loss_mask": [1, 0, 1, 1]}, ("pad_loss_mask with 0 at 1 of 4", MASK)),
    "parameters of a sampler": ({"sampling_params": {"top_k": -1, "top_p": 0.9}}, ("sampling_params.top_p = 0.9",)),
    "another temperature there": ({"sampling_params": {"temperature": 1.0}}, ("sampling_params.temperature = 1.0", "0.8")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_column_that_contradicts_the_probe_is_refused_by_its_name_and_value(name: str) -> None:
    extra, culprits = REFUSED[name]
    with pytest.raises(InputError) as caught:
        group_rollouts(rows(**extra))
    assert "'p1'" in str(caught.value)
    for culprit in culprits:
        assert culprit in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


NEUTRAL: dict[str, Any] = {
    "response_mask": [1, 1, 1, 1], "tool_mask": None, "env_mask": torch.ones(4),
    "sample_mask": 1.0, "action_mask": True, "image_mask": [0, 1], "labels": [-100, -100, -100, 6, 7, 8, 1],
    "beta": 0.0, "kl_coef": None, "kl_penalty": "low_var_kl", "use_kl_loss": False, "entropy_coeff": 0, "betas": [0.9, 0.999],
    "importance_sampling_ratio": [1.0, 1.0 + 1e-7, 1.0, 1.0], "sample_weight": 1, "weight": 70.5, "ratio": 0.5,
    "top_entropy_quantile": 1.0,
    "top_k": None, "typical_p": 1.0, "min_new_tokens": 0, "suppress_tokens": [], "num_beams": 1, "do_sample": True,
    "guidance_scale": None, "sampling_params": {"temperature": 0.8, "top_p": 1.0, "max_tokens": 64, "seed": None},
    "bad_words_ids": (), "begin_suppress_tokens": (), "logit_bias": {"5": 0, 6: np.float32(0.0)}, "sequence_bias": [[[5], 0.0]],
    "kl_ctrl": {"type": "fixed", "kl_coef": np.float64(0.0), "horizon": 10_000}, "token_healing": False,
    "generation_config": {"suppress_tokens": np.array([], dtype=int), "logit_bias": torch.zeros(3)},
    "sampling": '{"top_p": 1.0, "seed": null}', "generation_kwargs": "SamplingParams(top_p=1.0)",
    "padding_mask": [0, 0, 0, 0], "pad_mask": [1, 1, 1, 1], "eos_mask": [0, 0, 0, 1], "is_truncated_mask": [0, 0, 0, 0],
    "truncated_mask": [False] * 4, "overlong_mask": [1, 1, 1, 1], "prompt_token_mask": [1, 1, 1, 0, 0, 0, 0],
    "metadata": {"beta": 0.5, "top_p": 0.9}, "config": {"lr": 1.0, "kl_coef": 0.0}, "compression_ratio": 0.5, "this_ratio": 2.0,
    "mask": [1, 1, 1, 1], "answer": "42", "entropy": 1.7, "kl": 0.02,
}  # fmt: skip


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_column_that_changes_nothing_is_kept(name: str) -> None:
    value = NEUTRAL[name]
    if name != "top_k":
        assert name in group_rollouts(rows(**{name: value})).responses[3].extra


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_of_a_file_are_refused_as_those_of_python_are(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rollouts.{kind}"
    write_rollouts(rows(action_mask=[1, 1, 0, 1]), path)
    with pytest.raises(InputError, match=r"'p1' has action_mask with 0 at 1 of 4 response tokens"):
        read_batch(path)
    write_rollouts(rows(action_mask=[1, 1, 1, 1]), path)
    assert len(read_batch(path).groups) == 2


def test_responses_that_the_limit_cut_and_the_loss_left_out_are_refused_unless_none_was_cut() -> None:
    def masked(cut: bool | None) -> list[Rollout]:
        return [replace(row, cut=cut, extra={"mask_truncated_completions": True}) for row in rows()]

    assert len(group_rollouts(masked(False)).groups) == 2
    for cut in (True, None):
        with pytest.raises(InputError, match="mask_truncated_completions = True"):
            group_rollouts(masked(cut))


def test_advantages_that_repeat_the_advantage_are_taken() -> None:
    given = [replace(row, advantage=0.25, extra={"advantages": [0.25] * 4}) for row in rows()]
    assert len(group_rollouts(given).groups) == 2
