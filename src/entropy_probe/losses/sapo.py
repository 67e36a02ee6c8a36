"""SAPO: a soft gate in place of the clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_probe.losses.rows import LossRows
from entropy_probe.losses.token_loss import RatioLevel, log_ratio


@dataclass(frozen=True)
class SAPO:
    """ℓ_t = −(4/τ) sigmoid(τ (ρ − 1)) A, τ one value where A > 0 and another elsewhere.

    Source: arXiv 2511.20347; TRL's GRPOTrainer._compute_loss. At ρ = 1 its gradient is the plain one.
    """

    temperature_pos: float = 1.0
    temperature_neg: float = 1.05
    level: RatioLevel = RatioLevel.TOKEN

    def __call__(self, log_probs: Tensor, rows: LossRows) -> Tensor:
        """See the class."""
        temperature = torch.where(rows.advantages > 0, self.temperature_pos, self.temperature_neg).to(log_probs)
        ratio = log_ratio(log_probs, rows, self.level).exp()
        return -torch.sigmoid(temperature * (ratio - 1.0)) * 4.0 / temperature * rows.advantages
