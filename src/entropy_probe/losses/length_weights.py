"""How the training loss weighs a response by its length: w_ng with a_ng = A_ng w_ng."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import assert_never

import torch
from torch import Tensor

from entropy_probe.common.choices import member
from entropy_probe.data.groups import by_group, repeat_by_group
from entropy_probe.errors import InputError


class LengthWeight(StrEnum):
    """How the training loss weighs a response by its length: w_ng in Ȳ = (1/B) Σ_n Σ_g A_ng w_ng ∇S_ng.

    T_ng is the number of response tokens in the loss, end token included, G_n the prompt's number of responses and N that of
    all B prompts.

    ``guide``: 1/(G_n L_n), L_n the prompt's longest response. ``dr_grpo``: B/(N L_max), L_max the trainer's constant
    (``max_completion_length``; arXiv 2503.20783). ``grpo``: B/(N T_ng) (arXiv 2402.03300). ``dapo``: B/ΣT over the
    accumulation window (arXiv 2503.14476). ``bnpo``: B/(K ΣT_k) over the response's micro-batch k of K, as TRL has it.
    ``luspo``: B/N, the mean over responses of the sum over tokens. B/N is 1/G where every prompt has G responses; where they
    differ, as in one of several steps on a batch, a trainer's mean is over responses. Source: docs/method.md, section 4.

    Example:
        >>> from entropy_probe import LengthWeight, Settings
        >>> LengthWeight("dapo")
        <LengthWeight.DAPO: 'dapo'>
        >>> settings = Settings(length_weight="dr_grpo", max_completion_length=512)
    """

    GUIDE = "guide"
    DR_GRPO = "dr_grpo"
    GRPO = "grpo"
    DAPO = "dapo"
    BNPO = "bnpo"
    LUSPO = "luspo"


class LossAggregation(StrEnum):
    """verl's ``loss_agg_mode``: how the losses of tokens are averaged over the rows of one optimizer step.

    ``token-mean``: over all tokens. ``seq-mean-token-sum``: over responses, tokens summed. ``seq-mean-token-mean``: over
    responses, tokens averaged. ``seq-mean-token-sum-norm``: over responses, tokens summed and divided by the trainer's
    constant (``max_completion_length``; verl's is ``loss_scale_factor``, or the width to which responses are padded).
    Responses without a token in the loss count as responses. This is verl from 0.8 on: its workers hand ``agg_loss`` the
    tokens and the rows of the whole mini-batch (``global_batch_size``). Before, each micro-batch had its own mean; and up to
    0.7.0 ``seq-mean-token-sum-norm`` was no mean over responses but a micro-batch's sum, so that the update of micro-batches
    of m rows each was m times today's: a ``loss_scale`` of m says it. Sources: verl, trainer/ppo/core_algos.py (``agg_loss``)
    and workers/utils/losses.py (``ppo_loss``), at v0.6.0, v0.7.0, v0.7.1, v0.8.0 and v0.9.0.

    Example:
        >>> from entropy_probe import LossAggregation, Settings
        >>> settings = Settings(loss_type="ppo", loss_agg="token-mean", epsilon_low=0.2, epsilon_high=0.2)
    """

    TOKEN_MEAN = "token-mean"
    SEQ_MEAN_TOKEN_SUM = "seq-mean-token-sum"
    SEQ_MEAN_TOKEN_MEAN = "seq-mean-token-mean"
    SEQ_MEAN_TOKEN_SUM_NORM = "seq-mean-token-sum-norm"


Average = LengthWeight | LossAggregation
"""How a trainer averages its loss over the tokens of a step."""
HAS_CONSTANT: tuple[Average, ...] = (LengthWeight.DR_GRPO, LossAggregation.SEQ_MEAN_TOKEN_SUM_NORM)
"""Averages that divide by the trainer's constant."""


def length_weights(
    lengths: Sequence[int],
    group_sizes: Sequence[int],
    rule: Average,
    *,
    max_completion_length: int | None = None,
    window_tokens: float | None = None,
    micro_batches: Sequence[int] | None = None,
) -> Tensor:
    """w_ng with a_ng = A_ng w_ng and Ȳ = (1/B) Σ_n Σ_g a_ng ∇S_ng; float64 [N].

    ``guide``: 1/(G_n L_n), L_n the prompt's longest response. Of the N responses of B prompts, ``dr_grpo`` and
    ``seq-mean-token-sum-norm``: B/(N L_max). ``grpo`` and ``seq-mean-token-mean``: B/(N T_ng). ``luspo`` and
    ``seq-mean-token-sum``: B/N. ``dapo`` and ``token-mean``: B/ΣT over the accumulation window. ``bnpo``: B/(K ΣT_k) over the
    response's micro-batch k of K.

    Args:
        lengths: T_ng, response tokens in the loss; 0 counts as 1, as trainers have it.
        group_sizes: G_n.
        rule: which of the above.
        max_completion_length: L_max, the trainer's constant (of :data:`HAS_CONSTANT` only, required there).
        window_tokens: ΣT of the window where it is not this batch's (``dapo``).
        micro_batches: the micro-batch of each response (``bnpo``); one for all if not given.

    Raises:
        InputError: a rule of :data:`HAS_CONSTANT` without L_max, an L_max below a T_ng, or a rule that is not known.
    """
    counts = torch.tensor(lengths, dtype=torch.float64)
    tokens = counts.clamp(min=1.0)
    prompts = len(group_sizes)
    # G, where prompts have as many responses each: a trainer's mean over responses times B.
    responses = len(tokens) / prompts
    match rule if isinstance(rule, LossAggregation) else member("length_weight", rule, LengthWeight):
        case LengthWeight.GUIDE:
            sizes = repeat_by_group(group_sizes, group_sizes)
            longest = [float(part.max()) for part in by_group(tokens, group_sizes)]
            return 1.0 / (sizes * repeat_by_group(longest, group_sizes))
        case LengthWeight.GRPO | LossAggregation.SEQ_MEAN_TOKEN_MEAN:
            return 1.0 / (responses * tokens)
        case LengthWeight.LUSPO | LossAggregation.SEQ_MEAN_TOKEN_SUM:
            return torch.full_like(tokens, 1.0 / responses)
        case LengthWeight.DR_GRPO | LossAggregation.SEQ_MEAN_TOKEN_SUM_NORM:
            constant = _trainers_constant(rule, max_completion_length, max(lengths))
            return torch.full_like(tokens, 1.0 / (responses * constant))
        case LengthWeight.DAPO | LossAggregation.TOKEN_MEAN:
            window = window_tokens if window_tokens is not None else max(1.0, float(counts.sum()))
            return torch.full_like(tokens, prompts / window)
        case LengthWeight.BNPO:
            if micro_batches is None:
                return torch.full_like(tokens, prompts / max(1.0, float(counts.sum())))
            index = torch.unique(torch.tensor(list(micro_batches)), return_inverse=True)[1]
            sums = torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add_(0, index, counts)
            return prompts / (len(sums) * sums.clamp(min=1.0)[index])
        case unknown:
            assert_never(unknown)


def _trainers_constant(rule: Average, max_completion_length: int | None, longest: int) -> int:
    if max_completion_length is None:
        raise InputError(
            f"length weight {rule} divides by the trainer's constant; give max_completion_length (as TRL calls it), as a "
            "setting or as a column of the rows"
        )
    if max_completion_length < longest:
        raise InputError(
            f"max_completion_length is {max_completion_length}, but a response has {longest} tokens; "
            "expected the trainer's constant, at least as long"
        )
    return max_completion_length
