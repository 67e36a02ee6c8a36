"""Causes in the advantages and in how the loss is averaged over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from entropy_probe.losses.advantages import AdvantageRule, advantages_from_rewards, advantages_over_batch
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.losses.named import average_of
from entropy_probe.pipeline.inputs import given_advantages
from entropy_probe.pipeline.update import UpdateRule
from entropy_probe.replay_check.case import Replayed
from entropy_probe.replay_check.variants import Variant
from entropy_probe.targets.base import rewards_of

ADVANTAGE_WORDS = {
    AdvantageRule.GIVEN: "the rows' own",
    AdvantageRule.DR_GRPO: "the reward minus the prompt's mean, not divided by a standard deviation",
    AdvantageRule.GRPO: "the reward minus the prompt's mean, divided by the prompt's standard deviation",
    AdvantageRule.RLOO: "the reward minus the mean of the prompt's other responses",
}
OVER_BATCH = "the reward minus the prompt's mean, divided by the standard deviation of the whole batch"


def one_thing_else(case: Replayed) -> Iterator[Variant]:
    """Other advantages, or another length weight."""
    for words, advice, advantages in other_advantages(case):
        yield Variant(
            "advantage",
            f"the trainer's advantages were {words}; here they are {ADVANTAGE_WORDS[case.rule.advantage_rule]}",
            advice,
            replace(case.rule, advantages=advantages),
        )
    for average, rule in other_averages(case):
        yield Variant(
            "length_weight",
            f"the trainer's loss weighs lengths as {average}; here it is {case.length_weight}",
            f"Set the length weight to {average}",
            rule,
        )


def two_things_else(case: Replayed) -> Iterator[Variant]:
    """Both at once."""
    for words, advice, advantages in other_advantages(case):
        for average, rule in other_averages(case):
            yield Variant(
                "advantage_and_length_weight",
                f"the trainer's loss weighs lengths as {average}, and its advantages were {words}",
                f"{advice}. Set the length weight to {average}",
                replace(rule, advantages=advantages),
            )


def other_advantages(case: Replayed) -> Iterator[tuple[str, str, Tensor]]:
    """(in words, what to do, A) by every rule but the one replayed, where it gives something else."""
    rewards = rewards_of(case.batch)
    sizes = case.batch.group_sizes
    candidates: list[tuple[str, str, Tensor]] = []
    given = case.batch.responses[0].advantage is not None
    compared = rewards is not None and min(sizes) > 1
    for rule, words in ADVANTAGE_WORDS.items():
        if rule is AdvantageRule.GIVEN:
            found = given_advantages(case.batch) if given else None
        else:
            found = advantages_from_rewards(rewards, sizes, rule) if rewards is not None and compared else None
        if found is not None and rule is not case.rule.advantage_rule:
            candidates.append(
                (words, f"Set the advantage to {rule}, or look for who changed the column advantage", found)
            )
    if rewards is not None and compared:
        advice = "Record the trainer's own advantages, and look for who changed the column advantage"
        candidates.append((OVER_BATCH, advice, advantages_over_batch(rewards, sizes)))
    seen = [case.rule.advantages]
    for words, advice, found in candidates:
        if not any(_alike(found, other) for other in seen):
            seen.append(found)
            yield words, advice, found


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def other_averages(case: Replayed) -> Iterator[tuple[LengthWeight, UpdateRule]]:
    """Of the losses that a trainer has (the guide's is none), the recorded one first."""
    recorded = average_of(case.batch.responses[0].loss_type)
    for average in sorted((r for r in LengthWeight if r is not LengthWeight.GUIDE), key=lambda r: r is not recorded):
        if average is not case.length_weight:
            yield average, replace(case.rule, loss=replace(case.rule.loss, average=average))
