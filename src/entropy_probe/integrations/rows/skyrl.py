"""SkyRL's TrainingInputBatch at the step: rows padded on the left, advantages divided by what the loss averages over."""

from __future__ import annotations

from collections.abc import Sequence

from entropy_probe.data.rollouts import Rollout
from entropy_probe.errors import InputError
from entropy_probe.integrations.rows.cutting import TokenNames, TrainersRow, rollouts_of
from entropy_probe.integrations.rows.facts import StepFacts
from entropy_probe.integrations.rows.loss import TrainersLoss
from entropy_probe.integrations.rows.tensors import Tensors, flags, matrix
from entropy_probe.losses.length_weights import LossAggregation

NAMES = TokenNames("action_log_probs", "rollout_logprobs", "base_action_log_probs")


def rows_of_skyrl(tensors: Tensors, facts: StepFacts | None = None, *, scaled: bool = True) -> list[Rollout]:
    """Rows from SkyRL's batch, as its workers hold it; all rows of a mini-batch, of every rank.

    With B rows of S ids it holds ``sequences`` and ``attention_mask`` [B, S], padded on the left, and for the last R of
    them, each [B, R], ``response_mask``, ``loss_mask`` (0 at padding and at the output of tools), ``action_log_probs``,
    ``advantages`` and where there are any ``rollout_logprobs`` (the sampler's), ``base_action_log_probs`` (the reference's)
    and ``rewards`` (their sum is the reward). SkyRL averages its loss by dividing the advantages before it hands them to its
    workers; the division is undone here, by ``loss_agg`` of ``facts.loss`` and mini-batch by mini-batch. Rows that SkyRL
    adds to fill a batch (``pad_size``) are no rows: leave them out. Source: SkyRL 0.3, train/dataset/preprocess.py,
    train/trainer.py (``_normalize_advantages``) and backends/skyrl_train/workers/worker.py.

    Args:
        tensors: by SkyRL's names.
        facts: what they do not tell; ``prompts`` is SkyRL's ``uid``.
        scaled: whether the advantages are divided already; false before ``_normalize_advantages``.

    Raises:
        InputError: a tensor is missing or of another shape, which it names; advantages are scaled and the loss does not say by
            what; a row is refused.

    Example:
        >>> import torch
        >>> from entropy_probe.integrations.rows import SKYRL_DEFAULTS, StepFacts, rows_of_skyrl
        >>> batch = {
        ...     "sequences": torch.tensor([[5, 6, 7, 8, 1], [0, 5, 6, 9, 1]]),
        ...     "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]),
        ...     "response_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),
        ...     "loss_mask": torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]),
        ...     "action_log_probs": torch.tensor([[-0.5, -1.0, -0.25], [0.0, -2.0, -0.5]]),
        ...     "base_action_log_probs": torch.tensor([[-0.5, -1.0, -0.25], [0.0, -2.0, -0.5]]),
        ...     "advantages": torch.tensor([[0.125, 0.125, 0.125], [0.0, -0.125, -0.125]]),
        ... }
        >>> rows = rows_of_skyrl(batch, StepFacts(temperature=1.0, loss=SKYRL_DEFAULTS))
        >>> rows[1].prompt_ids, rows[1].response_ids, rows[1].advantage
        ((5, 6), (9, 1), -0.625)
    """
    facts = facts or StepFacts()
    held = NAMES.held(tensors, facts.loss)
    ids = matrix(tensors, "sequences")
    count = len(ids)
    seen = matrix(tensors, "attention_mask", (count, len(ids[0])))
    inside = matrix(tensors, "response_mask")
    shape = (count, len(inside[0]))
    if len(inside) != count or shape[1] > len(ids[0]):
        raise InputError(
            f"response_mask has shape {[len(inside), shape[1]]}; expected {[count, len(ids[0])]}, or fewer places"
        )
    masks = [flags("loss_mask", row) for row in matrix(tensors, "loss_mask", shape)]
    facts.check_rows(count)
    divisors = _divisors(masks, facts) if scaled else [1.0] * count
    columns = {column: matrix(tensors, name, shape) for column, name in held.items()}
    columns["advantage"] = [
        [value * divisor for value in row] for row, divisor in zip(columns["advantage"], divisors, strict=True)
    ]
    rewards = None if tensors.get("rewards") is None else matrix(tensors, "rewards", shape)
    rows = [
        TrainersRow(
            place,
            ids[place],
            flags("attention_mask", seen[place]),
            flags("response_mask", inside[place]),
            masks[place],
            {name: values[place] for name, values in columns.items()},
            facts={} if rewards is None else {"reward": sum(rewards[place])},
        )
        for place in range(count)
    ]
    return rollouts_of(rows, count, facts)


def _divisors(masks: Sequence[Sequence[bool]], facts: StepFacts) -> list[float]:
    """By what SkyRL divided each row's advantages."""
    steps = [0] * len(masks) if facts.mini_batches is None else list(facts.mini_batches)
    found = [0.0] * len(masks)
    for step in set(steps):
        rows = [row for row, own in enumerate(steps) if own == step]
        tokens = {row: sum(masks[row]) for row in rows}
        for row in rows:
            found[row] = _divisor(facts.loss, tokens[row], sum(tokens.values()), len(rows))
    return found


def _divisor(loss: TrainersLoss | None, own: int, all_tokens: int, rows: int) -> float:
    match None if loss is None else loss.loss_agg:
        case LossAggregation.TOKEN_MEAN:
            return float(max(all_tokens, 1))
        case LossAggregation.SEQ_MEAN_TOKEN_MEAN:
            return float(rows * max(own, 1))
        case LossAggregation.SEQ_MEAN_TOKEN_SUM_NORM if loss is not None and loss.max_completion_length is not None:
            return float(rows * loss.max_completion_length)
        case _:
            raise InputError(
                "advantages are divided by what SkyRL's loss averages over; give the loss, with loss_agg token-mean, "
                "seq-mean-token-mean, or seq-mean-token-sum-norm and max_completion_length, or advantages as they were before, "
                "and scaled=False"
            )
