"""Values for a model that was built without: every tensor whole, or the rows that this rank holds of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from entropy_probe.checkpoints.files.stored import StoredTensor
from entropy_probe.checkpoints.skeleton import Skeleton, places
from entropy_probe.compat.fsdp import held_part
from entropy_probe.errors import InputError


@torch.no_grad()
def fill(path: Path, skeleton: Skeleton, device: torch.device | str = "cpu") -> None:
    """Give memory to the parameters that the skeleton has origins for, and to all tensors the values that are stored.

    Raises:
        InputError: a file is damaged, or a tied tensor is stored with two values.
    """
    tensors: dict[str, Tensor] = dict(skeleton.model.named_buffers())
    for place in places(skeleton.model):
        if place.name in skeleton.origins:
            filled = nn.Parameter(torch.empty_like(place.parameter, device=device), place.parameter.requires_grad)
            place.put(filled)
            tensors[place.name] = filled.detach()
    for name, origin in skeleton.origins.items():
        (first, stored), *others = origin.items()
        _copy(stored, tensors[name])
        for key, other in others:
            again = torch.empty_like(tensors[name])
            _copy(other, again)
            if not torch.equal(held_part(again), held_part(tensors[name])):
                raise InputError(
                    f"{path}: {name} is tied, but the file holds other values under {key} than under {first}"
                )


def refuse_damaged(path: Path, name: str, weight: Tensor) -> None:
    """Refuse a weight that holds NaN or an infinite value.

    Raises:
        InputError: it does.
    """
    if not bool(torch.isfinite(weight).all()):
        raise InputError(f"{path}: weight {name} holds NaN or an infinite value; the weights are damaged")


def own_rows(sharded: DTensor) -> slice:
    """This rank's rows of a tensor that FSDP2 cut along dimension 0: ⌈rows / N⌉ each, the last ones fewer or none."""
    rows, count, rank = sharded.shape[0], sharded.device_mesh.size(), sharded.device_mesh.get_local_rank()
    each = -(-rows // count)
    return slice(min(rank * each, rows), min((rank + 1) * each, rows))


def _copy(stored: StoredTensor, target: Tensor) -> None:
    """Into the target, in its type."""
    if not isinstance(target, DTensor):
        target.copy_(stored.read())
        return
    rows = own_rows(target)
    # An empty slice is nothing to ask a file for.
    if rows.start < rows.stop:
        target.to_local().copy_(stored.read(rows))
