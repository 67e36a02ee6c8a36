"""Gradient checkpointing in evaluation mode: layers keep their inputs alone and run once more in the backward.

transformers checkpoints a layer only while it is in training mode, where dropout would be active too; and the probe's
``torch.autograd.grad`` refuses the reentrant kind. So the layers that the model has marked run under torch's non-reentrant
checkpoint here. What they compute again in the backward needs the function modes of the forward, which autograd has taken off.
Layers in torch's own ``checkpoint_wrapper`` (accelerate's ``activation_checkpointing``) would be checkpointed without those
modes; they run under the same checkpoint as the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers.modeling_layers import GradientCheckpointingLayer

from entropy_probe.compat.checkpoint_wrappers import checkpoint_wrappers, is_selective, wrapped_layer
from entropy_probe.compat.torch_modules import forward_is
from entropy_probe.errors import InputError
from entropy_probe.model.language_head import output_head

Modes = Callable[[], Callable[[], AbstractContextManager[Any]]]
"""Called in the forward of a layer, gives what enters that forward's function modes again in the backward."""

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""torch's ``context_fn``: what a layer's forward runs in, and what its recomputation does."""


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """Layers for which ``gradient_checkpointing_enable`` was called."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]


@contextmanager
def marked(model: nn.Module) -> Iterator[None]:
    """Within the block every layer that can be checkpointed is marked; afterwards those that were.

    Raises:
        InputError: the model has no such layer, and none that is wrapped.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers and not wrappers(model):
        raise InputError(
            "gradient checkpointing was asked for, but no layer of this model is a transformers GradientCheckpointingLayer; "
            "take fewer responses in a forward (microbatch) instead"
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
    """Within the block marked and wrapped layers are checkpointed; nothing changes where none is.

    Raises:
        InputError: see :func:`wrappers`.
    """
    head = output_head(model)
    with ExitStack() as stack:
        for wrapper, contexts in wrappers(model).items():
            layer = wrapped_layer(wrapper)
            # What is put into the head's place for a forward is gone in the backward.
            kept = head is not None and head in wrapper.modules()
            stack.enter_context(forward_is(wrapper, layer if kept else _recomputing(layer, modes, contexts)))
        for layer in checkpointed_layers(model):
            # One that is wrapped too runs no more often: what the wrapper's backward needs first is the layer's input alone.
            stack.enter_context(forward_is(layer, _recomputing(layer.forward, modes, noop_context_fn)))
        yield


@contextmanager
def not_checkpointing(model: nn.Module) -> Iterator[None]:
    """Within the block no layer is checkpointed, wrapped or not: what a backward needs is kept.

    Raises:
        InputError: see :func:`wrappers`.
    """
    with ExitStack() as stack:
        for wrapper in wrappers(model):
            stack.enter_context(forward_is(wrapper, wrapped_layer(wrapper)))
        yield


def wrappers(model: nn.Module) -> dict[nn.Module, Contexts]:
    """The model's ``checkpoint_wrapper`` modules, each with its ``context_fn``.

    Raises:
        InputError: one is of the reentrant kind, or has a checkpoint function that is not torch's.
    """
    return {module: _contexts_of(name, module.checkpoint_fn) for name, module in checkpoint_wrappers(model)}


def _contexts_of(name: str, how: Callable[..., Any]) -> Contexts:
    advice = "through which the probe cannot differentiate; wrap it with checkpoint_impl=CheckpointImpl.NO_REENTRANT"
    if not isinstance(how, partial) or how.func is not checkpoint or how.args:
        raise InputError(f"module {name!r} is wrapped with a checkpoint_fn that is not torch's ({how!r}), {advice}")
    # None is torch's default, and means the reentrant kind.
    reentrant = how.keywords.get("use_reentrant")
    if reentrant is None or reentrant:
        raise InputError(
            f"module {name!r} is wrapped with torch's reentrant checkpoint (CheckpointImpl.REENTRANT, use_reentrant=True), "
            f"{advice}"
        )
    contexts: Contexts = how.keywords.get("context_fn", noop_context_fn)
    return contexts


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


def _recomputing(original: Callable[..., Any], modes: Modes, contexts: Contexts) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        # Dropout is inactive, so no random state needs to come back.
        return checkpoint(
            original,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=partial(_with_modes, modes(), contexts),
            **kwargs,
        )

    return forward


def _with_modes(modes: Callable[[], AbstractContextManager[Any]], contexts: Contexts) -> Any:
    """The layer's own contexts, and the forward's modes around the second.

    A layer runs once more in each of several backwards, and each time in a new second context, which is not told what the
    first has recorded.
    """
    during, _ = contexts()
    if is_selective(during):
        # Selective checkpointing hands what it kept to one backward alone, and the probe runs several: all is recomputed.
        return nullcontext(), _Anew(modes)

    @contextmanager
    def again() -> Iterator[None]:
        # Own ones are made for each recomputation: most can be entered once.
        with modes(), contexts()[1]:
            yield

    return during, _Anew(again)
