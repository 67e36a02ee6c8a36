"""The gradient's norm, and what a trainer's clipping at a norm makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from entropy_probe.ranks.sharding import WHOLE, Sharding


def gradient_norm(ascent: Mapping[str, Tensor], sharding: Sharding = WHOLE) -> float:
    """‖Ȳ‖, L2 over all parameters that have a gradient; of shards, over those of all ranks."""
    return math.sqrt(sharding.total(sum(float((y.double() ** 2).sum()) for y in ascent.values())))


def clip_factor(norm: float, max_grad_norm: float | None) -> float:
    """What torch.nn.utils.clip_grad_norm_ multiplies a gradient of this norm with; 1.0 without a limit.

    Raises:
        ValueError: ``max_grad_norm`` is not above 0.
    """
    if max_grad_norm is None:
        return 1.0
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm is {max_grad_norm}; expected a number above 0, or None")
    # As torch has it: a norm of exactly max_grad_norm is clipped too, by a trace.
    return min(1.0, max_grad_norm / (norm + 1e-6))
