"""torch's ``checkpoint_wrapper`` and ``offload_wrapper``: modules around layers, which torch keeps under a private path.

The names were read in torch 2.6 and 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from entropy_probe.compat.gates import module_name
from entropy_probe.compat.torch_modules import child

WRAPPERS = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"


def named_parameters(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the names they would have were nothing in ``module`` wrapped for checkpointing or offloading.

    Such a wrapper leaves itself out of names only where it is the one that is asked, so that a layer would tell others than the
    model that it is part of. ``path`` is the module's own in the model, by which names then begin.

    Raises:
        InputError: torch has no ``_CHECKPOINT_PREFIX``.
    """
    prefix = _prefix()
    for name, parameter in module.named_parameters(path):
        yield name.replace(prefix, ""), parameter


def unwrapped_names(module: nn.Module) -> list[str]:
    """Names of ``module`` and of all modules in it, as if nothing were wrapped.

    Raises:
        InputError: torch has no ``_CHECKPOINT_PREFIX``.
    """
    prefix = _prefix()
    return [name.replace(prefix, "") for name, _ in module.named_modules()]


def checkpoint_wrappers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers in torch's ``CheckpointWrapper``, by name; each has a ``checkpoint_fn``.

    Raises:
        InputError: torch has no such class.
    """
    wrapper: type = module_name(WRAPPERS, "CheckpointWrapper", type)
    return ((name, module) for name, module in model.named_modules() if isinstance(module, wrapper))


def wrapped_layer(wrapper: nn.Module) -> nn.Module:
    """The layer inside a ``CheckpointWrapper``. Reads ``_checkpoint_wrapped_module``.

    Raises:
        InputError: there is no such name.
    """
    return child(wrapper, "_checkpoint_wrapped_module")


def is_selective(context: object) -> bool:
    """Whether a forward's context keeps chosen results for one backward (selective checkpointing).

    Reads ``torch.utils.checkpoint._CachingTorchDispatchMode``.

    Raises:
        InputError: there is no such class.
    """
    return isinstance(context, module_name("torch.utils.checkpoint", "_CachingTorchDispatchMode", type))


def _prefix() -> str:
    prefix: str = module_name(WRAPPERS, "_CHECKPOINT_PREFIX", str)
    return prefix
