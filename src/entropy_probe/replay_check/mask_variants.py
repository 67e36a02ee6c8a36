"""Causes in which tokens a loss is of: masks, weights of tokens, the rows that a step consumes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from entropy_probe.data.rollouts import Rollout
from entropy_probe.pipeline.update import UpdateRule
from entropy_probe.replay_check.case import Replayed
from entropy_probe.replay_check.variants import Variant, with_objective, with_rows


def mask_variants(case: Replayed) -> Iterator[Variant]:
    """All of them, those that rows say most plainly first."""
    rule, batch = case.rule, case.batch
    masked = sum(row.tokens - row.tokens_in_loss for row in batch.responses)
    if masked:
        unmasked = with_rows(rule, lambda row: replace(row, loss_mask=None))
        yield Variant(
            "loss_mask",
            f"the trainer's loss was of every response token; here loss_mask leaves out {masked} of {batch.tokens}",
            "Drop loss_mask, or look for the mask that the trainer lost",
            unmasked,
        )
        yield Variant(
            "counted_tokens",
            "the trainer's averages count all response tokens; here they count those in the loss",
            "Give the mask as token_weight, and drop loss_mask",
            unmasked,
            only=torch.tensor(batch.of_tokens("loss_mask", 1.0), dtype=torch.float64),
        )
    # TRL takes a response whose last token is padding for one that ended.
    for ended in (case.padding, ()):
        cut = [row for row in batch.responses if _is_cut(row, ended) and row.tokens_in_loss]
        if 0 < len(cut) < len(batch.responses):
            yield Variant(
                "truncated",
                f"the trainer leaves truncated responses out of its loss; here {len(cut)} that did not end are in it",
                "Give them a loss_mask of zeros (TRL: mask_truncated_completions)",
                with_rows(rule, partial(_without_cut, ended)),
            )
    if any(row.token_weight is not None for row in batch.responses):
        yield Variant(
            "token_weight",
            "the trainer's loss had no weights of tokens; here token_weight multiplies it",
            "Drop token_weight",
            with_rows(rule, lambda row: replace(row, token_weight=None)),
        )
    yield from _mini_batches(rule)
    objective = rule.loss.objective
    if objective.needs_entropies:
        yield Variant(
            "top_entropy_quantile",
            f"the trainer's loss kept tokens of every entropy; here the top {objective.top_entropy_quantile:g} alone",
            "Drop top_entropy_quantile",
            with_objective(rule, replace(objective, top_entropy_quantile=1.0)),
        )
    if objective.off_policy_threshold is not None:
        yield Variant(
            "off_policy_mask_threshold",
            "the trainer's loss left no response out for its distance; here off_policy_mask_threshold is "
            f"{objective.off_policy_threshold:g}",
            "Drop off_policy_mask_threshold",
            with_objective(rule, replace(objective, off_policy_threshold=None)),
        )


def _is_cut(row: Rollout, ended: Sequence[int]) -> bool:
    """A response did not end by itself, as far as its row tells; nor with one of ``ended``."""
    last = row.response_ids[-1]
    cut = row.cut if row.cut is not None else row.eos_ids is not None and last not in row.eos_ids
    return cut and last not in ended


def _without_cut(ended: Sequence[int], row: Rollout) -> Rollout:
    return replace(row, loss_mask=(0,) * len(row.response_ids)) if _is_cut(row, ended) else row


def _mini_batches(rule: UpdateRule) -> Iterator[Variant]:
    rows = rule.batch.responses
    others = sorted({row.mini_batch for row in rows if row.mini_batch is not None} - {rule.mini_batch})
    for number in others:
        yield Variant(
            "mini_batch",
            f"the trainer's step consumed mini_batch {number}; here it is {rule.mini_batch}",
            "Give the rows of one step, or number mini_batch as the trainer takes them",
            replace(rule, consumed=tuple(row.mini_batch == number for row in rows)),
        )
    if others:
        yield Variant(
            "mini_batch",
            f"the trainer's step consumed all rows; here those of mini_batch {rule.mini_batch} alone",
            "Drop mini_batch",
            replace(rule, consumed=(True,) * len(rows)),
        )
