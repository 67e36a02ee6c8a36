"""θ⁺ on the live model: parameters are swapped for moved copies and put back, the very same tensors, on every exit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from entropy_probe.compat.checkpoint_wrappers import named_parameters
from entropy_probe.compat.fsdp import gathered_as_held, held_part, reshard


@contextmanager
def virtual_step(model: nn.Module, deltas: Mapping[str, Tensor], scale: float = 1.0) -> Iterator[None]:
    """Within the block the parameters hold θ + scale Δθ; afterwards θ bit for bit, exceptions included.

    The original storage is never written to: each parameter points to a new tensor and then back. But of parameters that FSDP2
    shards, which it gathers from where they lie: there the rank's rows are written over, and back from a copy.

    Args:
        model: its parameters must be in float32 or better (see :func:`at_least_float32`).
        deltas: Δθ by parameter name, of what this rank holds; parameters not named stay.
        scale: factor of the step.

    Raises:
        ValueError: a name that the model does not have.
    """
    reshard(model)
    parameters = dict(named_parameters(model))
    unknown = sorted(set(deltas) - set(parameters))
    if unknown:
        raise ValueError(f"the step names parameters that the model does not have: {', '.join(unknown[:3])}")
    originals = {name: _kept(parameters[name]) for name in deltas}
    try:
        for name, delta in deltas.items():
            theta = originals[name]
            # The sum is formed in float64 and rounded once.
            _put(parameters[name], (theta.double() + scale * delta.to(theta.device, torch.float64)).to(theta.dtype))
        yield
    finally:
        # A gathered copy would stay at θ⁺.
        reshard(model)
        for name, original in originals.items():
            _put(parameters[name], original)


def _kept(parameter: nn.Parameter) -> Tensor:
    return held_part(parameter.detach()).clone() if isinstance(parameter, DTensor) else parameter.data


def _put(parameter: nn.Parameter, values: Tensor) -> None:
    if isinstance(parameter, DTensor):
        rows = held_part(parameter.detach())
        rows.copy_(values.view(rows.shape))
    else:
        parameter.data = values


@contextmanager
def at_least_float32(model: nn.Module) -> Iterator[None]:
    """Within the block floating parameters and buffers below float32 are float32 copies; afterwards the originals.

    A bfloat16 weight does not move by 1e-6 of itself, so a small step would vanish in it. Of float32 shards FSDP2's mixed
    precision gathers no narrower weights either.
    """
    narrow = below_float32(model)
    originals = [tensor.data for tensor in narrow]
    try:
        for tensor in narrow:
            tensor.data = tensor.data.float()
        with gathered_as_held(model):
            yield
    finally:
        for tensor, original in zip(narrow, originals, strict=True):
            tensor.data = original


def below_float32(model: nn.Module) -> list[Tensor]:
    """The model's floating parameters and buffers of less than 32 bits."""
    return [
        tensor
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < 32
    ]
