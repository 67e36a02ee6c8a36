"""Rows of one micro-batch that TRL hands to its loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entropy_probe.compat.trl import SAMPLER_LOGPS
from entropy_probe.data.rollouts import Rollout

REWARD, GROUP = "entropy_probe_reward", "entropy_probe_group"
LENGTH, DRAWN = "entropy_probe_length", "entropy_probe_drawn"
OLD, REFERENCE = "entropy_probe_old_logps", "entropy_probe_ref_logps"
"""Our columns in TRL's batch."""


@dataclass(frozen=True)
class OfTheStep:
    """What all rows of one step share.

    Attributes:
        step: N + 1.
        loss_type: TRL's name of the loss.
        window_tokens: what the loss divides by where it divides by tokens of the window; None for a loss that never does.
        old_is_the_samplers: responses were drawn from the model that old log-probs are of, by no other engine.
        draws_are_known: the sampling settings were looked at, and are neutral.
        temperature: τ.
        max_completion_length: the trainer's.
        eos_ids: what ends a response.
        tokenizer: for the texts.
        columns: what every row says beside the format's own columns.
    """

    step: int
    loss_type: str
    window_tokens: float | None
    old_is_the_samplers: bool
    draws_are_known: bool
    temperature: float
    max_completion_length: int
    eos_ids: tuple[int, ...]
    tokenizer: Any
    columns: Mapping[str, Any]


def rows_of(inputs: Mapping[str, Any], micro_batch: int, step: OfTheStep) -> Iterator[tuple[tuple[int, int], Rollout]]:
    """((generation step, group), row) for each row of a micro-batch, as the loss consumed it."""
    for i in range(len(inputs["advantages"])):
        generated_for, group = inputs[GROUP][i].tolist()
        tokens = int(inputs[LENGTH][i])
        prompt_ids = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()].tolist()
        response_ids = inputs["completion_ids"][i][:tokens].tolist()
        drawn, in_the_loss = drawn_tokens(inputs, i), _tokens_of_the_loss(inputs, i)
        old = _values(inputs, OLD, i, tokens)
        sampler = _values(inputs, SAMPLER_LOGPS, i, tokens) or (old if step.old_is_the_samplers else None)
        reward = float(inputs[REWARD][i])
        row = Rollout(
            prompt_id=f"{generated_for}-{group}",
            prompt_ids=tuple(prompt_ids),
            response_ids=tuple(response_ids),
            reward=reward if math.isfinite(reward) else None,
            advantage=float(inputs["advantages"][i]),
            logprobs=sampler if sampler and all(map(math.isfinite, sampler)) else None,
            temperature=step.temperature,
            top_k=0 if step.draws_are_known else None,
            top_p=1.0 if step.draws_are_known else None,
            cut=response_ids[-1] not in step.eos_ids,
            prompt=step.tokenizer.decode(prompt_ids, skip_special_tokens=False),
            response=step.tokenizer.decode(response_ids, skip_special_tokens=False),
            micro_batch=micro_batch,
            window_tokens=step.window_tokens,
            max_completion_length=step.max_completion_length,
            loss_type=step.loss_type,
            step=step.step,
            on_policy=generated_for == step.step if step.draws_are_known else None,
            eos_ids=step.eos_ids,
            old_logprobs=old,
            ref_logprobs=_values(inputs, REFERENCE, i, tokens),
            loss_mask=None if in_the_loss == drawn else tuple(map(int, in_the_loss)),
            sampled=drawn,
            extra=step.columns,
        )
        yield (generated_for, group), row


def unfit_rows(inputs: Mapping[str, Any], needs_the_sampler: bool) -> int:
    """How many rows of a micro-batch the format cannot hold: nothing was drawn, or log-probs of the loss are not finite.

    Args:
        inputs: the micro-batch.
        needs_the_sampler: the loss is a function of the sampler's log-probs.
    """
    names = (OLD, REFERENCE, *((SAMPLER_LOGPS,) if needs_the_sampler else ()))
    unfit = 0
    for i in range(len(inputs["advantages"])):
        tokens = int(inputs[LENGTH][i])
        values = [found for name in names if (found := _values(inputs, name, i, tokens)) is not None]
        unfit += not any(drawn_tokens(inputs, i)) or not all(math.isfinite(one) for found in values for one in found)
    return unfit


def drawn_tokens(inputs: Mapping[str, Any], i: int) -> tuple[bool, ...]:
    """Which tokens of response i the policy drew, [T]."""
    tokens = int(inputs[LENGTH][i])
    column: Tensor | None = inputs.get(DRAWN)
    return (True,) * tokens if column is None else tuple(column[i, :tokens].bool().tolist())


def _tokens_of_the_loss(inputs: Mapping[str, Any], i: int) -> tuple[bool, ...]:
    mask: Tensor = inputs["completion_mask"][i]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"][i]
    return tuple(mask[: int(inputs[LENGTH][i])].bool().tolist())


def _values(inputs: Mapping[str, Any], name: str, i: int, tokens: int) -> tuple[float, ...] | None:
    found: Tensor | None = inputs.get(name)
    if found is None:
        return None
    values: Sequence[float] = found[i, :tokens].to(torch.float64).tolist()
    return tuple(values)
