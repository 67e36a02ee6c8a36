"""Modules around a model that are not the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel or DataParallel, whose hooks would all-reduce the probe's gradients."""
    while isinstance(model, DistributedDataParallel | DataParallel):
        model = model.module
    return model


@contextmanager
def without_accelerate_autocast(model: nn.Module) -> Iterator[None]:
    """Within the block ``model`` runs the forward that accelerate found, without the mixed precision it wrapped around it.

    That autocast is entered inside ``forward``, where no caller can switch it off, and would be there even in a probe that asks
    for float32. Accelerate keeps the forward it replaced in ``_original_forward``.
    """
    attributes = vars(model)
    if "_original_forward" not in attributes or "forward" not in attributes:
        yield
        return
    wrapped = attributes["forward"]
    try:
        attributes["forward"] = attributes["_original_forward"]
        yield
    finally:
        attributes["forward"] = wrapped
