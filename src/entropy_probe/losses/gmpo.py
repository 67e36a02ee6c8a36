"""GMPO: the geometric mean of the tokens' clipped ratios."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_probe.losses.rows import LossRows


@dataclass(frozen=True)
class GMPO:
    """ℓ = −A exp( mean_t s · min(s log ρ_t, s clip(log ρ_t, −ε_low, ε_high)) ), s the sign of A.

    A is the response's mean advantage; the loss of a whole response stands at each of its tokens.
    Source: arXiv 2507.20673; verl's ``geo_mean``.
    """

    epsilon_low: float = 0.4
    epsilon_high: float = 0.4

    def __call__(self, log_probs: Tensor, rows: LossRows) -> Tensor:
        """See the class."""
        sign = rows.advantages.sign()
        difference = log_probs - rows.old
        clipped = difference.clamp(-self.epsilon_low, self.epsilon_high)
        kept = sign * torch.minimum(sign * difference, sign * clipped)
        loss = -rows.averaged(rows.advantages) * rows.averaged(kept).exp()
        return rows.at_tokens(loss)
