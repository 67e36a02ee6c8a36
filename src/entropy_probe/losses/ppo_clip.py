"""The clipped surrogate of PPO, and what GRPO, Dr. GRPO, DAPO, BNPO, GSPO and dual clip make of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_probe.losses.rows import LossRows
from entropy_probe.losses.token_loss import RatioLevel, log_ratio


@dataclass(frozen=True)
class PPOClip:
    """ℓ_t = −min(min(ρ, δ) A, clip(ρ, 1 − ε_low, 1 + ε_high) A), and for A < 0 at most −c A under dual clip.

    ρ is the token's ratio, or the response's geometric mean at every token (``level`` sequence: GSPO, arXiv 2507.18071).
    Sources: PPO, arXiv 1707.06347; dual clip, arXiv 1912.09729; separate ε, DAPO, arXiv 2503.14476; δ, INTELLECT-2,
    arXiv 2505.07291. Checked against TRL's GRPOTrainer._compute_loss.

    Attributes:
        epsilon_low: ε_low.
        epsilon_high: ε_high.
        delta: δ, above 1 + ε_high; None for none.
        dual_clip: c, above 1 (verl's clip_ratio_c); None for none.
        level: whose ratio.
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    dual_clip: float | None = None
    level: RatioLevel = RatioLevel.TOKEN

    def __call__(self, log_probs: Tensor, rows: LossRows) -> Tensor:
        """See the class."""
        ratio = log_ratio(log_probs, rows, self.level).exp()
        clipped = ratio.clamp(1.0 - self.epsilon_low, 1.0 + self.epsilon_high)
        if self.delta is not None:
            ratio = ratio.clamp(max=self.delta)
        loss = -torch.minimum(ratio * rows.advantages, clipped * rows.advantages)
        if self.dual_clip is None:
            return loss
        bounded = torch.minimum(-self.dual_clip * rows.advantages, loss)
        return torch.where(rows.advantages < 0, bounded, loss)
