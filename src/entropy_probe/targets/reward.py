"""The expected reward, J = E[R]: what the step is for. In the reward's own unit, per response.

Z_n = (1/G_n) Σ_g (R_ng − R̄_n,−g) ∇S_ng, E[Z_n] = +∇J_n, whatever advantages, length weights or clipping the update has:
δJ₁ is the change of the rewards in the rollouts, not of the training loss. See
:mod:`~entropy_probe.targets.of_responses`.
"""

from __future__ import annotations

from torch import Tensor

from entropy_probe.targets.base import Sample
from entropy_probe.targets.of_responses import TargetOfResponses


class Reward(TargetOfResponses):
    """E[R]."""

    name = "reward"
    description = "expected reward"
    needs_rewards = True

    def values(self, sample: Sample) -> Tensor:
        """R_i, [N]."""
        assert sample.rewards is not None, "the expected reward needs rewards"
        return sample.rewards
