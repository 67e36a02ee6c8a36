"""The KL term to a reference policy, by the estimators that trainers use."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from torch import Tensor

from entropy_probe.losses.rows import LossRows, required
from entropy_probe.losses.token_loss import RatioLevel, log_ratio

MOST_LOG_RATIO, MOST_KL = 20.0, 10.0
"""Where verl cuts log π_ref/π, and the k3 that it makes of it."""


class KLEstimator(StrEnum):
    """With r = π_ref/π: k1 −log r, abs its size, k2 ½ log² r, k3 r − log r − 1 (Schulman 2020).

    The straight-through kinds (verl's k1+, k3+) have the first one's value and k2's gradient. ``verl-k3`` is k3 with verl's
    bounds.

    Example:
        >>> from entropy_probe import KLEstimator, Settings
        >>> settings = Settings(beta=0.04, kl_estimator=KLEstimator.K3)
    """

    K1 = "k1"
    ABS = "abs"
    K2 = "k2"
    K3 = "k3"
    VERL_K3 = "verl-k3"
    K1_STRAIGHT_THROUGH = "k1+"
    K3_STRAIGHT_THROUGH = "k3+"


@dataclass(frozen=True)
class KLTerm:
    """β times the estimate at every token; times ρ where the trainer corrects for its bias off-policy.

    Attributes:
        beta: β.
        estimator: see :class:`KLEstimator`.
        bias_correction: whether the estimate is multiplied by ρ, with its gradient (TRL's ``use_bias_correction_kl``).
        level: whose ρ.
    """

    beta: float
    estimator: KLEstimator = KLEstimator.K3
    bias_correction: bool = False
    level: RatioLevel = RatioLevel.TOKEN

    def __call__(self, log_probs: Tensor, rows: LossRows) -> Tensor:
        """β times the estimate, [tokens], to be minimised.

        Raises:
            InputError: the rows have no log-probs of the reference.
        """
        log_r = required(rows.ref_log_probs, "ref_logprobs", "the KL term") - log_probs
        match self.estimator:
            case KLEstimator.K1:
                found = -log_r
            case KLEstimator.ABS:
                found = log_r.abs()
            case KLEstimator.K2 | KLEstimator.K1_STRAIGHT_THROUGH | KLEstimator.K3_STRAIGHT_THROUGH:
                # The gradient alone is used: that of k2 for the straight-through kinds.
                found = 0.5 * log_r.square()
            case KLEstimator.K3:
                found = log_r.exp() - log_r - 1.0
            case KLEstimator.VERL_K3:
                log_r = log_r.clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
                found = (log_r.exp() - log_r - 1.0).clamp(-MOST_KL, MOST_KL)
            case unknown:
                assert_never(unknown)
        if self.bias_correction:
            found = found * log_ratio(log_probs, rows, self.level).exp()
        return self.beta * found
