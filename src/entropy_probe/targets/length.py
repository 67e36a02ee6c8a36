"""The expected response length, E[T], in tokens, the end token included where one was sampled.

Z_n = (1/G_n) Σ_g (T_ng − T̄_n,−g) ∇S_ng, E[Z_n] = +∇E[T]_n. Where a length limit cuts responses it is the capped policy's. See
:mod:`~entropy_probe.targets.of_responses`.
"""

from __future__ import annotations

from torch import Tensor

from entropy_probe.targets.base import Sample
from entropy_probe.targets.of_responses import TargetOfResponses


class Length(TargetOfResponses):
    """E[T]."""

    name = "length"
    description = "expected tokens a response"

    def values(self, sample: Sample) -> Tensor:
        """T_i, [N]."""
        return sample.exact_lengths
