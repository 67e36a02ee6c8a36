"""VESPO: a gamma-shaped weight of the whole response's ratio, without gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_probe.losses.corrections import Correction
from entropy_probe.losses.rows import LossRows

LEAST_LOG_RATIO, MOST_LOG_RATIO = math.log(1e-8), 20.0
"""Between which TRL holds log-ratios of a response; of one token between ∓20."""


@dataclass(frozen=True)
class VESPO:
    """ℓ_t = −sg[φ(w)] A log π, φ(w) = e^λ w^k e^{−λ w}, w = Π_t π_θ/π_old · π_old/π_sampler over the response's tokens.

    k and λ differ with the sign of A. Source: arXiv 2602.10693; TRL's GRPOTrainer.get_gamma_weights. A correction for the
    sampler enters w here, and not as a weight of the token loss.
    """

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0
    correction: Correction | None = None

    def __call__(self, log_probs: Tensor, rows: LossRows) -> Tensor:
        """See the class."""
        log_w = rows.summed((rows.log_probs - rows.old).clamp(-20.0, MOST_LOG_RATIO))
        if self.correction is not None:
            of_sampler = self.correction.weights(rows).log().clamp(LEAST_LOG_RATIO, MOST_LOG_RATIO)
            log_w = log_w + rows.summed(of_sampler)
        log_w = rows.at_tokens(log_w.clamp(LEAST_LOG_RATIO, MOST_LOG_RATIO))
        positive = rows.advantages >= 0
        k = torch.where(positive, self.k_pos, self.k_neg).to(log_w)
        rate = torch.where(positive, self.lambda_pos, self.lambda_neg).to(log_w).clamp(min=1e-4)
        phi = (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return -phi * rows.advantages * log_probs
