"""slime's batch at the step: a list of tensors for each name, one a row and without padding."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from entropy_probe.data.rollouts import Rollout
from entropy_probe.errors import InputError
from entropy_probe.integrations.rows.cutting import TokenNames, TrainersRow, rollouts_of
from entropy_probe.integrations.rows.facts import StepFacts
from entropy_probe.integrations.rows.tensors import Tensors, flags, listed, needed, tensor_of, vector

DENOMINATORS = "rollout_mask_sums"


def rows_of_slime(
    tensors: Tensors, facts: StepFacts | None = None, *, use_rollout_logprobs: bool = False
) -> list[Rollout]:
    """Rows from slime's ``rollout_data``, or from a micro-batch of it.

    It holds lists with a tensor a row: ``tokens`` (prompt and response), and for each response token ``loss_masks`` (0 at the
    output of tools), ``advantages`` and where there are any ``log_probs`` (the trainer's old ones; without them the ratio is
    1), ``rollout_log_probs`` (the sampler's) and ``ref_log_probs``; and the numbers ``response_lengths``, ``raw_reward``,
    ``truncated``. Source: slime 0.3, ray/rollout.py, backends/megatron_utils/actor.py and loss.py.

    Args:
        tensors: by slime's names.
        facts: what they do not tell. ``temperature`` is ``rollout_temperature``.
        use_rollout_logprobs: slime's setting: the ratio is to ``rollout_log_probs``.

    Raises:
        InputError: a list is missing, of another length or of tensors of another length (a context-parallel rank holds a part
            alone: gather them), which it names; ``rollout_mask_sums`` says that several rows share a denominator; a row is
            refused.

    Example:
        >>> import torch
        >>> from entropy_probe.integrations.rows import SLIME_DEFAULTS, StepFacts, rows_of_slime
        >>> batch = {
        ...     "tokens": [torch.tensor([5, 6, 7, 8, 1]), torch.tensor([5, 6, 9, 1])],
        ...     "response_lengths": [3, 2],
        ...     "loss_masks": [torch.tensor([1, 0, 1]), torch.tensor([1, 1])],
        ...     "log_probs": [torch.tensor([-0.5, -1.0, -0.25]), torch.tensor([-2.0, -0.5])],
        ...     "advantages": [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([-1.0, -1.0])],
        ...     "raw_reward": [1.0, 0.0],
        ... }
        >>> rows = rows_of_slime(batch, StepFacts(temperature=1.0, loss=SLIME_DEFAULTS))
        >>> rows[0].response_ids, rows[0].sampled, rows[0].old_logprobs
        ((7, 8, 1), (True, False, True), (-0.5, 0.0, -0.25))
    """
    facts = facts or StepFacts()
    old = "rollout_log_probs" if use_rollout_logprobs else "log_probs"
    if use_rollout_logprobs:
        needed(tensors, old)
    held = TokenNames(old, "rollout_log_probs", "ref_log_probs").held(tensors, facts.loss)
    ids = _rows("tokens", needed(tensors, "tokens"))
    lengths = vector(tensors, "response_lengths", len(ids)) or needed(tensors, "response_lengths")
    masks = _of_tokens("loss_masks", tensors, lengths)
    columns = {column: _of_tokens(name, tensors, lengths) for column, name in held.items()}
    _check_denominators(tensors, masks)
    rewards, cut = vector(tensors, "raw_reward", len(ids)), vector(tensors, "truncated", len(ids))
    rows = []
    for place, (row, length) in enumerate(zip(ids, lengths, strict=True)):
        if length >= len(row):
            raise InputError(
                f"tokens: row {place} has {len(row)} ids and a response of {length}; expected a prompt before it"
            )
        beside = {} if rewards is None else {"reward": rewards[place]}
        rows.append(
            TrainersRow(
                place,
                row,
                [True] * len(row),
                [True] * int(length),
                flags("loss_masks", masks[place]),
                {name: values[place] for name, values in columns.items()},
                facts=beside | ({} if cut is None else {"cut": bool(cut[place])}),
            )
        )
    return rollouts_of(rows, len(rows), facts)


def _rows(name: str, value: Any) -> list[list[Any]]:
    if isinstance(value, Tensor) or not isinstance(value, list | tuple):
        raise InputError(f"{name} is a {type(value).__name__}; expected a list with a tensor a row")
    return [listed(tensor_of(f"{name}[{place}]", row, 1)) for place, row in enumerate(value)]


def _of_tokens(name: str, tensors: Tensors, lengths: list[int]) -> list[list[Any]]:
    rows = _rows(name, needed(tensors, name))
    found = [len(row) for row in rows]
    if found != [int(length) for length in lengths]:
        raise InputError(
            f"{name} has rows of {found} values; expected response_lengths, {list(lengths)} (a context-parallel rank holds a "
            "part of each: gather them)"
        )
    return rows


def _check_denominators(tensors: Tensors, masks: list[list[Any]]) -> None:
    """Refuse rows that share a denominator, as the parts of one rollout do: the average of a row's own tokens is another."""
    sums = vector(tensors, DENOMINATORS, len(masks))
    for place, mask in enumerate(masks):
        if sums is not None and sums[place] != sum(mask):
            raise InputError(
                f"{DENOMINATORS}: row {place} is divided by {sums[place]:g}, and has {sum(mask)} tokens in the loss; expected "
                "one row a rollout: what several rows of one share is in no column"
            )
