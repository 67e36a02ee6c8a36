"""A digest of a model's weights, by which ranks find out whether they hold the same."""

from __future__ import annotations

from torch import nn

from entropy_probe.compat.checkpoint_wrappers import named_parameters
from entropy_probe.ranks.same_inputs import digest_of_tensors


def digest_of_model(model: nn.Module) -> bytes:
    """Of weights and buffers that are whole."""
    weights = {name: p.detach() for name, p in named_parameters(model)}
    return digest_of_tensors(weights | {name: b for name, b in model.named_buffers() if b.numel()})
