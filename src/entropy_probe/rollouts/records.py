"""Responses, prompts and batches, and what the estimators need of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from entropy_probe.errors import InputError

PromptId = str | int


@dataclass(frozen=True)
class Rollout:
    """One response to one prompt.

    ``prompt_ids`` and ``response_ids`` are token ids; the response holds its EOS if one was sampled. ``logprobs`` are the
    sampler's, one per response token, in nats. ``cut`` is true where the length limit ended the response.

    The last ones describe the trainer's accumulation window, where a recorder knows it: ``micro_batch`` is the index of
    the micro-batch that held the row, ``window_tokens`` the token count that the trainer divides by (dapo),
    ``max_completion_length`` the constant of Dr. GRPO, ``loss_type`` the trainer's name of its loss, ``step`` the optimizer
    step that consumed the row (N + 1 for checkpoint N), and ``on_policy`` whether the sampler was the policy at that step.
    """

    prompt_id: PromptId
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    reward: float
    advantage: float | None = None
    logprobs: tuple[float, ...] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    cut: bool | None = None
    prompt: str | None = None
    response: str | None = None
    micro_batch: int | None = None
    window_tokens: float | None = None
    max_completion_length: int | None = None
    loss_type: str | None = None
    step: int | None = None
    on_policy: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class PromptGroup:
    """A prompt and its responses, in the order of their rows."""

    prompt_id: PromptId
    prompt_ids: tuple[int, ...]
    responses: tuple[Rollout, ...]


@dataclass(frozen=True)
class RolloutBatch:
    """Prompts in the order of their first row. ``temperature`` is the one at which every response was sampled."""

    groups: tuple[PromptGroup, ...]
    temperature: float

    @property
    def responses(self) -> tuple[Rollout, ...]:
        """Every response, prompt by prompt: the order in which scores and coefficients are laid out."""
        return tuple(response for group in self.groups for response in group.responses)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """G_n, the number of responses of each prompt."""
        return tuple(len(group.responses) for group in self.groups)

    def of_prompts(self, prompts: Sequence[int]) -> RolloutBatch:
        """The batch of these prompts alone, by their places."""
        return RolloutBatch(tuple(self.groups[n] for n in prompts), self.temperature)

    @property
    def mean_length(self) -> float:
        """T̄, the mean over prompts of the mean response length, in tokens."""
        means = [sum(len(r.response_ids) for r in group.responses) / len(group.responses) for group in self.groups]
        return sum(means) / len(means)

    @property
    def tokens(self) -> int:
        """Number of response tokens."""
        return sum(len(response.response_ids) for response in self.responses)

    @property
    def positions(self) -> list[int]:
        """Of every prompt, tokens of all its sequences, prompts and responses: what its forwards cost."""
        return [sum(response.length for response in group.responses) for group in self.groups]


def group_rollouts(
    rollouts: Iterable[Rollout], temperature: float | None = None, *, least_responses: int = 2
) -> RolloutBatch:
    """Group rows by ``prompt_id`` and check what the estimators need: two prompts, two responses each, one temperature.

    Args:
        rollouts: the rows, in any order.
        temperature: sampling temperature of rows that declare none; 1 if neither says.
        least_responses: that a prompt must have; 1 will do for an evaluation batch under Rao-Blackwell.

    Raises:
        InputError: fewer than two prompts, a prompt with one response, two prompts under one id, rows that disagree
            about the temperature or about a window column, or a truncated sampling distribution.
    """
    by_prompt: dict[PromptId, list[Rollout]] = {}
    for rollout in rollouts:
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
    for row in rows:
        _refuse_truncated_sampling(row)
    _refuse_mixed(rows)
    declared = {row.temperature for row in rows if row.temperature is not None}
    if temperature is not None and declared - {temperature}:
        raise InputError(f"the rows declare temperature {sorted(declared)}, but {temperature} was asked for; drop one")
    groups = tuple(PromptGroup(key, group[0].prompt_ids, tuple(group)) for key, group in by_prompt.items())
    tau = temperature if temperature is not None else next(iter(declared), 1.0)
    if not (math.isfinite(tau) and tau > 0):
        raise InputError(f"temperature is {tau}; entropy needs a finite temperature above 0")
    return RolloutBatch(groups, float(tau))


NEUTRAL = {
    "top_k": (None, 0, -1),
    "top_p": (None, 1),
    "min_p": (None, 0),
    "typical_p": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "repetition_penalty": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "no_repeat_ngram_size": (None, 0),
}
"""Sampling settings that leave the distribution whole; any other value makes S another policy's log-prob."""


def _refuse_truncated_sampling(row: Rollout) -> None:
    declared = {"top_k": row.top_k, "top_p": row.top_p, **row.extra}
    for name, neutral in NEUTRAL.items():
        if declared.get(name) not in neutral:
            raise InputError(
                f"prompt_id {row.prompt_id!r} was sampled with {name} = {declared[name]}: its log-probs are not the policy's; "
                "sample from the whole distribution (top_k = 0, top_p = 1, no other processors)"
            )


def _refuse_mixed(rows: Sequence[Rollout]) -> None:
    for name in ("temperature", "window_tokens", "max_completion_length", "loss_type", "step"):
        values = {getattr(row, name) for row in rows}
        if len(values) > 1:
            shown = ", ".join(sorted(map(str, values)))
            raise InputError(f"the rows disagree about {name} ({shown}); one probe takes one batch with one value")
    for name in ("advantage", "micro_batch"):
        missing = sum(getattr(row, name) is None for row in rows)
        if 0 < missing < len(rows):
            raise InputError(f"{missing} of {len(rows)} rows have no {name}; give it in every row or in none")


def count_cut(rollouts: Iterable[Rollout]) -> int:
    """How many responses the length limit ended."""
    return sum(rollout.cut is True for rollout in rollouts)
