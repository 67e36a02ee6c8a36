"""The forward that accelerate wraps when it prepares a model for mixed precision.

The names were read in accelerate 1.4 and 1.15.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from entropy_probe.compat.gates import closed
from entropy_probe.compat.torch_modules import forward_is

WRAPS = "accelerate.utils.operations"
"""The module of accelerate's whose function takes the forward's place."""


def without_accelerate_autocast(model: nn.Module) -> AbstractContextManager[None]:
    """Within the block ``model`` runs the forward that accelerate found, without the mixed precision it wrapped around it.

    That autocast is entered inside ``forward``, where no caller can switch it off, and would be there even in a probe that asks
    for float32. Accelerate keeps the forward it replaced in ``_original_forward``.

    Raises:
        InputError: the forward is accelerate's, and what it replaced is not to be found.
    """
    attributes = vars(model)
    if "forward" not in attributes:
        return nullcontext()
    if "_original_forward" in attributes:
        return forward_is(model, attributes["_original_forward"])
    forward = attributes["forward"]
    if getattr(getattr(forward, "__func__", forward), "__module__", None) == WRAPS:
        raise closed("accelerate", f"{type(model).__qualname__}._original_forward")
    return nullcontext()
