"""Rules by torch function: how a use of a trainable parameter tells its sequences' gradients apart.

GEMMs and embeddings keep (input, output gradient) and hand both to the unit vectors. Parameters that are broadcast over
positions (norm weights, biases of norms, depthwise filters) become one leaf a sequence, and autograd keeps them
apart by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entropy_probe.gradients.capture.sequences import Strip
from entropy_probe.gradients.capture.uses import Capture, Rule
from entropy_probe.model.language_head import Deltas, chunk_gradient, chunked_values, position_chunks


class _Linear(torch.autograd.Function):
    """x Wᵀ + b, or x W + b for ``input_first`` weights [in, out] (GPT-2's Conv1D)."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_first: bool,
        names: tuple[str | None, str | None],
        capture: Capture,
        strip: Strip,
    ) -> Tensor:
        ctx.input_first, ctx.names, ctx.capture, ctx.strip = input_first, names, capture, strip
        ctx.save_for_backward(x if names[0] is not None else None, weight)
        weight, bias = _as_used(weight, x, capture), None if bias is None else _as_used(bias, x, capture)
        return F.linear(x, weight.T if input_first else weight, bias)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight_name, bias_name = ctx.names
        strip, vectors = ctx.strip, ctx.capture.sink
        if weight_name is not None:
            rows, deltas = _positions(x, strip), _positions(delta, strip)
            left, right = (rows, deltas) if ctx.input_first else (deltas, rows)
            vectors.add_outer(weight_name, left, right, strip)
        if bias_name is not None:
            vectors.add(bias_name, _positions(delta, strip).sum(1, dtype=vectors.arithmetic), strip)
        dx = None
        if ctx.needs_input_grad[1]:
            weight = _as_used(weight, delta, ctx.capture)
            dx = delta @ (weight.T if ctx.input_first else weight)
        return None, dx, None, None, None, None, None, None


class _Embedding(torch.autograd.Function):
    """Rows of a table, for indices [n, T]."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        indices: Tensor,
        weight: Tensor,
        padding_index: int | None,
        name: str,
        capture: Capture,
        strip: Strip,
    ) -> Tensor:
        ctx.padding_index, ctx.parameter, ctx.capture, ctx.strip = padding_index, name, capture, strip
        ctx.save_for_backward(indices)
        return F.embedding(indices, weight)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        if ctx.padding_index is not None:
            # As torch has it: the padding row receives nothing, wherever it is used.
            delta = delta.masked_fill((indices == ctx.padding_index)[..., None], 0.0)
        where = ctx.strip.by_sequence(indices).flatten(1)
        ctx.capture.sink.add_rows(ctx.parameter, where, _positions(delta, ctx.strip), ctx.strip)
        return None, None, None, None, None, None, None


class _ChunkedHead(torch.autograd.Function):
    """Log-probs of targets, and entropies, from hidden states [n, R, d] through a captured head, in chunks of positions."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        entropies: bool,
        names: tuple[str | None, str | None],
        capture: Capture,
        strip: Strip,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.temperature, ctx.names, ctx.capture, ctx.strip = temperature, names, capture, strip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets)
        # Detached: beside this weight, which is, it would look like a frozen head's, and gradients be kept that nobody reads.
        return chunked_values(hidden.detach(), weight, bias, targets, temperature, entropies)

    @staticmethod
    def backward(ctx: Any, delta: Tensor | None, delta_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        deltas = Deltas(delta, delta_entropy)
        if deltas.absent:
            return (None,) * 10
        (weight_name, bias_name), strip, vectors = ctx.names, ctx.strip, ctx.capture.sink
        d_hidden = torch.empty_like(hidden)
        for row in range(strip.count):
            # A sequence at a time: its positions together fill a chunk, and its unit's vectors are gone over once a chunk.
            here, single = slice(row, row + 1), strip.single(row)
            for part in position_chunks(targets[here].shape, len(weight)):
                h = hidden[here, part]
                d = chunk_gradient(h, weight, bias, targets[here, part], deltas.at(here, part), ctx.temperature)
                d_hidden[here, part] = d @ weight
                if weight_name is not None:
                    vectors.add_outer(weight_name, d, h, single)
                if bias_name is not None:
                    vectors.add(bias_name, d.sum(1, dtype=vectors.arithmetic), single)
        return None, d_hidden, *[None] * 8


def _chunked_head(capture: Capture, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    def read(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, entropies: bool
    ) -> Any:
        names = (capture.name_of(weight), capture.name_of(bias))
        if len(hidden) != capture.strip.count or _lost(weight, names[0]) or _lost(bias, names[1]):
            return NotImplemented
        cast = _in_autocast(capture, hidden, weight, bias)
        return _ChunkedHead.apply(capture.anchor, *cast, targets, temperature, entropies, names, capture, capture.strip)

    return read(*args, **kwargs)


def _positions(tensor: Tensor, strip: Strip) -> Tensor:
    """[n, positions, features]."""
    apart = strip.by_sequence(tensor)
    assert apart is not None
    return apart.flatten(1, -2) if apart.dim() > 2 else apart.unsqueeze(1)


def _in_autocast(
    capture: Capture, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias as autocast would cast them for a GEMM; as they are where it is off.

    Where casts are not kept the weight and the bias are cast when they are used (:func:`_as_used`).
    """
    # Detached only now: a cast of the parameter itself would be a node of the graph.
    fixed, shift = weight.detach(), None if bias is None else bias.detach()
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, fixed, shift
    dtype = torch.get_autocast_dtype(device)
    if not capture.keeps_casts:
        return x.to(dtype), fixed, shift
    return x.to(dtype), capture.cast(weight, dtype), None if bias is None else capture.cast(bias, dtype)


def _as_used(weight: Tensor, beside: Tensor, capture: Capture) -> Tensor:
    return weight if capture.keeps_casts else weight.to(beside.dtype)


def _lost(tensor: Tensor | None, name: str | None) -> bool:
    """Whether a weight or bias that autograd computed, or a trainable one left to it, would lose its gradient in a rule."""
    return name is None and tensor is not None and tensor.requires_grad


def _affine(capture: Capture, x: Tensor, weight: Tensor, bias: Tensor | None, *, input_first: bool) -> Any:
    names = (capture.name_of(weight), capture.name_of(bias))
    if _lost(weight, names[0]) or _lost(bias, names[1]):
        return NotImplemented
    strip = capture.strip
    if x.dim() < 2 or weight.dim() != 2 or strip.by_sequence(x) is None:
        return NotImplemented
    cast = _in_autocast(capture, x, weight, bias)
    return _Linear.apply(capture.anchor, *cast, input_first, names, capture, strip)


def _linear(capture: Capture, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    def read(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        return _affine(capture, input, weight, bias, input_first=False)

    return read(*args, **kwargs)


def _addmm(capture: Capture, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if len(args) != 3 or kwargs:
        return NotImplemented
    bias, x, weight = args
    if bias.dim() != 1:
        return NotImplemented
    return _affine(capture, x, weight, bias, input_first=True)


def _embedding(capture: Capture, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    def read(
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Any:
        name, strip = capture.name_of(weight), capture.strip
        if name is None or max_norm is not None or scale_grad_by_freq:
            return NotImplemented
        indices = input
        if strip.count > 1 and indices.shape in {(strip.length,), (1, strip.length)}:
            # Positions, the same for every sequence: looked up once a sequence, or their gradients would come added up.
            indices = indices.expand(strip.count, strip.length)
        if indices.dim() == 0 or strip.by_sequence(indices) is None:
            return NotImplemented
        if padding_idx is not None and padding_idx < 0:
            padding_idx += len(weight)
        return _Embedding.apply(capture.anchor, indices, weight.detach(), padding_idx, name, capture, strip)

    return read(*args, **kwargs)


def _layer_norm(capture: Capture, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    def read(
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Any:
        return _scaled(capture, F.layer_norm(input, normalized_shape, None, None, eps), input, weight, bias)

    return read(*args, **kwargs)


def _rms_norm(capture: Capture, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    def read(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Any:
        return _scaled(capture, F.rms_norm(input, normalized_shape, None, eps), input, weight, None)

    return read(*args, **kwargs)


def _scaled(capture: Capture, normal: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Any:
    scale, shift = weight, bias
    if weight is not None and (name := capture.name_of(weight)) is not None:
        scale = capture.leaf(name, weight, x)
        if scale is None:
            return NotImplemented
    if bias is not None and (name := capture.name_of(bias)) is not None:
        shift = capture.leaf(name, bias, x)
        if shift is None:
            return NotImplemented
    out = normal if scale is None else normal * scale
    return out if shift is None else out + shift


def _conv1d(capture: Capture, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """All sequences side by side as groups of one convolution, each with its own filters."""

    def read(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        strip = capture.strip
        if input.dim() != 3 or strip.by_sequence(input) is not input:
            return NotImplemented
        filters = capture.leaf(name, weight, input[:, None]) if (name := capture.name_of(weight)) else None
        if filters is None:
            return NotImplemented
        shift: Tensor | None = None
        if bias is not None:
            shift_name = capture.name_of(bias)
            shift = (
                bias.expand(strip.count, -1)
                if shift_name is None
                else capture.leaf(shift_name, bias, input.transpose(1, 2))
            )
            assert shift is not None
            shift = shift.flatten()
        out = F.conv1d(
            input.flatten(0, 1)[None], filters.flatten(0, 1), shift, stride, padding, dilation, strip.count * groups
        )
        return out[0].unflatten(0, (strip.count, -1))

    return read(*args, **kwargs)


RULES: dict[Any, Rule] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.conv1d: _conv1d,
    chunked_values: _chunked_head,
}
"""By function; ``nn`` modules and PEFT's factors call these with their parameters themselves."""

FUNCTIONAL_MODULES = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Conv1d)
"""Modules whose own parameters the rules above see."""
