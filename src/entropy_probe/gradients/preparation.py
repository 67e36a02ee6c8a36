"""What one model needs to know of itself before its first probe: head, microbatches and rules, found on a few short rows.

A probe of the same model later on may take them over (``probe(..., preparation=result.preparation)``): they cost a handful of
forwards over a few tokens, which is nothing beside a large batch and some per cent of a small one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from entropy_probe.data.rollouts import Rollout, RolloutBatch
from entropy_probe.gradients.capture.backward_order import outside, sharded_layers
from entropy_probe.gradients.capture.checkpointing import checkpointing, wrappers
from entropy_probe.gradients.capture.modules import Treatment
from entropy_probe.gradients.treatments import Rules, check_real_rows, prove_rules, short_rows
from entropy_probe.model.head_choice import choose_head
from entropy_probe.model.input_limits import input_limits
from entropy_probe.model.language_head import HeadMode
from entropy_probe.model.padding import pad_right
from entropy_probe.model.policy import Policy

ACTIVATION_SHARE = 0.25
"""The share of the memory that a microbatch's activations and logits may take."""

LOGIT_SHARE = 0.125
"""The share past which logits are chunked."""

LOGIT_BYTES = 12
"""A logit, its log-softmax and its gradient in float32."""

POSITIONS = {"cpu": 2048}
"""Positions of a microbatch by kind of device. On a CPU what is larger is mapped and paged in again at every layer, which
costs more than the arithmetic (benchmarks/RESULTS.md)."""

MOST_POSITIONS = 16384
"""The same elsewhere: enough to fill an accelerator."""

TRIED = 128
"""Positions of the longest row that is measured."""

RESERVE = 2.0
"""Activations held beside those saved for the backward (the widest layer's own), as a factor."""


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps for the backward: constant + n (linear L + quadratic L²) for n rows of L positions.

    The constant is weights cast by autocast; the quadratic part attention that keeps its matrix.
    """

    constant: float
    linear: float
    quadratic: float

    def of_row(self, length: int) -> float:
        """Bytes a row."""
        return max(1.0, self.linear * length + self.quadratic * length**2)


@dataclass(frozen=True)
class Preparation:
    """How one model's forwards are run and differentiated.

    Attributes:
        head: where logits are computed.
        head_reason: why it is not the one that was wanted, or None.
        chunked: whether logits were too large to stand in memory.
        activations: what autograd keeps for the backward.
        longest: positions of the longest row that was tried.
        rules: which rule serves which parameter.
        microbatch_size: responses in one forward of this batch.
        reason: the choices in words.
    """

    head: HeadMode
    head_reason: str | None
    chunked: bool
    activations: Activations
    longest: int
    rules: Rules
    microbatch_size: int
    reason: str

    def applied(self, policy: Policy) -> Policy:
        """The policy with this head and microbatch."""
        return replace(policy, head=self.head, microbatch_size=self.microbatch_size)


def prepare(
    policy: Policy,
    batch: RolloutBatch,
    *,
    memory_bytes: float,
    microbatch_size: int | None = None,
    earlier: Preparation | None = None,
) -> Preparation:
    """Choose the head and the microbatch by memory, and prove the rules.

    Args:
        policy: with the whole head.
        batch: the rollouts; the beginnings of two of its sequences are what is tried.
        memory_bytes: what the probe may use.
        microbatch_size: responses in one forward, or None for what fits.
        earlier: of this very model. What it found holds unless this batch asks for another head or has longer rows; the
            microbatch is planned again.

    Raises:
        InputError: see :func:`~entropy_probe.gradients.treatments.prove_rules` and
            :func:`~entropy_probe.gradients.capture.checkpointing.wrappers`; or ``earlier`` is another model's.
    """
    wrappers(policy.model)  # Refused before a forward, which some would fail in words of their own.
    lengths = [response.length for response in batch.responses]
    longest, total = max(lengths), sum(lengths)
    positions = min(total, POSITIONS.get(policy.device.type, MOST_POSITIONS))
    if microbatch_size is not None:
        positions = min(total, microbatch_size * longest)
    vocabulary, _ = input_limits(policy.model)
    logits = 0.0 if vocabulary is None else float(LOGIT_BYTES * vocabulary * max(positions, longest))
    wanted = logits > LOGIT_SHARE * memory_bytes
    # A chunked head is one that FSDP2 does not see run, and for which it gathers nothing.
    chunked = wanted and not policy.sharding.sharded
    if earlier is not None:
        earlier.rules.check(earlier.applied(policy))
    if earlier is not None and earlier.chunked is chunked and not chunked and longest <= earlier.longest:
        found = earlier
    else:
        # Chunks leave out whatever has come to stand behind the head since, so they are tried at every call.
        choice = choose_head(policy, head_rows(batch), chunked=chunked)
        chosen = choice.policy
        rules = prove_rules(chosen, batch)
        check_real_rows(chosen, batch)
        kept = measure_activations(chosen, batch)
        found = Preparation(chosen.head, choice.reason, chunked, kept, longest, rules, 1, "")
    size, why = microbatch_size, "asked for"
    if size is None:
        room = ACTIVATION_SHARE * memory_bytes / RESERVE - found.activations.constant
        fit = int(room / (found.activations.of_row(longest) + _whole_bytes(policy) / min(batch.group_sizes)))
        # Strips hold rows of similar length, so that rows of mean length tell what a microbatch holds; what must fit, may not.
        size, why = max(1, positions * len(lengths) // total), f"about {positions} positions"
        if size > fit:
            size, why = max(1, fit), "what fits"
        if size < max(batch.group_sizes) <= fit:
            size, why = max(batch.group_sizes), "the responses to one prompt"
    # Measured by every rank, and where weights are sharded all must run as many forwards.
    size = int(policy.sharding.ranks.gather_numbers(np.array([size])).min())
    reason = f"{size} responses in a forward ({why}), head {found.head}"
    told = "not in chunks: weights are sharded" if wanted and not chunked else found.head_reason
    if told is not None:
        reason += f" ({told})"
    return replace(found, microbatch_size=size, reason=reason)


def _whole_bytes(policy: Policy) -> float:
    """What a rank of a sharded model holds whole of one prompt's X and Y: their part in parameters outside of layers."""
    if not policy.sharding.sharded:
        return 0.0
    trainable = policy.trainable()
    layers = sharded_layers(policy.model, dict.fromkeys(trainable, Treatment.FUNCTION))
    elements = sum(trainable[name].numel() for name in outside([layer.names for layer in layers], trainable))
    return 2.0 * elements * max(policy.dtype.itemsize, torch.float32.itemsize)


def head_rows(batch: RolloutBatch) -> tuple[Rollout, Rollout]:
    """The beginnings of two sequences, as responses to prompts of different lengths where they are long enough."""
    first, second = short_rows(batch)
    ids = (*second.prompt_ids, *second.response_ids)
    split = max(1, len(ids) - 1)
    return first, replace(second, prompt_ids=ids[:split], response_ids=ids[split:])


def measure_activations(policy: Policy, batch: RolloutBatch) -> Activations:
    """Measured on the longest row, cut to three lengths of at most ``TRIED`` positions; a parabola goes through them."""
    ids = max(((*r.prompt_ids, *r.response_ids) for r in batch.responses), key=len)
    longest = min(len(ids), TRIED)
    lengths = sorted({max(2, longest // 4), max(2, longest // 2), longest})
    kept = [_bytes_kept(policy, Rollout("row", ids[:1], ids[1:length], 0.0)) for length in lengths]
    if len(lengths) < 3:
        return Activations(0.0, kept[-1] / lengths[-1], 0.0)
    quadratic, linear, constant = (float(c) for c in np.polyfit(lengths, kept, 2))
    if quadratic < 0.0:
        linear, constant = (float(c) for c in np.polyfit(lengths, kept, 1))
    return Activations(max(0.0, constant), max(0.0, linear), max(0.0, quadratic))


def _bytes_kept(policy: Policy, row: Rollout) -> float:
    """What autograd keeps of one row, parameters apart."""
    padded = pad_right([row], policy.device)
    sharded = policy.sharding.sharded
    owned = set() if sharded else {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with policy.arithmetic(), checkpointing(policy.model, policy.modes), torch.enable_grad(), keeping:
        held = policy.token_log_probs(padded)
    # FSDP2 has freed the weights that it gathered, and their storages hold nothing by now.
    total = float(sum(storage.nbytes() for storage in kept.values()))
    del held
    return total
