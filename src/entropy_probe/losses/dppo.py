"""DPPO: a mask by the distance of probabilities in place of the clip, and a pull back to the policy that drew the tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_probe.losses.rows import LossRows


@dataclass(frozen=True)
class DPPO:
    """ℓ_t = −sg[m_t min(ρ, c)] A log π + τ log² ρ, with m_t a mask.

    m_t is 0 where A > 0 and π − π_old > δ_high, or A ≤ 0 and π_old − π > δ_low, and 1 elsewhere. It is the paper's binary
    total variation. π_old is the sampler's policy in prime-rl and SkyRL. Sources: DPPO, arXiv 2602.04879; the squared
    log-ratio, arXiv 2602.02276; prime-rl's ``default_loss_fn`` (its default: δ 0.2 both, τ 1e-3, no c), SkyRL's
    ``dppo_policy_loss`` (``binary_tv``; τ 0, no c), verl's ``dppo_tv`` (τ 0, c its ``clip_ratio_c``).

    Attributes:
        epsilon_low: δ_low, a distance of probabilities and not of a ratio from 1.
        epsilon_high: δ_high.
        kl_tau: τ; every token in the loss has the term, also where m_t is 0.
        largest_ratio: c; infinite for none.
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    kl_tau: float = 0.0
    largest_ratio: float = math.inf

    def __call__(self, log_probs: Tensor, rows: LossRows) -> Tensor:
        """See the class."""
        now, old = log_probs.detach().exp(), rows.old.exp()
        too_far = torch.where(rows.advantages > 0, now - old > self.epsilon_high, old - now > self.epsilon_low)
        ratio = (log_probs.detach() - rows.old).exp().clamp(max=self.largest_ratio)
        reward = -ratio.masked_fill(too_far, 0.0) * rows.advantages * log_probs
        return reward + self.kl_tau * (log_probs - rows.old).square()
