"""Advantages A_ng from rewards, by the rules that trainers publish."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import assert_never

import torch
from torch import Tensor

from entropy_probe.common.choices import member
from entropy_probe.data.groups import by_group, group_mean, leave_one_out_mean, repeat_by_group
from entropy_probe.errors import InputError


class AdvantageRule(StrEnum):
    """Where the advantages A_ng come from: the rollouts themselves, or their rewards r_ng, prompt by prompt.

    ``given``: the rows' own ``advantage``. ``dr_grpo``: r − mean (arXiv 2503.20783). ``grpo``: (r − mean) / (std + 1e-4) with
    the sample standard deviation (arXiv 2402.03300, as TRL computes it). ``rloo``: r − mean of the prompt's other responses
    (arXiv 2402.14740). Advantages have the unit of the reward; ``grpo``'s have none.

    Example:
        >>> from entropy_probe import AdvantageRule, Settings
        >>> AdvantageRule("rloo")
        <AdvantageRule.RLOO: 'rloo'>
        >>> settings = Settings(advantage="rloo")
    """

    GIVEN = "given"
    DR_GRPO = "dr_grpo"
    GRPO = "grpo"
    RLOO = "rloo"


def advantages_from_rewards(rewards: Tensor, group_sizes: Sequence[int], rule: AdvantageRule) -> Tensor:
    """Advantages A_ng from rewards [N].

    ``dr_grpo``: r − mean (arXiv 2503.20783). ``grpo``: (r − mean) / (std + 1e-4) with the sample standard deviation
    (arXiv 2402.03300, as TRL computes it). ``rloo``: r − mean of the others (arXiv 2402.14740).

    Raises:
        InputError: ``given``, which is read and not computed, or a rule that is not known.
    """
    # Equal rewards give exactly zero, which the rounding of their mean would not.
    spread = [float(part.max() - part.min()) for part in by_group(rewards, group_sizes)]
    informative = repeat_by_group(spread, group_sizes) > 0
    centred = torch.where(informative, rewards - group_mean(rewards, group_sizes), 0.0)
    match member("advantage", rule, AdvantageRule):
        case AdvantageRule.RLOO:
            return torch.where(informative, rewards - leave_one_out_mean(rewards, group_sizes), 0.0)
        case AdvantageRule.DR_GRPO:
            return centred
        case AdvantageRule.GRPO:
            deviations = [float(part.std(correction=1)) for part in by_group(rewards, group_sizes)]
            return centred / (repeat_by_group(deviations, group_sizes) + 1e-4)
        case AdvantageRule.GIVEN:
            raise InputError("advantages by the rule 'given' are read from the rollouts, not computed from rewards")
        case unknown:
            assert_never(unknown)


def advantages_over_batch(rewards: Tensor, group_sizes: Sequence[int]) -> Tensor:
    """(r − mean) / (std + 1e-4), the mean of the prompt and the sample standard deviation of all rewards [N].

    TRL's ``scale_rewards="batch"`` (arXiv 2508.08221), for the rewards of one generation batch.
    """
    centred = advantages_from_rewards(rewards, group_sizes, AdvantageRule.DR_GRPO)
    return centred / (float(rewards.std(correction=1)) + 1e-4)
