"""Modules around a model that are not the model, and forwards put in a module's place for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel or ``torch.compile``.

    DDP's hooks would all-reduce the probe's gradients; what is compiled is run as it was written
    (:mod:`entropy_probe.model.policy`).
    """
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(model, OptimizedModule):
            model = model._orig_mod
        else:
            return model


def named_parameters(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the names they would have were nothing in ``module`` wrapped for checkpointing or offloading.

    Such a wrapper leaves itself out of names only where it is the one that is asked, so that a layer would tell others than the
    model that it is part of. ``path`` is the module's own in the model, by which names then begin.
    """
    for name, parameter in module.named_parameters(path):
        yield name.replace(_CHECKPOINT_PREFIX, ""), parameter


def held_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its rows, if FSDP2 has cut it, in the memory where they lie; else the tensor."""
    if isinstance(tensor, DTensor):
        rows: Tensor = tensor.to_local()
        return rows
    return tensor


@contextmanager
def forward_is(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the block ``module`` runs ``forward``; afterwards what it ran before, on every exit."""
    attributes = vars(module)
    missing = object()
    before = attributes.get("forward", missing)
    attributes["forward"] = forward
    try:
        yield
    finally:
        if before is missing:
            del attributes["forward"]
        else:
            attributes["forward"] = before


def without_accelerate_autocast(model: nn.Module) -> AbstractContextManager[None]:
    """Within the block ``model`` runs the forward that accelerate found, without the mixed precision it wrapped around it.

    That autocast is entered inside ``forward``, where no caller can switch it off, and would be there even in a probe that asks
    for float32. Accelerate keeps the forward it replaced in ``_original_forward``.
    """
    attributes = vars(model)
    if "_original_forward" not in attributes or "forward" not in attributes:
        return nullcontext()
    return forward_is(model, attributes["_original_forward"])


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
    """The types that FSDP2 gathers weights in, or gives a module's outputs in, where its policies name any."""
    policies: list[Any] = [m._get_fsdp_state()._mp_policy for m in model.modules() if isinstance(m, FSDPModule)]
    return {dtype for policy in policies for dtype in (policy.param_dtype, policy.output_dtype) if dtype is not None}


@contextmanager
def gathered_as_held(model: nn.Module) -> Iterator[None]:
    """Within the block FSDP2 gathers weights in the type that shards have; afterwards, on every exit, in its mixed precision's.

    A policy with ``param_dtype`` bfloat16 narrows float32 shards whenever it gathers them, and with them any small step. FSDP2
    has no setting for it once a model is cut: each parameter's type is set here, and what it has gathered so far put aside.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                stack.enter_context(_without_mixed_precision(module))
        yield


@contextmanager
def _without_mixed_precision(module: FSDPModule) -> Iterator[None]:
    state: Any = module._get_fsdp_state()
    mixed = state._mp_policy
    if mixed.param_dtype is None and mixed.output_dtype is None:
        yield
        return
    plain = replace(mixed, param_dtype=None, output_dtype=None)
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    parameters = [parameter for group in groups if group is not None for parameter in group.fsdp_params]
    module.reshard()
    gathered = [(vars(p).pop("_unsharded_param", None), p.all_gather_outputs) for p in parameters]

    def follow(policy: Any) -> None:
        module.reshard()
        state._mp_policy = policy
        for group in groups:
            if group is not None:
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
