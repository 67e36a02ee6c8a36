"""Modules around a model that are not the model."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel or DataParallel, whose hooks would all-reduce the probe's gradients."""
    while isinstance(model, DistributedDataParallel | DataParallel):
        model = model.module
    return model
