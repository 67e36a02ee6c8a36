"""Causes in the loss: other advantages, other length weights. Each takes a forward and a backward over the batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from entropy_probe.errors import InputError
from entropy_probe.progress import Progress
from entropy_probe.replay.case import Cause, Replayed
from entropy_probe.scores import (
    AdvantageRule,
    LengthWeight,
    advantages_from_rewards,
    advantages_over_batch,
    length_weights,
)

ADVANTAGE_WORDS = {
    AdvantageRule.GIVEN: "the rows' own",
    AdvantageRule.DR_GRPO: "the reward minus the prompt's mean, not divided by a standard deviation",
    AdvantageRule.GRPO: "the reward minus the prompt's mean, divided by the prompt's standard deviation",
    AdvantageRule.RLOO: "the reward minus the mean of the prompt's other responses",
}
OVER_BATCH = "the reward minus the prompt's mean, divided by the standard deviation of the whole batch"


def one_thing_else(case: Replayed, progress: Progress) -> Iterator[Cause]:
    """Other advantages, or another length weight."""
    for words, advice, advantages in _other_advantages(case):
        yield Cause(
            "advantage",
            f"the trainer's advantages were {words}; here they are {ADVANTAGE_WORDS[case.rule]}",
            advice,
            case.stepped(case.along(advantages * case.weights, progress)),
        )
    for rule, weights in _other_weights(case):
        yield Cause(
            "length_weight",
            f"the trainer's loss weighs lengths as {rule}; here it is {case.length_weight}",
            f"Give --length-weight {rule}",
            case.stepped(case.along(case.advantages * weights, progress)),
        )


def two_things_else(case: Replayed, progress: Progress) -> Iterator[Cause]:
    """Both at once."""
    for words, advice, advantages in _other_advantages(case):
        for rule, weights in _other_weights(case):
            yield Cause(
                "advantage_and_length_weight",
                f"the trainer's loss weighs lengths as {rule}, and its advantages were {words}",
                f"{advice}. Give --length-weight {rule}",
                case.stepped(case.along(advantages * weights, progress)),
            )


def _other_advantages(case: Replayed) -> Iterator[tuple[str, str, Tensor]]:
    """(in words, what to do, A) by every rule but the one replayed, where it gives something else."""
    rewards = torch.tensor([row.reward for row in case.batch.responses], dtype=torch.float64)
    sizes = case.batch.group_sizes
    candidates: list[tuple[str, str, Tensor]] = []
    given = [row.advantage for row in case.batch.responses if row.advantage is not None]
    for rule, words in ADVANTAGE_WORDS.items():
        if rule is AdvantageRule.GIVEN:
            found = torch.tensor(given, dtype=torch.float64) if given else None
        else:
            found = advantages_from_rewards(rewards, sizes, rule) if min(sizes) > 1 else None
        if found is not None and rule is not case.rule:
            candidates.append((words, f"Give --advantage {rule}, or look for who changed the column advantage", found))
    if min(sizes) > 1:
        advice = "Record the trainer's own advantages, and look for who changed the column advantage"
        candidates.append((OVER_BATCH, advice, advantages_over_batch(rewards, sizes)))
    for words, advice, found in candidates:
        if not torch.allclose(found, case.advantages, rtol=1e-4, atol=1e-6):
            yield words, advice, found


def _other_weights(case: Replayed) -> Iterator[tuple[LengthWeight, Tensor]]:
    for rule in LengthWeight:
        try:
            weights = _weights(case, rule)
        except InputError:  # dr_grpo without its constant
            continue
        if rule is not case.length_weight and not torch.allclose(weights, case.weights, rtol=1e-6, atol=0.0):
            yield rule, weights


def _weights(case: Replayed, rule: LengthWeight) -> Tensor:
    first = case.batch.responses[0]
    micro = [row.micro_batch for row in case.batch.responses if row.micro_batch is not None]
    return length_weights(
        [len(row.response_ids) for row in case.batch.responses],
        case.batch.group_sizes,
        rule,
        max_completion_length=case.max_completion_length,
        window_tokens=first.window_tokens,
        micro_batches=micro or None,
    )
