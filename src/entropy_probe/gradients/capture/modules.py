"""Rules by module, for parameters that a model uses in its own arithmetic.

``BROADCAST``: the module scales or shifts by them (a norm spelled by hand): each sequence gets a leaf of its own, and the
module's code runs as it is. ``RECOMPUTE``: any other arithmetic over inputs whose sequences can be told apart (expert tensors,
state-space mixers): in the backward the module runs again, one sequence at a time, which costs it one more forward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from entropy_probe.compat.torch_modules import flattened, forward_is, own_parameters, unflattened
from entropy_probe.errors import out_of_memory
from entropy_probe.gradients.capture.layers import FUNCTIONAL_MODULES
from entropy_probe.gradients.capture.sequences import Strip
from entropy_probe.gradients.capture.uses import Capture


class Treatment(StrEnum):
    """How parameters are captured, fastest first."""

    FUNCTION = "function"
    BROADCAST = "broadcast"
    RECOMPUTE = "recompute"
    FALLBACK = "fallback"


def first_treatment(module: nn.Module, parameter: nn.Parameter) -> Treatment:
    """What is tried first for a parameter that ``module`` owns; whether it is right is checked on real rows."""
    if isinstance(module, FUNCTIONAL_MODULES) or parameter.dim() == 2:
        return Treatment.FUNCTION
    if parameter.dim() > 2:
        return Treatment.RECOMPUTE
    return Treatment.FUNCTION if type(module).__name__ == "Conv1D" else Treatment.BROADCAST


def next_treatment(treatment: Treatment) -> Treatment:
    """The next slower one."""
    order = list(Treatment)
    return order[min(order.index(treatment) + 1, len(order) - 1)]


def parameter_owners(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[nn.Module, dict[str, str]]:
    """Modules that hold ``parameters`` themselves: by module, the parameter's name by its attribute. Tied ones stand twice."""
    names = {id(p): name for name, p in parameters.items()}
    found: dict[nn.Module, dict[str, str]] = {}
    for module in model.modules():
        own = {attribute: names[id(p)] for attribute, p in own_parameters(module).items() if id(p) in names}
        if own:
            found[module] = own
    return found


def fall_back_around(
    owners: Mapping[nn.Module, Mapping[str, str]], treatments: dict[str, Treatment], unproven: Collection[str]
) -> None:
    """Let what a module recomputes fall back too where a parameter inside it does, or where one inside it is unproven.

    Neither autograd's graph nor the capture sees into a module that will be recomputed.
    """
    name_of = {id(own_parameters(module)[a]): name for module, names in owners.items() for a, name in names.items()}
    changed = True
    while changed:
        changed = False
        for module, names in owners.items():
            inside = {name_of[id(p)] for p in module.parameters() if id(p) in name_of}
            if any(treatments[name] is Treatment.FALLBACK or name in unproven for name in inside):
                for name in names.values():
                    if treatments[name] is Treatment.RECOMPUTE:
                        treatments[name] = Treatment.FALLBACK
                        changed = True


@contextmanager
def treated(
    capture: Capture, owners: Mapping[nn.Module, Mapping[str, str]], treatments: Mapping[str, Treatment]
) -> Iterator[None]:
    """Run the modules that own broadcast or recomputed parameters by their rule; their forwards come back on every exit.

    Args:
        capture: the capture that is active.
        owners: by module, the parameter's name in the model by its attribute.
        treatments: by the parameter's name in the model.
    """
    with ExitStack() as stack:
        for module, names in owners.items():
            chosen = {attribute: treatments[name] for attribute, name in names.items() if name in treatments}
            broadcast = {a: names[a] for a, how in chosen.items() if how is Treatment.BROADCAST}
            recompute = {a: names[a] for a, how in chosen.items() if how is Treatment.RECOMPUTE}
            if broadcast:
                stack.enter_context(forward_is(module, _broadcasting(module, module.forward, capture, broadcast)))
            if recompute:
                stack.enter_context(forward_is(module, _recomputing(module, module.forward, capture, recompute)))
        yield


@contextmanager
def _with_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """``module`` with other tensors in the place of some parameters; no hook runs, as functional_call's would."""
    registered = own_parameters(module)
    before = {attribute: registered[attribute] for attribute in tensors}
    registered.update(tensors)
    try:
        yield
    finally:
        registered.update(before)


def _broadcasting(
    module: nn.Module, original: Callable[..., Any], capture: Capture, names: Mapping[str, str]
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        like = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if like is None or not torch.is_grad_enabled():
            return original(*args, **kwargs)
        tensors = {}
        for attribute, name in names.items():
            leaf = capture.leaf(name, module.get_parameter(attribute), like)
            if leaf is not None:
                tensors[attribute] = leaf
        try:
            with _with_parameters(module, tensors):
                return original(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if out_of_memory(error):
                raise
            # Not a broadcast after all: with the parameters themselves, which autograd's graph will then show.
            return original(*args, **kwargs)

    return forward


def _recomputing(
    module: nn.Module, original: Callable[..., Any], capture: Capture, names: Mapping[str, str]
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        values, structure = flattened((args, kwargs))
        positions = [k for k, value in enumerate(values) if isinstance(value, Tensor)]
        if not torch.is_grad_enabled() or not positions:
            return original(*args, **kwargs)

        def again(tensors: Sequence[Tensor]) -> Any:
            """The module's own forward with other tensors in its arguments' places."""
            swapped = list(values)
            for k, tensor in zip(positions, tensors, strict=True):
                swapped[k] = tensor
            new_args, new_kwargs = unflattened(swapped, structure)
            return original(*new_args, **new_kwargs)

        capture.used.update(names.values())
        call = _Call(again, module, dict(names), capture, capture.strip)
        try:
            found = _Recomputed.apply(capture.anchor, call, *[values[k] for k in positions])
        except _NotApartError:
            return original(*args, **kwargs)
        outputs, output_structure = call.outputs.pop()
        arrived = iter(found)
        return unflattened(
            [next(arrived) if isinstance(value, Tensor) else value for value in outputs], output_structure
        )

    return forward


class _NotApartError(Exception):
    """A module's outputs have rows that cannot be told apart."""


@dataclass(frozen=True)
class _Call:
    """One call of a module that is to run again in the backward; ``outputs`` holds the structure that it returned."""

    again: Callable[[Sequence[Tensor]], Any]
    module: nn.Module
    names: Mapping[str, str]
    capture: Capture
    strip: Strip
    outputs: list[tuple[list[Any], Any]] = field(default_factory=list)


class _Recomputed(torch.autograd.Function):
    """A module's outputs, whose backward runs the module again for each sequence with parameters of its own."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        values, structure = flattened(call.again(tensors))
        outputs = [value for value in values if isinstance(value, Tensor)]
        if not outputs or any(call.strip.by_sequence(output) is None for output in outputs):
            raise _NotApartError
        call.outputs[:] = [(list(values), structure)]
        ctx.call = call
        ctx.needs = [t.requires_grad for t in tensors]
        ctx.autocast = (torch.is_autocast_enabled(anchor.device.type), torch.get_autocast_dtype(anchor.device.type))
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*[output for output in outputs if not output.is_floating_point()])
        inputs = {id(tensor) for tensor in tensors}
        return tuple(output.clone() if id(output) in inputs else output for output in outputs)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        strip, tensors = call.strip, ctx.saved_tensors
        totals = [torch.zeros_like(t) if need else None for t, need in zip(tensors, ctx.needs, strict=True)]
        enabled, dtype = ctx.autocast
        for row in range(strip.count):
            single = strip.single(row)
            inputs = [
                _part(t, strip, row).detach().requires_grad_(need) for t, need in zip(tensors, ctx.needs, strict=True)
            ]
            own = {a: call.module.get_parameter(a).detach().requires_grad_() for a in call.names}
            with (
                torch.enable_grad(),
                call.capture.resumed(),
                call.capture.over(single),
                call.capture.collecting() as leaves,
                _with_parameters(call.module, own),
                torch.autocast(deltas[0].device.type, dtype=dtype, enabled=enabled),
            ):
                found = [value for value in flattened(call.again(inputs))[0] if isinstance(value, Tensor)]
            pairs = [(o, _part(d, strip, row)) for o, d in zip(found, deltas, strict=True) if o.requires_grad]
            wanted = [*own.values(), *[leaf for _, leaf, _ in leaves], *[i for i in inputs if i.requires_grad]]
            # Parameters of modules inside are captured on the way; the anchor makes autograd go there.
            gradients = torch.autograd.grad(
                [o for o, _ in pairs], [*wanted, call.capture.anchor], [d for _, d in pairs], allow_unused=True
            )
            arrived = iter(gradients)
            for name in call.names.values():
                if (gradient := next(arrived)) is not None:
                    call.capture.sink.add(name, gradient[None], single)
            for name, _, strip_of_leaf in leaves:
                if (gradient := next(arrived)) is not None:
                    call.capture.sink.add(name, gradient, strip_of_leaf)
            for total in totals:
                if total is not None and (gradient := next(arrived)) is not None:
                    _part(total, strip, row).add_(gradient)
        return None, None, *totals


def _part(tensor: Tensor, strip: Strip, row: int) -> Tensor:
    """Sequence ``row`` of a tensor, in the tensor's own layout; the whole where it is the same for all."""
    if tensor.dim() and tensor.shape[0] == strip.count:
        return tensor[row : row + 1]
    if tensor.dim() and tensor.shape[0] == strip.count * strip.length:
        return tensor[row * strip.length : (row + 1) * strip.length]
    return tensor
