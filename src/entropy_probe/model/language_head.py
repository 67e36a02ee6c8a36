"""The head of a language model on response positions alone, and in chunks where logits of a large vocabulary would not fit.

``whole``: the model's own logits at every position. ``responses``: the head sees only the positions whose logits predict a
response token; what the model does to logits afterwards (softcaps, scales) it does as always. ``chunked``: the model stops
before the head, and log-probs come from a few tokens' logits at a time; only for heads that are one linear layer with
nothing after it. The last two are taken only after two rows have matched (:mod:`entropy_probe.model.policy`).

Beside log π of a token stands, where it is asked for, the entropy of the distribution that the token was drawn from:
H = −Σ_v p_v log p_v in nats, p = softmax(z/τ). By row of logits z

    ∂ log p_y / ∂z = (e_y − p) / τ            ∂H / ∂z = −p (log p + H) / τ

so that, chunked, logits are computed once more in the backward where the head trains, and not at all where it is frozen:
the hidden state's gradients under unit coefficients are then found in the forward, and coefficients only scale their rows.
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

from entropy_probe.compat.torch_modules import forward_is, has_hooks

CHUNK_VALUES = 1 << 24
"""Logits that are held at a time when chunked: 64 MiB in float32. One tensor of their size is held with them, two for H."""

LEAST_LOG_PROB = -1e4
"""p underflows to 0 far above it in every number type: so bounded, p log p is 0 where a logit is −∞, and not 0 · ∞."""


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
    return type(head) is nn.Linear and not has_hooks(head) and "forward" not in vars(head)


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


@dataclass(frozen=True)
class Deltas:
    """A loss's derivatives by the log-probs and by the entropies, of one shape; None where it does not depend on them."""

    log_prob: Tensor | None
    entropy: Tensor | None

    @property
    def absent(self) -> bool:
        """Whether there are none: autograd may call a backward whose outputs' gradients are all undefined."""
        return self.log_prob is None and self.entropy is None

    def at(self, *where: slice) -> Deltas:
        """Those of a part of the positions."""
        return Deltas(*(None if delta is None else delta[where] for delta in (self.log_prob, self.entropy)))


def log_probs_and_entropies(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax(z/τ)[target] and H of softmax(z/τ), with one tensor of the logits' size kept for the backward.

    Args:
        logits: z [tokens, V], float32 or float64; −∞ has probability 0.
        targets: token ids [tokens].
        temperature: τ.

    Returns:
        [tokens] each, in nats, in the logits' type.
    """
    log_probs, entropies = _LogProbsAndEntropies.apply(logits, targets, temperature)
    return log_probs, entropies


def chunked_values(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, entropies: bool
) -> tuple[Tensor, Tensor | None]:
    """log softmax(z/τ)[target] at every position, z = hidden Wᵀ + b, and H of softmax(z/τ), a chunk of positions at a time.

    Args:
        hidden: [n, R, d].
        weight: [V, d].
        bias: [V], or None.
        targets: token ids [n, R].
        temperature: τ.
        entropies: whether H is asked for; it costs nothing where it is not.

    Returns:
        [n, R] each, in nats, float32 or float64; None for H not asked for.
    """
    tensors = tuple(t for t in (hidden, weight, bias) if t is not None)
    if has_torch_function(tensors):
        by_rule: tuple[Tensor, Tensor | None] = handle_torch_function(
            chunked_values, tensors, hidden, weight, bias, targets, temperature, entropies
        )
        return by_rule
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    found: tuple[Tensor, Tensor | None] = _ChunkedValues.apply(hidden, weight, bias, targets, temperature, entropies)
    return found


def position_chunks(shape: torch.Size, vocabulary: int) -> Iterator[slice]:
    """Slices of R, for [n, R], whose logits number at most ``CHUNK_VALUES``; one position at least."""
    step = max(1, CHUNK_VALUES // (shape[0] * vocabulary))
    for start in range(0, shape[1], step):
        yield slice(start, min(start + step, shape[1]))


def scaled_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """(hidden Wᵀ + b) / τ in float32, or float64 as it comes."""
    # Copied to be contiguous: with a slice, F.linear would make a batched product and copy the weight for every row.
    logits = F.linear(hidden.contiguous(), weight, bias)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if temperature == 1.0 else wide / temperature


def entropy_of(log_p: Tensor) -> Tensor:
    """H = −Σ_v p_v log p_v of log p [..., V], which is bounded in place: [...]."""
    return -log_p.clamp_(min=LEAST_LOG_PROB).exp().mul_(log_p).sum(-1)


def logit_gradient(logits: Tensor, targets: Tensor, deltas: Deltas, temperature: float) -> Tensor:
    """[δ (e_y − p) − δ_H p (log p + H)] / τ with p = softmax(z/τ).

    Args:
        logits: z/τ [..., V], or log p itself: a second softmax changes nothing.
        targets: y [...].
        deltas: δ and δ_H [...].
        temperature: τ.
    """
    delta, delta_entropy = deltas.log_prob, deltas.entropy
    if delta_entropy is None:
        assert delta is not None
        gradient = torch.softmax(logits, dim=-1).mul_(-delta[..., None] / temperature)
    else:
        log_p = torch.log_softmax(logits, dim=-1).clamp_(min=LEAST_LOG_PROB)
        p = log_p.exp()
        p_log_p = log_p.mul_(p)
        of_p = delta_entropy * -p_log_p.sum(-1)
        of_p = of_p if delta is None else of_p + delta
        gradient = p.mul_(-of_p[..., None] / temperature)
        gradient.addcmul_(p_log_p, delta_entropy[..., None], value=-1 / temperature)
    if delta is None:
        return gradient
    return gradient.scatter_add_(-1, targets[..., None], (delta / temperature)[..., None].to(gradient))


class _LogProbsAndEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        log_probs = log_p.gather(-1, targets[..., None])[..., 0]
        entropies = entropy_of(log_p)
        ctx.save_for_backward(log_p, targets)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, delta: Tensor | None, delta_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        log_p, targets = ctx.saved_tensors
        deltas = Deltas(delta, delta_entropy)
        gradient = None if deltas.absent else logit_gradient(log_p, targets, deltas, ctx.temperature)
        return gradient, None, None


class _ChunkedValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        entropies: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.temperature, ctx.frozen = temperature, not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        ctx.set_materialize_grads(False)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = torch.empty(targets.shape, dtype=wide, device=hidden.device)
        found = torch.empty_like(log_probs) if entropies else None
        # A gradient for each output, and not logits made again in the backward: coefficients a token take two backwards, which
        # then cost nothing; three products with the weight in all, not five, for one more tensor of the hidden state's size.
        keeps = ctx.frozen and ctx.needs_input_grad[0]
        units = hidden.new_empty((2 if entropies else 1, *hidden.shape), dtype=wide) if keeps else None
        for part in position_chunks(targets.shape, len(weight)):
            logits = scaled_logits(hidden[:, part], weight, bias, temperature)
            chosen = targets[:, part]
            log_p = torch.log_softmax(logits, dim=-1)
            log_probs[:, part] = log_p.gather(-1, chosen[..., None])[..., 0]
            if found is not None:
                found[:, part] = entropy_of(log_p)
            del log_p  # a chunk's memory, which its gradients may have
            if units is not None:
                ones = torch.ones_like(log_probs[:, part])
                for unit, deltas in zip(units, (Deltas(ones, None), Deltas(None, ones)), strict=False):
                    unit[:, part] = logit_gradient(logits, chosen, deltas, temperature).to(weight.dtype) @ weight
        ctx.save_for_backward(units if ctx.frozen else hidden, weight, bias, targets)
        return log_probs, found

    @staticmethod
    def backward(ctx: Any, delta: Tensor | None, delta_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, weight, bias, targets = ctx.saved_tensors
        deltas = Deltas(delta, delta_entropy)
        if deltas.absent:
            return (None,) * 6
        if ctx.frozen:
            return _scaled_rows(kept, deltas).to(weight.dtype), *[None] * 5
        d_hidden = torch.empty_like(kept)
        d_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        d_bias = None if bias is None else torch.zeros_like(d_weight[:, 0])
        for part in position_chunks(targets.shape, len(weight)):
            here = slice(None), part
            gradient = chunk_gradient(kept[here], weight, bias, targets[here], deltas.at(*here), ctx.temperature)
            d_hidden[here] = gradient @ weight
            flat = gradient.flatten(0, 1)
            d_weight += flat.T @ kept[here].flatten(0, 1)
            if d_bias is not None:
                d_bias += flat.sum(0)
        return d_hidden, d_weight.to(weight), None if d_bias is None else d_bias.to(weight), None, None, None


def _scaled_rows(units: Tensor, deltas: Deltas) -> Tensor:
    """δ times the log-probs' unit gradients plus δ_H times the entropies': of [1 or 2, n, R, d], [n, R, d]."""
    if deltas.entropy is None:
        assert deltas.log_prob is not None
        return deltas.log_prob[..., None] * units[0]
    of_entropies = deltas.entropy[..., None] * units[1]
    return of_entropies if deltas.log_prob is None else of_entropies.addcmul_(deltas.log_prob[..., None], units[0])


def chunk_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, deltas: Deltas, temperature: float
) -> Tensor:
    """The logits' gradient of one chunk, from logits computed again, in the weight's type: [n, r, V]."""
    logits = scaled_logits(hidden, weight, bias, temperature)
    return logit_gradient(logits, targets, deltas, temperature).to(weight.dtype)
