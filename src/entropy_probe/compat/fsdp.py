"""FSDP2's shards: what a rank holds of them, when weights are let go of, and gathering without mixed precision.

The private names were read in torch 2.6 and 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from entropy_probe.compat.gates import attribute, closed


def held_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its rows, if FSDP2 has cut it, in the memory where they lie; else the tensor."""
    if isinstance(tensor, DTensor):
        rows: Tensor = tensor.to_local()
        return rows
    return tensor


def reshard(model: nn.Module) -> None:
    """Let go of weights that FSDP2 has gathered; nothing happens to others.

    Left to its own choice FSDP2 keeps the root's after a forward. They are a copy, which steps on the shards do not reach, and
    while it stands the model names it in the shards' place.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reset_sharding(model: nn.Module) -> None:
    """After a forward or backward that ended in an exception, let FSDP2 start over; nothing happens to others.

    It would take itself to be in that backward still, and the next one would find weights that are not there. A torch that has
    no such reset only lets go of what it has gathered.
    """
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, FSDPModule) and module not in inside:
            inside.update(module.modules())
            getattr(module, "reset_iter_state", module.reshard)()


def mixed_precision(model: nn.Module) -> set[torch.dtype]:
    """The types that FSDP2 gathers weights in, or gives a module's outputs in, where its policies name any.

    Raises:
        InputError: FSDP2's state lacks ``_mp_policy``, or a module its ``_get_fsdp_state``.
    """
    policies = [_policy(_state(module)) for module in model.modules() if isinstance(module, FSDPModule)]
    return {dtype for policy in policies for dtype in (policy.param_dtype, policy.output_dtype) if dtype is not None}


@contextmanager
def gathered_as_held(model: nn.Module) -> Iterator[None]:
    """Within the block FSDP2 gathers weights in the type that shards have; afterwards, on every exit, in its mixed precision's.

    A policy with ``param_dtype`` bfloat16 narrows float32 shards whenever it gathers them, and with them any small step. FSDP2
    has no setting for it once a model is cut: each parameter's type is set here, and what it has gathered so far put aside.

    Raises:
        InputError: FSDP2's states, groups or parameters lack a name that this needs; nothing stays changed then.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                stack.enter_context(_without_mixed_precision(module))
        yield


@contextmanager
def _without_mixed_precision(module: FSDPModule) -> Iterator[None]:
    state = _state(module)
    mixed = _policy(state)
    if mixed.param_dtype is None and mixed.output_dtype is None:
        yield
        return
    plain = replace(mixed, param_dtype=None, output_dtype=None)
    groups = _groups(state)
    parameters = [parameter for group in groups for parameter in attribute("torch", group, "fsdp_params", list)]
    for p in parameters:
        attribute("torch", p, "init_dtype_attrs", MethodType)
        attribute("torch", p, "all_gather_outputs", list)
        # It is there only once gathered: what makes it must know it by this name.
        if "_unsharded_param" not in attribute("torch", p, "init_unsharded_param", MethodType).__code__.co_names:
            raise closed("torch", f"{type(p).__qualname__}._unsharded_param")
    module.reshard()
    gathered = [(vars(p).pop("_unsharded_param", None), p.all_gather_outputs) for p in parameters]

    def follow(policy: MixedPrecisionPolicy) -> None:
        module.reshard()
        state._mp_policy = policy
        for group in groups:
            group.mp_policy = policy
        for p in parameters:
            p.init_dtype_attrs(policy)

    try:
        follow(plain)
        for p in parameters:
            p.all_gather_outputs = []
        yield
    finally:
        follow(mixed)
        for p, (unsharded, outputs) in zip(parameters, gathered, strict=True):
            vars(p).pop("_unsharded_param", None)
            p.all_gather_outputs = outputs
            if unsharded is not None:
                p._unsharded_param = unsharded


def _state(module: FSDPModule) -> Any:
    return attribute("torch", module, "_get_fsdp_state", MethodType)()


def _policy(state: Any) -> MixedPrecisionPolicy:
    policy: MixedPrecisionPolicy = attribute("torch", state, "_mp_policy", MixedPrecisionPolicy)
    return policy


def _groups(state: Any) -> list[Any]:
    """The groups of parameters that are gathered together.

    Newer versions of torch list them in ``_fsdp_param_groups``; older ones, 2.6 among them, have one, or None, in
    ``_fsdp_param_group``.
    """
    if hasattr(state, "_fsdp_param_groups"):
        groups: list[Any] = attribute("torch", state, "_fsdp_param_groups", list)
    else:
        groups = [attribute("torch", state, "_fsdp_param_group", object)]
    found = [group for group in groups if group is not None]
    for group in found:
        attribute("torch", group, "mp_policy", MixedPrecisionPolicy)
    return found
