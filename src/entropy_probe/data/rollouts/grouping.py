"""Rows to a batch, with what the estimators need of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from entropy_probe.data.rollouts import values
from entropy_probe.data.rollouts.contradictions import refuse_contradictions
from entropy_probe.data.rollouts.records import PromptGroup, PromptId, Rollout, RolloutBatch
from entropy_probe.data.rollouts.rows import as_rollouts
from entropy_probe.errors import InputError

TEMPERATURE_ROUNDING = 1e-6
"""Relative difference below which two temperatures are one: float32 rounds by 6e-8."""


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

    Example:
        >>> from entropy_probe import group_rollouts
        >>> rows = [
        ...     {"prompt_id": "a", "prompt_ids": [5], "response_ids": [7, 1], "reward": 1.0},
        ...     {"prompt_id": "b", "prompt_ids": [6], "response_ids": [1], "reward": 0.0},
        ...     {"prompt_id": "a", "prompt_ids": [5], "response_ids": [8, 8, 1], "reward": 0.0},
        ...     {"prompt_id": "b", "prompt_ids": [6], "response_ids": [9, 1], "reward": 1.0},
        ... ]
        >>> [(group.prompt_id, len(group.responses)) for group in group_rollouts(rows, temperature=0.7).groups]
        [('a', 2), ('b', 2)]
    """
    if temperature is not None:
        temperature = values.temperature(temperature, "temperature")
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
    declared = rows[0].temperature
    if declared is not None and temperature is not None and not same_temperature(declared, temperature):
        raise InputError(f"the rows declare temperature {declared}, but {temperature} was asked for; drop one")
    groups = tuple(PromptGroup(key, group[0].prompt_ids, tuple(group)) for key, group in by_prompt.items())
    tau = next((known for known in (declared, temperature) if known is not None), 1.0)
    for row in rows:
        refuse_contradictions(row, tau)
    return RolloutBatch(groups, tau)


def as_batch(given: RolloutBatch | Iterable[Rollout | Mapping[str, Any]], *, least_responses: int = 2) -> RolloutBatch:
    """A batch as it is, and rows grouped.

    Raises:
        InputError: see :func:`group_rollouts`.
    """
    return given if isinstance(given, RolloutBatch) else group_rollouts(given, least_responses=least_responses)


def same_temperature(one: float, other: float) -> bool:
    """Whether two numbers are one temperature, of which float32 may have rounded either."""
    return math.isclose(one, other, rel_tol=TEMPERATURE_ROUNDING)


def _refuse_mixed(rows: Sequence[Rollout]) -> None:
    for name in ("temperature", "window_tokens", "max_completion_length", "loss_type", "step", "eos_ids"):
        found = {getattr(row, name) for row in rows}
        known = [value for value in found if value is not None]
        if name == "temperature" and len(known) == len(found) and same_temperature(min(known), max(known)):
            continue
        if len(found) > 1:
            shown = ", ".join(sorted(map(str, found)))
            raise InputError(f"the rows disagree about {name} ({shown}); one probe takes one batch with one value")
    for name in ("advantage", "micro_batch", "mini_batch", "old_logprobs", "ref_logprobs"):
        lacking = [row for row in rows if getattr(row, name) is None]
        if 0 < len(lacking) < len(rows):
            raise InputError(
                f"{len(lacking)} of {len(rows)} rows have no {name} (the first has prompt_id {lacking[0].prompt_id!r}); give "
                "it in every row or in none"
            )
