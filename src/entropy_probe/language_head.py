"""The head of a language model on response positions alone, and in chunks where logits of a large vocabulary would not fit.

``whole``: the model's own logits at every position. ``responses``: the head sees only the positions whose logits predict a
response token; what the model does to logits afterwards (softcaps, scales) it does as always. ``chunked``: the model stops
before the head, and log-probs come from a few tokens' logits at a time; only for heads that are one linear layer with
nothing after it. The last two are taken only after two rows have matched (:mod:`entropy_probe.policy`).

Chunked, the gradient of log softmax(z/τ)[y] is (e_y − softmax(z/τ)) / τ by row of logits, so that logits are computed once
more in the backward where the head trains, and not at all where it is frozen: the hidden state's gradient under unit
coefficients is then found in the forward, and coefficients only scale its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function
from transformers import PreTrainedModel

from entropy_probe.wrappers import forward_is

CHUNK_VALUES = 1 << 24
"""Logits that stand in memory at a time when chunked: 64 MiB in float32."""


class HeadMode(StrEnum):
    """Where the head's logits are computed."""

    WHOLE = "whole"
    RESPONSES = "responses"
    CHUNKED = "chunked"


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that the transformers model in ``model`` makes its logits with; None where it has none of its own."""
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    return None if inner is None else inner.get_output_embeddings()


def chunkable(head: nn.Module) -> bool:
    """Whether the head is one linear layer and nothing else: no adapter, no hook, no forward put in its place."""
    hooks = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks
    return type(head) is nn.Linear and not hooks and "forward" not in vars(head)


@dataclass(frozen=True)
class HeadCall:
    """What the head saw, and what it gave."""

    hidden: Tensor
    logits: Tensor


@contextmanager
def head_calls(head: nn.Module, select: Callable[[Tensor], Tensor], *, stop: bool) -> Iterator[list[HeadCall]]:
    """Within the block the head sees ``select`` of its input; the list fills with its calls.

    Args:
        head: the output head.
        select: from hidden states [n, L, d] to those of response positions [n, R, d].
        stop: whether the head is passed by; the model then gets logits of zeros, one wide, which nobody reads.
    """
    calls: list[HeadCall] = []
    original = head.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen = select(hidden)
        logits = torch.zeros_like(seen[..., :1]) if stop else original(seen, *args, **kwargs)
        calls.append(HeadCall(seen, logits))
        return logits

    with forward_is(head, forward):
        yield calls


def chunked_log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> Tensor:
    """log softmax((hidden Wᵀ + b) / τ)[target] at every position, a chunk of positions at a time.

    Args:
        hidden: [n, R, d].
        weight: [V, d].
        bias: [V], or None.
        targets: token ids [n, R].
        temperature: τ.

    Returns:
        [n, R], float32 or float64.
    """
    tensors = tuple(t for t in (hidden, weight, bias) if t is not None)
    if has_torch_function(tensors):
        found: Tensor = handle_torch_function(chunked_log_probs, tensors, hidden, weight, bias, targets, temperature)
        return found
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    log_probs: Tensor = _ChunkedLogProbs.apply(hidden, weight, bias, targets, temperature)
    return log_probs


def position_chunks(shape: torch.Size, vocabulary: int) -> Iterator[slice]:
    """Slices of R, for [n, R], whose logits number at most ``CHUNK_VALUES``; one position at least."""
    step = max(1, CHUNK_VALUES // (shape[0] * vocabulary))
    for start in range(0, shape[1], step):
        yield slice(start, min(start + step, shape[1]))


def scaled_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """(hidden Wᵀ + b) / τ in float32, or float64 as it comes."""
    # Laid out anew: of a slice, F.linear would make a batched product with a copy of the weight a row.
    logits = F.linear(hidden.contiguous(), weight, bias)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if temperature == 1.0 else wide / temperature


def logit_gradient(logits: Tensor, targets: Tensor, delta: Tensor, temperature: float) -> Tensor:
    """δ (e_y − softmax(z/τ)) / τ for scaled logits z/τ [n, r, V], targets and δ [n, r]."""
    gradient = torch.softmax(logits, dim=-1).mul_(-delta[..., None] / temperature)
    return gradient.scatter_add_(-1, targets[..., None], (delta / temperature)[..., None].to(gradient))


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> Tensor:
        ctx.temperature, ctx.frozen = temperature, not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        wide = torch.promote_types(hidden.dtype, torch.float32)
        found = torch.empty(targets.shape, dtype=wide, device=hidden.device)
        unit = torch.empty_like(hidden, dtype=wide) if ctx.frozen and ctx.needs_input_grad[0] else None
        for part in position_chunks(targets.shape, len(weight)):
            logits = scaled_logits(hidden[:, part], weight, bias, temperature)
            chosen = targets[:, part]
            found[:, part] = torch.log_softmax(logits, dim=-1).gather(-1, chosen[..., None])[..., 0]
            if unit is not None:
                gradient = logit_gradient(logits, chosen, torch.ones_like(found[:, part]), temperature)
                unit[:, part] = gradient.to(weight.dtype) @ weight
        ctx.save_for_backward(unit if ctx.frozen else hidden, weight, bias, targets)
        return found

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, bias, targets = ctx.saved_tensors
        if ctx.frozen:
            return None if kept is None else (delta[..., None] * kept).to(weight.dtype), None, None, None, None
        d_hidden = torch.empty_like(kept)
        d_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        d_bias = None if bias is None else torch.zeros_like(d_weight[:, 0])
        for part in position_chunks(targets.shape, len(weight)):
            gradient = chunk_gradient(kept[:, part], weight, bias, targets[:, part], delta[:, part], ctx.temperature)
            d_hidden[:, part] = gradient @ weight
            flat = gradient.flatten(0, 1)
            d_weight += flat.T @ kept[:, part].flatten(0, 1)
            if d_bias is not None:
                d_bias += flat.sum(0)
        return d_hidden, d_weight.to(weight), None if d_bias is None else d_bias.to(weight), None, None


def chunk_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, delta: Tensor, temperature: float
) -> Tensor:
    """The logits' gradient of one chunk, from logits computed anew, in the weight's type: [n, r, V]."""
    logits = scaled_logits(hidden, weight, bias, temperature)
    return logit_gradient(logits, targets, delta, temperature).to(weight.dtype)
