"""CISPO: the ratio is a weight, clipped and without gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from entropy_probe.losses.rows import LossRows
from entropy_probe.losses.token_loss import RatioLevel, log_ratio


@dataclass(frozen=True)
class CISPO:
    """ℓ_t = −sg[min(ρ, ε_high)] A log π. Source: MiniMax-M1, arXiv 2506.13585; TRL's GRPOTrainer._compute_loss.

    Attributes:
        epsilon_high: the largest weight; a ratio and not its distance from 1.
        level: whose ratio.
    """

    epsilon_high: float = 0.2
    level: RatioLevel = RatioLevel.TOKEN

    def __call__(self, log_probs: Tensor, rows: LossRows) -> Tensor:
        """See the class."""
        weight = log_ratio(log_probs, rows, self.level).exp().clamp(max=self.epsilon_high).detach()
        return -weight * rows.advantages * log_probs
