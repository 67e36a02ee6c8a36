"""What one model needs to know of itself before its first probe: head, microbatches and rules, found on a few short rows.

A probe of the same model later on may take them over (``probe(..., preparation=result.preparation)``): they cost a handful of
forwards over a few tokens, which is nothing beside a large batch and some per cent of a small one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entropy_probe.gradients.checkpointing import checkpointing
from entropy_probe.gradients.treatments import Rules, prove_rules, short_rows
from entropy_probe.language_head import HeadMode
from entropy_probe.policy import Policy, choose_head, input_limits, pad_right
from entropy_probe.rollouts import Rollout, RolloutBatch

ACTIVATION_SHARE = 0.25
"""The share of the memory that a microbatch's activations and logits may take."""

LOGIT_SHARE = 0.125
"""The share past which logits are chunked."""

LOGIT_BYTES = 12
"""A logit, its log-softmax and its gradient in float32."""

POSITIONS = {"cpu": 2048}
"""Positions of a microbatch by kind of device. On a CPU what is larger is mapped and paged in anew at every layer, which
costs more than the arithmetic (benchmarks/RESULTS.md)."""

MOST_POSITIONS = 16384
"""The same elsewhere: enough to fill an accelerator."""

RESERVE = 2.0
"""Activations held beside those saved for the backward (the widest layer's own), as a factor."""


@dataclass(frozen=True)
class Preparation:
    """How one model's forwards are run and differentiated.

    Attributes:
        head: where logits are computed.
        microbatch_size: responses in one forward.
        rules: which rule serves which parameter.
        reason: the choices in words.
    """

    head: HeadMode
    microbatch_size: int
    rules: Rules
    reason: str

    def applied(self, policy: Policy) -> Policy:
        """The policy with this head and microbatch."""
        return replace(policy, head=self.head, microbatch_size=self.microbatch_size)


def prepare(
    policy: Policy, batch: RolloutBatch, *, memory_bytes: float, microbatch_size: int | None = None
) -> Preparation:
    """Choose the head and the microbatch by memory, and prove the rules.

    Args:
        policy: with the whole head.
        batch: the rollouts; the beginnings of two of its sequences are what is tried.
        memory_bytes: what the probe may use.
        microbatch_size: responses in one forward, or None for what fits.

    Raises:
        InputError: see :func:`~entropy_probe.gradients.treatments.prove_rules`.
    """
    rows = head_rows(batch)
    lengths = [response.length for response in batch.responses]
    longest, total = max(lengths), sum(lengths)
    positions = min(total, POSITIONS.get(policy.device.type, MOST_POSITIONS))
    if microbatch_size is not None:
        positions = min(total, microbatch_size * longest)
    vocabulary, _ = input_limits(policy.model)
    logits = 0.0 if vocabulary is None else float(LOGIT_BYTES * vocabulary * max(positions, longest))
    choice = choose_head(policy, rows, chunked=logits > LOGIT_SHARE * memory_bytes)
    chosen = choice.policy
    size = microbatch_size
    why = "asked for"
    if size is None:
        fit = int(ACTIVATION_SHARE * memory_bytes / (RESERVE * bytes_per_position(chosen, rows)))
        # Strips hold rows of similar length, so that rows of mean length tell what a microbatch holds; what must fit, may not.
        size, why = max(1, positions * len(lengths) // total), f"about {positions} positions"
        if size * longest > fit:
            size, why = max(1, min(size, fit // longest)), "what fits"
        if size < max(batch.group_sizes) <= fit // longest:
            size, why = max(batch.group_sizes), "the responses to one prompt"
    reason = f"{size} responses in a forward ({why}), head {chosen.head}"
    if choice.reason is not None:
        reason += f" ({choice.reason})"
    chosen = replace(chosen, microbatch_size=size)
    return Preparation(chosen.head, size, prove_rules(chosen, batch), reason)


def head_rows(batch: RolloutBatch) -> tuple[Rollout, Rollout]:
    """The beginnings of two sequences, as responses to prompts of different lengths where they are long enough."""
    first, second = short_rows(batch)
    ids = (*second.prompt_ids, *second.response_ids)
    split = max(1, len(ids) - 1)
    return first, replace(second, prompt_ids=ids[:split], response_ids=ids[split:])


def bytes_per_position(policy: Policy, rows: tuple[Rollout, ...]) -> float:
    """What autograd keeps for the backward, parameters apart, by position: measured on these rows."""
    padded = pad_right(rows, policy.device)
    owned = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with policy.arithmetic(), checkpointing(policy.model, policy.modes), torch.enable_grad(), keeping:
        policy.token_log_probs(padded)
    return max(1.0, sum(kept.values()) / padded.input_ids.numel())
