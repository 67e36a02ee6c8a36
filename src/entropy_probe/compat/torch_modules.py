"""What is inside a ``torch.nn.Module``: parameters, buffers, hooks, forward; and what ``torch.compile`` puts around it.

The names were read in torch 2.6 and 2.13.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from entropy_probe.compat.gates import attribute, closed, module_name

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""A module's hooks, by kind."""


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """The module's own parameters by attribute, some of them None; what is written here becomes the module's.

    A tensor that is no parameter can stand here, which ``setattr`` refuses. Reads ``Module._parameters``.

    Raises:
        InputError: there is no such name.
    """
    found: dict[str, Any] = attribute("torch", module, "_parameters", dict)
    return found


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers by attribute; one that is written here stays persistent, or not, as it was.

    Reads ``Module._buffers``.

    Raises:
        InputError: there is no such name.
    """
    found: dict[str, Tensor | None] = attribute("torch", module, "_buffers", dict)
    return found


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook on the module runs in its forward or backward. Reads the names of ``HOOKS``.

    Raises:
        InputError: one of the names is missing.
    """
    return any(attribute("torch", module, name, dict) for name in HOOKS)


def child(wrapper: nn.Module, name: str) -> nn.Module:
    """The module that a wrapper of torch's holds under a name. Other attributes it may look up in the module that it wraps.

    Raises:
        InputError: it holds none of this name.
    """
    found = dict(wrapper.named_children()).get(name)
    if found is None:
        raise closed("torch", f"{type(wrapper).__qualname__}.{name}")
    return found


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel or ``torch.compile``.

    DDP's hooks would all-reduce the probe's gradients; what is compiled is run as it was written
    (:mod:`entropy_probe.model.policy`). Reads ``torch._dynamo.OptimizedModule`` and its ``_orig_mod``.

    Raises:
        InputError: torch's compiler is loaded and lacks one of the names.
    """
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif _is_compiled(model):
            model = child(model, "_orig_mod")
        else:
            return model


def _is_compiled(model: nn.Module) -> bool:
    # The compiler takes more than a second to import. Where nobody has, nothing is compiled.
    return "torch._dynamo" in sys.modules and isinstance(model, module_name("torch._dynamo", "OptimizedModule", type))


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


def flattened(values: Any) -> tuple[list[Any], Any]:
    """The leaves of nested tuples, lists, dictionaries and registered records, and their structure.

    ``torch.utils._pytree`` alone knows the records that libraries have registered with torch.

    Raises:
        InputError: it has no ``tree_flatten``.
    """
    leaves, structure = module_name("torch.utils._pytree", "tree_flatten", FUNCTION)(values)
    return leaves, structure


def unflattened(leaves: list[Any], structure: Any) -> Any:
    """The inverse of :func:`flattened`.

    Raises:
        InputError: ``torch.utils._pytree`` has no ``tree_unflatten``.
    """
    return module_name("torch.utils._pytree", "tree_unflatten", FUNCTION)(leaves, structure)


FUNCTION = type(flattened)
