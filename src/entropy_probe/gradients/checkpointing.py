"""Gradient checkpointing in evaluation mode: layers keep their inputs alone and run once more in the backward.

transformers checkpoints a layer only while it is in training mode, where dropout would be active too; and the probe's
``torch.autograd.grad`` refuses the reentrant kind. So the layers that the model has marked run under torch's non-reentrant
checkpoint here. What they compute anew in the backward needs the function modes of the forward, which autograd has taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from entropy_probe.errors import InputError
from entropy_probe.wrappers import forward_is

Modes = Callable[[], Callable[[], AbstractContextManager[Any]]]
"""Called in the forward of a layer, gives what enters that forward's function modes again in the backward."""


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """Layers for which ``gradient_checkpointing_enable`` was called."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]


@contextmanager
def marked(model: nn.Module) -> Iterator[None]:
    """Within the block every layer that can be checkpointed is marked; afterwards those that were.

    Raises:
        InputError: the model has no such layer.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(
            "gradient checkpointing was asked for, but no layer of this model is a transformers GradientCheckpointingLayer; "
            "lower --microbatch instead"
        )
    before = [layer.gradient_checkpointing for layer in layers]
    try:
        for layer in layers:
            layer.gradient_checkpointing = True
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer.gradient_checkpointing = flag


@contextmanager
def checkpointing(model: nn.Module, modes: Modes) -> Iterator[None]:
    """Within the block marked layers are checkpointed; nothing changes where none is."""
    with ExitStack() as stack:
        for layer in checkpointed_layers(model):
            stack.enter_context(forward_is(layer, _recomputing(layer.forward, modes)))
        yield


class _Anew(AbstractContextManager[None]):
    """A context that can be entered again and again: a graph kept for two backwards is recomputed in each."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._entered: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        self._entered.append(self._make())
        self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.pop().__exit__(*error)


def _recomputing(original: Callable[..., Any], modes: Modes) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        again = _Anew(modes())
        # Dropout is inactive, so no random state needs to come back.
        return checkpoint(
            original,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), again),
            **kwargs,
        )

    return forward
