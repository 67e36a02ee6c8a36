"""Which of a model's ways to its logits serves: found by trying them on short rows, and by nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entropy_probe.data.rollouts import Rollout
from entropy_probe.errors import one_line, out_of_memory
from entropy_probe.model.language_head import (
    HeadMode,
    chunkable,
    head_calls,
    output_head,
)
from entropy_probe.model.padding import PaddedResponses, pad_right
from entropy_probe.model.policy import Policy

HEAD_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Nats by which two ways to the same log-prob or entropy may differ, relative to 1 + its size: GEMMs of other shapes round
otherwise."""


LOW_PRECISION_HEAD_TOLERANCE = 0.1


@dataclass(frozen=True)
class HeadChoice:
    """A policy with the head that serves it best; ``reason`` says why it is not the one asked for, or is None."""

    policy: Policy
    reason: str | None


def choose_head(policy: Policy, rows: Sequence[Rollout], *, chunked: bool) -> HeadChoice:
    """Compute logits of response positions alone, and in chunks where asked, if these rows' log-probs and entropies stay.

    Chunks need more: that the model hands out the head's very logits, bit for bit. A scale or a cap after the head would be
    left out, and one near 1 would hide in the rounding of bfloat16.

    Args:
        policy: with the whole head.
        rows: two short responses to prompts of different lengths.
        chunked: whether logits are too large to stand in memory.
    """
    head = output_head(policy.model)
    if head is None:
        return HeadChoice(policy, "the model names no output head: logits of every position, whole")
    found = replace(policy, head=HeadMode.RESPONSES)
    with torch.no_grad(), policy.arithmetic():
        padded = pad_right(rows, policy.device)
        truth = _columns(policy, padded)
        try:
            with head_calls(head, lambda hidden: hidden, stop=False) as calls:
                logits = policy.model(
                    input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False
                ).logits
            if len(calls) != 1:
                return HeadChoice(
                    policy, f"the model calls its head {len(calls)} times: logits of every position, whole"
                )
            modes = [replace(policy, head=HeadMode.CHUNKED)] if chunked and chunkable(head) else []
            gaps = [float(((_columns(p, padded) - truth).abs() / (1 + truth.abs())).max()) for p in (found, *modes)]
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            if out_of_memory(error):
                raise
            return HeadChoice(policy, f"logits of every position, whole: {one_line(error, 80)}")
    if not gaps[0] <= _head_tolerance(policy):
        return HeadChoice(
            policy, f"logits of response positions alone change a log-prob or entropy by {gaps[0]:.1e} of its size"
        )
    if not chunked:
        return HeadChoice(found, None)
    raw = calls[0].logits
    same = raw.shape == logits.shape and torch.equal(raw.double(), logits.double())
    if not (modes and same and gaps[1] <= _head_tolerance(policy)):
        return HeadChoice(found, "not in chunks: the model's logits are more than one linear layer's output")
    return HeadChoice(replace(policy, head=HeadMode.CHUNKED), None)


def _columns(policy: Policy, batch: PaddedResponses) -> Tensor:
    """log π and H beside each other: [2, tokens]."""
    values = policy.token_values(batch, entropies=True)
    assert values.entropies is not None
    return torch.stack([values.log_probs, values.entropies])


def _head_tolerance(policy: Policy) -> float:
    return HEAD_TOLERANCE.get(policy.arithmetic_dtype(), LOW_PRECISION_HEAD_TOLERANCE)
