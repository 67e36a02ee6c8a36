"""verl's batch at the step: prompts padded on the left and responses on the right, or both jagged."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from entropy_probe.data.rollouts import Rollout
from entropy_probe.errors import InputError
from entropy_probe.integrations.rows.cutting import TokenNames, TrainersRow, rollouts_of
from entropy_probe.integrations.rows.facts import StepFacts
from entropy_probe.integrations.rows.tensors import Tensors, flags, listed, matrix, needed, tensor_of

NAMES = TokenNames("old_log_probs", "rollout_log_probs", "ref_log_prob", token_weight="rollout_is_weights")
REWARDS = "token_level_scores"


def rows_of_verl(tensors: Tensors, facts: StepFacts | None = None, *, sampled: Tensor | None = None) -> list[Rollout]:
    """Rows from verl's batch: what its driver hands to ``update_actor``, or what a worker hands to the loss.

    With B rows, prompts of width P and responses of width R it holds ``input_ids`` and ``attention_mask`` [B, P + R] and, each
    [B, R], ``response_mask`` (0 at padding and at the output of tools), ``old_log_probs``, ``advantages`` and where there are
    any ``rollout_log_probs`` (the sampler's), ``ref_log_prob``, ``rollout_is_weights`` (a correction, which becomes
    ``token_weight``), ``token_level_scores`` (their sum is the reward). A worker's ``input_ids`` may be jagged, and the others
    with them; padded ones then need the ``attention_mask``. Source: verl 0.9, trainer/ppo/ray_trainer.py,
    workers/utils/padding.py and workers/utils/losses.py.

    Args:
        tensors: by verl's names.
        facts: what they do not tell; ``prompts`` is verl's ``uid``.
        sampled: ``response_mask`` as it was before a rejection of tokens or responses (``rollout_rs``) put zeros into it,
            [B, R]: the zeros of today's are then in ``loss_mask``. Without it they count as a tool's output.

    Raises:
        InputError: a tensor is missing or of another shape, which it names, or a row is refused.

    Example:
        >>> import torch
        >>> from entropy_probe.integrations.rows import StepFacts, VERL_DEFAULTS, rows_of_verl
        >>> batch = {
        ...     "input_ids": torch.tensor([[0, 5, 6, 7, 8, 1], [4, 5, 6, 9, 1, 0]]),
        ...     "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]),
        ...     "response_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        ...     "old_log_probs": torch.tensor([[-0.5, -1.0, -0.25], [-2.0, -0.5, 0.0]]),
        ...     "advantages": torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, 0.0]]),
        ... }
        >>> facts = StepFacts(rewards=[1.0, 0.0], temperature=1.0, loss=VERL_DEFAULTS)
        >>> rows = rows_of_verl(batch, facts)
        >>> rows[1].prompt_ids, rows[1].response_ids, rows[1].old_logprobs, rows[1].advantage
        ((4, 5, 6), (9, 1), (-2.0, -0.5), -1.0)
    """
    facts = facts or StepFacts()
    held = NAMES.held(tensors, facts.loss)
    batch = _Batch.of(tensors)
    masks = batch.of_tokens("response_mask", needed(tensors, "response_mask"))
    before = masks if sampled is None else batch.of_tokens("sampled", sampled)
    columns = {column: batch.of_tokens(name, tensors[name]) for column, name in held.items()}
    scores = None if tensors.get(REWARDS) is None else batch.of_tokens(REWARDS, tensors[REWARDS])
    rows = []
    for place, tokens in enumerate(batch.responses):
        trained, drawn = flags("response_mask", masks[place]), flags("sampled", before[place])
        kept = [there or not was for there, was in zip(trained, drawn, strict=True)]
        rows.append(
            TrainersRow(
                place,
                batch.ids[place],
                [True] * len(batch.ids[place]),
                [True] * tokens,
                drawn,
                {name: values[place] for name, values in columns.items()},
                None if all(kept) else kept,
                {} if scores is None else {"reward": sum(scores[place])},
            )
        )
    return rollouts_of(rows, len(rows), facts)


class _Batch:
    """A batch without its padding."""

    def __init__(self, ids: list[list[int]], responses: list[int], width: int | None) -> None:
        """Ids of prompt and response, tokens of every response, and the width of padded ones; None where all are jagged."""
        self.ids = ids
        self.responses = responses
        self.width = width

    @staticmethod
    def of(tensors: Tensors) -> _Batch:
        """From ids, ``attention_mask`` and ``response_mask``."""
        ids, mask = needed(tensors, "input_ids"), tensor_of("response_mask", needed(tensors, "response_mask"), 2)
        if mask.is_nested:
            return _Batch(_jagged("input_ids", ids), [len(row) for row in listed_rows(mask)], None)
        width = mask.shape[1]
        if isinstance(ids, Tensor) and ids.is_nested:
            seen = matrix(tensors, "attention_mask")
            return _Batch(
                _jagged("input_ids", ids), [_ones(row[len(row) - width :], n) for n, row in enumerate(seen)], width
            )
        padded = matrix(tensors, "input_ids")
        seen = matrix(tensors, "attention_mask", (len(padded), len(padded[0]) if padded else 0))
        if padded and len(padded[0]) <= width:
            raise InputError(
                f"input_ids has {len(padded[0])} places a row, and response_mask {width}; expected those of the prompt before "
                "those of the response"
            )
        whole = [[token for token, there in zip(*row, strict=True) if there] for row in zip(padded, seen, strict=True)]
        return _Batch(whole, [_ones(row[len(row) - width :], n) for n, row in enumerate(seen)], width)

    def of_tokens(self, name: str, value: object) -> list[list[Any]]:
        """Values a response token, row by row.

        Raises:
            InputError: the shape is another.
        """
        tensor = tensor_of(name, value, 2)
        if tensor.is_nested:
            rows = listed_rows(tensor)
            lengths = [len(row) for row in rows]
            if lengths != self.responses:
                raise InputError(
                    f"{name} has rows of {lengths} values; expected {self.responses}, one a response token"
                )
            return rows
        expected = [len(self.responses), self.width]
        if self.width is None or list(tensor.shape) != expected:
            shape = "jagged" if self.width is None else f"{expected}, rows by the width of response_mask"
            raise InputError(f"{name} has shape {list(tensor.shape)}; expected {shape}")
        return [row[:tokens] for row, tokens in zip(listed(tensor), self.responses, strict=True)]


def listed_rows(tensor: Tensor) -> list[list[Any]]:
    """A jagged tensor's rows."""
    return [listed(row) for row in tensor.unbind()]


def _jagged(name: str, value: object) -> list[list[Any]]:
    if not isinstance(value, Tensor) or not value.is_nested:
        raise InputError(f"{name} is padded, and response_mask is jagged; expected both alike")
    return listed_rows(value)


def _ones(mask: list[Any], row: int) -> int:
    """How many ones it begins with; zeros follow."""
    count = sum(flags("attention_mask", mask))
    if not all(mask[:count]):
        raise InputError(f"attention_mask: row {row} has padding inside of the response; expected it after")
    return count
