"""What a probe is given besides a model: which batches will do, and the coefficients that follow from them and the settings."""

from __future__ import annotations

import platform
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from entropy_probe.common.choices import member
from entropy_probe.common.memory import Room, memory_there
from entropy_probe.data.rollouts import RolloutBatch, group_rollouts, same_temperature
from entropy_probe.data.rollouts.reading import Paths, ReadRollouts, read_files
from entropy_probe.data.units import Units
from entropy_probe.errors import InputError
from entropy_probe.gradients import VECTOR_SHARE, Plan, Storage
from entropy_probe.losses.advantages import AdvantageRule, advantages_from_rewards
from entropy_probe.losses.length_weights import Average, length_weights
from entropy_probe.pipeline.settings import Settings
from entropy_probe.ranks.collectives import ALONE, Ranks
from entropy_probe.ranks.dealing import deal
from entropy_probe.ranks.sharding import Sharding
from entropy_probe.statistics.importance_sampling import Weighting
from entropy_probe.statistics.intervals import IntervalMethod
from entropy_probe.targets.base import rewards_of
from entropy_probe.targets.choices import Estimator


def read_evaluation(paths: Paths, temperature: float | None) -> tuple[ReadRollouts, RolloutBatch]:
    """Evaluation files as they were read, and their rows grouped; what is wrong with them is said with their names.

    Raises:
        InputError: see :func:`entropy_probe.data.rollouts.read_batch`.
    """
    try:
        read = read_files(paths)
        return read, group_rollouts(read.rollouts, temperature, least_responses=1)
    except InputError as error:
        named = str(paths) if isinstance(paths, str | Path) else ", ".join(map(str, paths))
        raise InputError(f"evaluation rollouts {named}: {error}") from error


def check_evaluation(evaluation: RolloutBatch, batch: RolloutBatch, settings: Settings) -> None:
    """Refuse an evaluation batch that the estimator cannot use.

    Raises:
        InputError: one response to a prompt under the score estimator, or another temperature.
    """
    if settings.split is not None:
        raise InputError("a split holds out prompts of one file; with evaluation rollouts there is nothing to split")
    if min(evaluation.group_sizes) < 2 and settings.estimator is Estimator.SCORE:
        raise InputError(
            "an evaluation prompt has one response, which the score estimator's leave-one-out mean cannot use; give two, or "
            "take the estimator rao-blackwell"
        )
    if min(evaluation.group_sizes) < 2 and settings.weighting is Weighting.PER_PROMPT:
        raise InputError(
            "an evaluation prompt has one response, which importance weights normalised prompt by prompt would leave at weight "
            "one whatever the step; give two, or normalise over all responses (global)"
        )
    known = {(row.prompt_ids, row.response_ids) for row in batch.responses}
    again = sum((row.prompt_ids, row.response_ids) in known for row in evaluation.responses)
    if again == len(evaluation.responses):
        raise InputError(
            "every evaluation response is also among the update's: the two batches must be drawn independently, or the "
            "diagonal that U_cross leaves out comes back; sample them again, or split one file"
        )
    if not same_temperature(evaluation.temperature, batch.temperature):
        raise InputError(
            f"the evaluation rollouts were sampled at temperature {evaluation.temperature:g}, the update's at "
            f"{batch.temperature:g}; expected one policy"
        )


def check_cross_memory(
    prompts: int, trainable: Mapping[str, nn.Parameter], dtype: torch.dtype, memory_bytes: float
) -> None:
    """Refuse two batches whose vectors, one a prompt, take more than their share of the memory.

    Raises:
        InputError: they do; both figures are named.
    """
    needed = prompts * sum(parameter.numel() for parameter in trainable.values()) * dtype.itemsize
    if needed > VECTOR_SHARE * memory_bytes:
        raise InputError(
            f"vectors of {prompts} prompts of both batches take {needed / 1e9:.3g} GB, more than half of the "
            f"{memory_bytes / 1e9:.3g} GB that may be used; give fewer prompts, more memory, or store vectors in bfloat16"
        )


def units_on_a_rank(sharding: Sharding, batch: RolloutBatch, units: Units) -> float:
    """How many units' vectors the rank that holds most holds: of shards an N-th, else those dealt to it, whole."""
    count = sharding.ranks.count
    if sharding.sharded:
        return len(units.ranges) / count
    return float(max(len(share) for share in units.deal(batch.positions, count)))


def times_divided(sharding: Sharding, *batches: RolloutBatch) -> float:
    """Into how many parts the vectors of these batches' prompts fall, by the rank that holds most of them.

    Sharded ranks hold an N-th of every vector; replicated ones whole vectors of the prompts that they were dealt by length.
    """
    count = sharding.ranks.count
    if sharding.sharded:
        return float(count)
    shares = [deal(batch.positions, count) for batch in batches]
    most = max(sum(len(share[rank]) for share in shares) for rank in range(count))
    return sum(len(batch.groups) for batch in batches) / most


def check_interval(method: IntervalMethod | None, plan: Plan) -> None:
    """Refuse an interval that was asked for and that these units cannot have.

    Raises:
        InputError: it needs the matrix of dots of equal units.
    """
    if method is None or not method.needs_matrix:
        return
    others = "take " + ", ".join(m for m in IntervalMethod if not m.needs_matrix)
    if plan.storage is Storage.STREAMED:
        raise InputError(
            f"interval {method} needs the matrix of unit dots, and vectors are streamed ({plan.reason}): {others}, or give "
            "more memory"
        )
    if len(set(plan.units.sizes)) > 1:
        raise InputError(
            f"interval {method} is for units of equal size, and these hold {min(plan.units.sizes)} to {max(plan.units.sizes)} "
            f"prompts: {others}, or a number of blocks that divides the prompts"
        )


def check_split(prompts: int, split: int) -> None:
    """Refuse a number of folds that leaves a fold with fewer than two prompts.

    Raises:
        InputError: it does.
    """
    if prompts < 4:
        raise InputError(f"a split of {prompts} prompts; expected at least 4: a fold needs two prompts for its error")
    if not 2 <= split <= prompts // 2:
        raise InputError(
            f"a split of {prompts} prompts into {split} folds; expected 2 to {prompts // 2} folds: each needs two prompts "
            "for its error"
        )


def resolve_advantages(batch: RolloutBatch, rule: AdvantageRule | None) -> tuple[Tensor, AdvantageRule]:
    """A_ng, float64 [N], or [tokens] where a row has one a token, and the rule that gave them: the rollouts' own where there
    are any, else dr_grpo.

    Raises:
        InputError: ``given`` was asked for and the rows have none, rewards are needed and a row has none, or the rule is not
            known.
    """
    rule = None if rule is None else member("advantage", rule, AdvantageRule)
    given = batch.responses[0].advantage is not None
    if rule is None:
        rule = AdvantageRule.GIVEN if given else AdvantageRule.DR_GRPO
    if rule is not AdvantageRule.GIVEN:
        rewards = rewards_of(batch)
        if rewards is None:
            bare = next(row for row in batch.responses if row.reward is None)
            raise InputError(
                f"prompt_id {bare.prompt_id!r} has a row without a reward, of which advantage {rule} is made; give rewards, "
                f"or leave the advantage at {AdvantageRule.GIVEN}"
            )
        return advantages_from_rewards(rewards, batch.group_sizes, rule), rule
    if not given:
        raise InputError(
            "the rollouts hold no advantage column; give one, or set the advantage to dr_grpo, grpo or rloo"
        )
    return given_advantages(batch), rule


def given_advantages(batch: RolloutBatch) -> Tensor:
    """The rows' own A: float64 [N], or [tokens] where a row has one a token."""
    rows = [(row, row.advantage) for row in batch.responses]
    if not any(isinstance(values, tuple) for _, values in rows):
        return torch.tensor([values for _, values in rows], dtype=torch.float64)
    parts = (
        torch.tensor(
            row.at_sampled(values) if isinstance(values, tuple) else [values] * row.tokens, dtype=torch.float64
        )
        for row, values in rows
    )
    return torch.cat(list(parts))


def resolve_length_weights(
    batch: RolloutBatch,
    rule: Average,
    max_completion_length: int | None = None,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """w_ng of the training loss, with the window's constants from the rollouts where none are given.

    Args:
        batch: the rollouts.
        rule: how the loss is averaged.
        max_completion_length: the trainer's constant; None takes the rows'.
        counts: tokens in the loss of every response; None takes all.

    Raises:
        InputError: see :func:`entropy_probe.losses.length_weights.length_weights`.
    """
    first = batch.responses[0]
    micro_batches = [r.micro_batch for r in batch.responses if r.micro_batch is not None]
    return length_weights(
        batch.lengths if counts is None else counts,
        batch.group_sizes,
        rule,
        max_completion_length=max_completion_length or first.max_completion_length,
        window_tokens=first.window_tokens,
        micro_batches=micro_batches or None,
    )


def free_memory(device: torch.device, ranks: Ranks = ALONE) -> float:
    """Bytes free where the vectors will live: the least of all ranks.

    A machine's memory is parted among its ranks, and every control group's room among the ranks in it.
    """
    if device.type in {"cuda", "xpu"}:
        info = torch.cuda.mem_get_info if device.type == "cuda" else torch.xpu.mem_get_info
        free = float(info(device)[0])
    else:
        free = _own_share(memory_there(), ranks)
    return float(ranks.gather_numbers(np.array([free])).min())


def _own_share(rooms: Sequence[Room], ranks: Ranks) -> float:
    """The least of these rooms, each divided by the ranks that are in it. Two collectives, however many rooms a rank has."""
    machine = platform.node()
    own = [zlib.crc32(f"{machine} {room.group}".encode(errors="surrogateescape")) for room in rooms]
    most = int(ranks.gather_numbers(np.array([len(own)])).max())
    every = ranks.gather_numbers(np.array([*own, *[-1] * (most - len(own))]))
    return min(room.bytes / int((every == number).any(axis=1).sum()) for room, number in zip(rooms, own, strict=True))
