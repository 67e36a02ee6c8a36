"""Rows to a batch, with what the estimators need of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from entropy_probe.errors import InputError
from entropy_probe.rollouts.columns import refuse_contradictions
from entropy_probe.rollouts.records import PromptGroup, PromptId, Rollout, RolloutBatch
from entropy_probe.rollouts.rows import as_rollouts


def group_rollouts(
    rollouts: Iterable[Rollout | Mapping[str, Any]], temperature: float | None = None, *, least_responses: int = 2
) -> RolloutBatch:
    """Group rows by ``prompt_id`` and check what the estimators need: two prompts, two responses each, one temperature.

    Args:
        rollouts: the rows, in any order: records, or mappings with the columns of a file's row.
        temperature: sampling temperature of rows that declare none; 1 if neither says.
        least_responses: that a prompt must have; 1 will do for an evaluation batch under Rao-Blackwell.

    Raises:
        InputError: a row that breaks the schema, named by its number from 0; fewer than two prompts, a prompt with one
            response, two prompts under one id, rows that disagree about the temperature or about a window column, or a row
            that says that it was sampled or trained on otherwise than the probe takes it.
    """
    by_prompt: dict[PromptId, list[Rollout]] = {}
    for rollout in as_rollouts(rollouts):
        by_prompt.setdefault(rollout.prompt_id, []).append(rollout)
    if not by_prompt:
        raise InputError("the rollouts are empty; at least two prompts with two responses each are needed")
    for prompt_id, rows in by_prompt.items():
        if any(row.prompt_ids != rows[0].prompt_ids for row in rows):
            raise InputError(
                f"prompt_id {prompt_id!r} names two different prompts (their prompt_ids differ); give each its own id"
            )
        if len(rows) < least_responses:
            raise InputError(
                f"prompt_id {prompt_id!r} has one response; the leave-one-out mean needs at least two responses a prompt"
            )
    if len(by_prompt) < 2:
        raise InputError("the rollouts hold one prompt; the cross-prompt estimator needs at least two")
    rows = [row for group in by_prompt.values() for row in group]
    _refuse_mixed(rows)
    declared = {row.temperature for row in rows if row.temperature is not None}
    if temperature is not None and declared - {temperature}:
        raise InputError(f"the rows declare temperature {sorted(declared)}, but {temperature} was asked for; drop one")
    groups = tuple(PromptGroup(key, group[0].prompt_ids, tuple(group)) for key, group in by_prompt.items())
    tau = temperature if temperature is not None else next(iter(declared), 1.0)
    if not (math.isfinite(tau) and tau > 0):
        raise InputError(f"temperature is {tau}; entropy needs a finite temperature above 0")
    for row in rows:
        refuse_contradictions(row, float(tau))
    return RolloutBatch(groups, float(tau))


def _refuse_mixed(rows: Sequence[Rollout]) -> None:
    for name in ("temperature", "window_tokens", "max_completion_length", "loss_type", "step", "eos_ids"):
        values = {getattr(row, name) for row in rows}
        if len(values) > 1:
            shown = ", ".join(sorted(map(str, values)))
            raise InputError(f"the rows disagree about {name} ({shown}); one probe takes one batch with one value")
    for name in ("advantage", "micro_batch"):
        missing = sum(getattr(row, name) is None for row in rows)
        if 0 < missing < len(rows):
            raise InputError(f"{missing} of {len(rows)} rows have no {name}; give it in every row or in none")
