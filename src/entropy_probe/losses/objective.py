"""A trainer's whole objective as weights of its tokens: what multiplies ∇log π(y_t) and ∇H_t in the update.

A loss's gradient is a sum over response tokens, so with w_t the weight of token t in the trainer's average,

    minus the gradient = Σ_t [ ω_t ∇log π(y_t) + β_t ∇H_t ]
    ω_t = −∂/∂ log π(y_t) Σ_s w_s [ m_s ρ_s ℓ_s + KL_s ]          β_t = λ (weight of token t in the trainer's mean entropy)

ℓ the token loss, m what masks leave, ρ the correction for the sampler. TRL adds the KL term after both: neither weights it.
Source: docs/method.md, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from entropy_probe.losses.corrections import Correction
from entropy_probe.losses.kl import KLTerm
from entropy_probe.losses.rows import LossRows
from entropy_probe.losses.token_loss import TokenLoss
from entropy_probe.losses.token_masks import high_entropy_mask, off_policy_mask


class BonusAverage(StrEnum):
    """Over what a trainer averages the entropy of its bonus.

    ``micro-batch``: over the tokens of each micro-batch, and over micro-batches (TRL). ``loss``: as the trainer averages its
    loss (verl).
    """

    MICRO_BATCH = "micro-batch"
    LOSS = "loss"


@dataclass(frozen=True)
class EntropyBonus:
    """λ times the mean entropy of the sampled prefixes, differentiated through H_t alone."""

    coefficient: float
    average: BonusAverage = BonusAverage.MICRO_BATCH


@dataclass(frozen=True)
class TokenWeights:
    """ω of the reward part and of the KL part, and β of the bonus; [tokens] each, None where the objective has no such part."""

    reward: Tensor
    kl: Tensor | None = None
    bonus: Tensor | None = None

    @property
    def on_log_probs(self) -> Tensor:
        """ω of the whole update."""
        return self.reward if self.kl is None else self.reward + self.kl


@dataclass(frozen=True)
class Objective:
    """A token loss and what a trainer adds to it.

    Attributes:
        loss: the token loss.
        correction: for the sampler; None for none. A VESPO loss holds its own.
        top_entropy_quantile: the share of tokens that keep their loss; 1 for all.
        off_policy_threshold: of :func:`off_policy_mask`; None for none.
        kl: the KL term; None for none.
        bonus: the entropy bonus; None for none.
    """

    loss: TokenLoss
    correction: Correction | None = None
    top_entropy_quantile: float = 1.0
    off_policy_threshold: float | None = None
    kl: KLTerm | None = None
    bonus: EntropyBonus | None = None

    @property
    def needs_entropies(self) -> bool:
        """Whether H_t decides over a token's weight."""
        return self.top_entropy_quantile < 1.0

    @property
    def bonus_of_micro_batches(self) -> bool:
        """Whether β is a share of a mean over micro-batches, whatever weights the average has."""
        return self.bonus is not None and self.bonus.average is BonusAverage.MICRO_BATCH

    def token_weights(self, rows: LossRows, average: Tensor, kl_average: Tensor | None = None) -> TokenWeights:
        """ω and β of every token.

        Args:
            rows: what the loss sees.
            average: w, the weight of every token in the trainer's average before its mask, [tokens].
            kl_average: the same of the KL term, where the trainer averages it otherwise; None for ``average``.

        Raises:
            InputError: the rows lack what a part needs.
        """
        kept = rows.mask if rows.token_weights is None else rows.mask * rows.token_weights
        if self.off_policy_threshold is not None:
            kept = kept * off_policy_mask(rows, self.off_policy_threshold)
        entropy_mask = None
        if self.top_entropy_quantile < 1.0:
            entropy_mask = high_entropy_mask(rows, self.top_entropy_quantile)
            kept = kept * entropy_mask
        if self.correction is not None:
            kept = kept * self.correction.weights(rows)
        return TokenWeights(
            _minus_gradient(self.loss, rows, average * kept),
            None
            if self.kl is None
            else _minus_gradient(self.kl, rows, (average if kl_average is None else kl_average) * rows.mask),
            None if self.bonus is None else self._bonus(self.bonus, rows, average, entropy_mask),
        )

    def _bonus(self, bonus: EntropyBonus, rows: LossRows, average: Tensor, entropy_mask: Tensor | None) -> Tensor:
        if bonus.average is BonusAverage.LOSS:
            return bonus.coefficient * average * rows.mask
        mask = rows.mask if entropy_mask is None else rows.mask * entropy_mask
        part = rows.micro_batch_of_token
        parts = int(part.max()) + 1
        counts = mask.new_zeros(parts).index_add(0, part, mask).clamp(min=1.0)
        return bonus.coefficient * mask / (parts * counts[part])


def _minus_gradient(loss: TokenLoss, rows: LossRows, weights: Tensor) -> Tensor:
    """−∂/∂ log π Σ_t weight_t ℓ_t with the weights held fixed, [tokens]."""
    log_probs = rows.log_probs.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad((weights * loss(log_probs, rows)).sum(), log_probs)
    return -gradient
