"""slime's ``--save-debug-rollout-data`` (also miles'): ``torch.save`` of the samples of a rollout, with exact token ids.

Source: ``save_debug_rollout_data`` of ``slime/observability/rollout_data_utils.py`` and ``Sample`` of ``slime/utils/types.py``
(August 2026).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from entropy_probe.data.rollouts.formats.base import Converted, DumpFile, DumpOptions
from entropy_probe.data.rollouts.formats.parts import (
    Numbers,
    column,
    column_of,
    drawn_of,
    log_probs_at,
    masks_of,
)
from entropy_probe.errors import InputError, some_of

COLUMNS = {"tokens", "response_length", "status"}
PRESENT = {
    "multimodal_train_inputs": "images",
    "teacher_log_probs": "a teacher's term in its loss",
    "mopd_teacher_log_probs": "a teacher's term in its loss",
}
"""Columns without which alone a sample is what our rows can say, and what they mean."""


class Slime:
    """The reward is the raw one: slime makes advantages of it later."""

    name = "slime"
    title = "slime's rollout data"
    takes = frozenset({"reward_key"})

    def recognises(self, row: Mapping[str, Any]) -> bool:
        """By its columns."""
        return row.keys() >= COLUMNS

    def convert(self, files: Sequence[DumpFile], options: DumpOptions) -> Converted:
        """Sequences split at the response's length; ``group_index`` names the prompt.

        Raises:
            InputError: samples of several versions of the weights, or with what our columns cannot say.
        """
        located = [(where, _plain(row)) for file in files for where, row in file.rows]
        _refuse_mixed_versions(located)
        prompts = Numbers()
        return Converted([(where, _row(where, row, prompts, options)) for where, row in located])


def _row(where: str, row: Mapping[str, Any], prompts: Numbers, options: DumpOptions) -> dict[str, Any]:
    for name, what in PRESENT.items():
        if row.get(name) is not None:
            raise InputError(f"{where} has {name}: {what}, which rows cannot say; leave such samples out")
    if row.get("rollout_top_p_token_ids") is not None:
        raise InputError(
            f"{where} was sampled with top_p below 1, whose log-probs are of a cut distribution; sample whole"
        )
    tokens, count = column(row, "tokens", where), column(row, "response_length", where)
    if (
        isinstance(count, bool)
        or not isinstance(count, int)
        or not isinstance(tokens, list)
        or not 0 < count < len(tokens)
    ):
        size = len(tokens) if isinstance(tokens, list) else "no"
        raise InputError(f"{where}: response_length is {count!r} of {size} tokens; expected a prompt and a response")
    prompt, response = tokens[:-count], tokens[-count:]
    sampler = None if row.get("rollout_log_probs") is None else column_of(row, "rollout_log_probs", count, where)
    mask = [1] * count if row.get("loss_mask") is None else column_of(row, "loss_mask", count, where)
    drawn = drawn_of(mask, sampler)
    mask = [0] * count if row.get("remove_sample") else mask
    group = row.get("group_index")
    found: dict[str, Any] = {
        "prompt_id": prompts.of(tuple(prompt)) if group is None else group,
        "prompt_ids": prompt,
        "response_ids": response,
        "reward": _reward(where, row.get("reward"), options.reward_key),
        "cut": row.get("status") == "truncated",
        **masks_of(mask, drawn),
    }
    if sampler is not None:
        found["logprobs"] = log_probs_at(sampler, drawn) if any(drawn) else sampler
    if isinstance(row.get("response"), str) and row["response"]:
        found["response"] = row["response"]
    for name in ("index", "status"):
        if row.get(name) is not None:
            found[name] = row[name]
    return found


def _reward(where: str, reward: object, key: str | None) -> object:
    if not isinstance(reward, Mapping):
        return reward
    if key is None or key not in reward:
        named = some_of(sorted(map(str, reward)), 8)
        told = "" if key is None else f", and none is {key}"
        raise InputError(f"{where} has several rewards ({named}){told}; convert the dump with the key of the trainer's")
    return reward[key]


def _refuse_mixed_versions(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    versions = {str(version): where for where, row in rows for version in row.get("weight_versions") or ()}
    if len(versions) > 1:
        first, second = list(versions.items())[:2]
        raise InputError(
            f"{second[1]} was sampled with weight version {second[0]}, {first[1]} with {first[0]}: {len(versions)} policies, "
            "and rows of one batch are one policy's; give the samples of one version"
        )


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.tolist() if isinstance(value, Tensor) and value.dtype is not torch.bool else value
        for name, value in row.items()
    }
