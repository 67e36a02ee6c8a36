"""The part of a loss that is a published formula: one number a response token, before masks, corrections and averages."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from torch import Tensor

from entropy_probe.losses.rows import LossRows


class RatioLevel(StrEnum):
    """Whose importance ratio a loss takes: a token's, or the geometric mean over a response's tokens (GSPO)."""

    TOKEN = "token"
    SEQUENCE = "sequence"


class TokenLoss(Protocol):
    """A published loss, token by token."""

    def __call__(self, log_probs: Tensor, rows: LossRows) -> Tensor:
        """ℓ_t, [tokens], to be minimised; a loss of whole responses stands at each of their tokens.

        Args:
            log_probs: log π_θ(y_t), [tokens], with the graph through which ℓ is differentiated; equal to ``rows.log_probs``.
            rows: all else, constants.
        """


def log_ratio(log_probs: Tensor, rows: LossRows, level: RatioLevel) -> Tensor:
    """log ρ at every token: log π_θ − log π_old, or its mean over the response's tokens in the loss."""
    difference = log_probs - rows.old
    return difference if level is RatioLevel.TOKEN else rows.at_tokens(rows.averaged(difference))
