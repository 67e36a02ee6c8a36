"""Rounding of the weights at random: what the numerical floor of a realised change is read from."""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_probe.ranks.sharding import Sharding


def rounding_generator(sharding: Sharding) -> torch.Generator:
    """The same on all ranks that hold the same, and each its own where they hold shards."""
    return torch.Generator().manual_seed(sharding.ranks.rank if sharding.sharded else 0)


def rounding_noise(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """One unit in the last place up or down in a twelfth of the elements, float64: the variance of rounding to nearest."""
    theta = parameter.detach()
    draws = torch.rand(theta.shape, generator=generator, dtype=torch.float64).to(theta.device)
    up = torch.nextafter(theta, torch.full_like(theta, torch.inf)).double() - theta.double()
    down = torch.nextafter(theta, torch.full_like(theta, -torch.inf)).double() - theta.double()
    return torch.where(draws < 1 / 24, up, torch.where(draws < 1 / 12, down, 0.0))
