"""RLOO's loss: PPO's clip on the ratio of whole responses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_probe.losses.rows import LossRows


@dataclass(frozen=True)
class RLOO:
    """ℓ = −min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A), ρ = exp Σ_t (log π_θ − log π_old).

    A loss of whole responses, at each of their tokens. Source: arXiv 2402.14740; TRL's RLOOTrainer._compute_loss.
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2

    def __call__(self, log_probs: Tensor, rows: LossRows) -> Tensor:
        """See the class."""
        ratio = rows.summed(log_probs - rows.old).exp()
        advantages = rows.averaged(rows.advantages)
        clipped = ratio.clamp(1.0 - self.epsilon_low, 1.0 + self.epsilon_high)
        return rows.at_tokens(-torch.minimum(ratio * advantages, clipped * advantages))
