"""Elements whose second moment is still zero though this batch has a gradient for them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from entropy_probe.optimizers.base import Metric
from entropy_probe.ranks.sharding import WHOLE, Sharding


def elements_without_v(ascent: Mapping[str, Tensor], metric: Metric, sharding: Sharding = WHOLE) -> dict[str, int]:
    """How many elements have v = 0 but a gradient in this batch, by parameter that has such; of shards, those of all ranks."""
    counts = [
        float((metric.zeros(name).to(y.device) & (y != 0)).sum()) if name in metric.with_zeros else 0.0
        for name, y in ascent.items()
    ]
    every = sharding.ranks.sum_numbers(np.array(counts)) if sharding.sharded else counts
    return {name: int(count) for name, count in zip(ascent, every, strict=True) if count}
