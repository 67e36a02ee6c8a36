"""prime-rl's packed micro-batches at the step: values at their own token, several samples a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from entropy_probe.data.rollouts import Rollout
from entropy_probe.errors import InputError
from entropy_probe.integrations.rows.cutting import TokenNames, TrainersRow, between_ends, rollouts_of
from entropy_probe.integrations.rows.facts import StepFacts
from entropy_probe.integrations.rows.tensors import Tensors, flags, listed, needed, tensor_of

NAMES = TokenNames("inference_logprobs", "inference_logprobs", "ref_logprobs", token_weight="rl_weights")
OTHER_LOSSES = ("ce_weights", "ref_kl_weights")


def rows_of_prime_rl(micro_batches: Sequence[Tensors], facts: StepFacts | None = None) -> list[Rollout]:
    """Rows from the micro-batches of one step of prime-rl, of all ranks.

    Each holds, [1, tokens], ``input_ids``, ``loss_mask`` (true at tokens that the policy drew), ``advantages``,
    ``inference_logprobs`` (the sampler's, to which the loss takes its ratio), ``temperatures`` and where there are any
    ``ref_logprobs`` and ``rl_weights`` (which become ``token_weight``; 0 leaves a token out of the loss); and
    ``sequence_lengths``, the tokens of each sample (``seq_lens`` in their stead). A response runs from its first drawn token to
    its last. Samples without any are left out: they have no weight in the loss, and padding of batches is such. Source:
    prime-rl 0.8, trainer/rl/data.py, trainer/rl/train.py, trainer/rl/loss.py and trainer/batch.py.

    Args:
        micro_batches: each by prime-rl's names.
        facts: what they do not tell, with one value a sample, in order. Temperatures and micro-batches are in the tensors.

    Raises:
        InputError: a tensor is missing or of another shape, which it names; a sample has tokens of several temperatures, or of
            another loss (``ce_weights``, ``ref_kl_weights``); a row is refused.

    Example:
        >>> import torch
        >>> from entropy_probe.integrations.rows import PRIME_RL_DEFAULTS, StepFacts, rows_of_prime_rl
        >>> batch = {
        ...     "input_ids": torch.tensor([[5, 6, 7, 8, 1, 5, 6, 9, 1]]),
        ...     "sequence_lengths": [5, 4],
        ...     "loss_mask": torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1]]).bool(),
        ...     "inference_logprobs": torch.tensor([[0.0, 0.0, -0.5, -1.0, -0.25, 0.0, 0.0, -2.0, -0.5]]),
        ...     "advantages": torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0]]),
        ...     "temperatures": torch.ones(1, 9),
        ... }
        >>> rows = rows_of_prime_rl([batch], StepFacts(rewards=[1.0, 0.0], loss=PRIME_RL_DEFAULTS))
        >>> rows[1].response_ids, rows[1].logprobs, rows[1].temperature, rows[1].micro_batch
        ((9, 1), (-2.0, -0.5), 1.0, 0)
    """
    facts = facts or StepFacts()
    rows: list[TrainersRow] = []
    for index, batch in enumerate(micro_batches):
        rows += _rows(batch, index, len(rows), facts)
    return rollouts_of(rows, len(rows), facts)


def _rows(batch: Tensors, index: int, first: int, facts: StepFacts) -> list[TrainersRow]:
    """The samples of one micro-batch; ``first`` is the place of the first among all."""
    held = NAMES.held(batch, facts.loss)
    lengths = batch.get("sequence_lengths")
    lengths = needed(batch, "seq_lens") if lengths is None else lengths
    lengths = listed(lengths) if isinstance(lengths, Tensor) else list(lengths)
    for name in OTHER_LOSSES:
        if batch.get(name) is not None and any(listed(tensor_of(name, batch[name], 2))[0]):
            raise InputError(
                f"micro-batch {index}: {name} is not 0 throughout: its tokens are in another loss than the policy's, of which "
                "rows have no column"
            )
    names = {"input_ids": "input_ids", "loss_mask": "loss_mask", "temperatures": "temperatures", **held}
    values = {column: _parts(batch, name, index, lengths) for column, name in names.items()}
    found = []
    for sample, ids in enumerate(values["input_ids"]):
        # Values stand at their own token: the first, which nothing predicts, has none.
        trained = flags("loss_mask", values["loss_mask"][sample])[1:]
        weights = values["token_weight"][sample][1:] if "token_weight" in values else None
        columns: dict[str, Any] = {"micro_batch": index, "temperature": None}
        drawn = {t for t, there in zip(values["temperatures"][sample][1:], trained, strict=True) if there}
        if len(drawn) > 1:
            raise InputError(
                f"temperatures: sample {sample} of micro-batch {index} has {len(drawn)} of them ({min(drawn):g} to "
                f"{max(drawn):g}); expected one a response"
            )
        columns["temperature"] = drawn.pop() if drawn else None
        found.append(
            TrainersRow(
                first + sample,
                ids,
                [True] * len(ids),
                between_ends(trained),
                trained,
                {column: values[column][sample][1:] for column in held},
                None if weights is None else [weight != 0 for weight in weights],
                columns,
            )
        )
    return found


def _parts(batch: Tensors, name: str, index: int, lengths: Sequence[int]) -> list[list[Any]]:
    """A packed tensor's values, sample by sample."""
    tensor = tensor_of(name, needed(batch, name), 2)
    if tuple(tensor.shape) != (1, sum(lengths)):
        raise InputError(
            f"{name} of micro-batch {index} has shape {list(tensor.shape)}; expected {[1, sum(lengths)]}, the sum of "
            "sequence_lengths"
        )
    return [listed(part) for part in torch.split(tensor[0], list(lengths))]
