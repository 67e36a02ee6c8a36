"""Corrections for a sampler whose log-probs differ from the trainer's: truncated and masked importance sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from entropy_probe.losses.rows import LossRows, required


class CorrectionMode(StrEnum):
    """Of a token's ratio or of a response's product of them; beyond the bounds it is truncated, or the loss is masked.

    The names are TRL's ``vllm_importance_sampling_mode``.
    """

    TOKEN_TRUNCATE = "token_truncate"
    TOKEN_MASK = "token_mask"
    SEQUENCE_TRUNCATE = "sequence_truncate"
    SEQUENCE_MASK = "sequence_mask"


@dataclass(frozen=True)
class Correction:
    """A weight π_old/π_sampler of the token loss, without gradient. Sources: TIS, fengyao.notion.site/off-policy-rl; TRL.

    Attributes:
        mode: see :class:`CorrectionMode`.
        low: the smallest ratio; None for none.
        high: the largest; None for none.
    """

    mode: CorrectionMode = CorrectionMode.SEQUENCE_MASK
    low: float | None = None
    high: float | None = 3.0

    def weights(self, rows: LossRows) -> Tensor:
        """The weight at every token, [tokens].

        Raises:
            InputError: the rows have no log-probs of the sampler.
        """
        sampler = required(rows.sampler_log_probs, "logprobs", f"the correction {self.mode}")
        log_ratio = (rows.old - sampler) * rows.mask
        if self.mode in (CorrectionMode.SEQUENCE_TRUNCATE, CorrectionMode.SEQUENCE_MASK):
            log_ratio = rows.at_tokens(rows.summed(log_ratio))
        ratio = log_ratio.exp()
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        if self.mode in (CorrectionMode.TOKEN_TRUNCATE, CorrectionMode.SEQUENCE_TRUNCATE):
            return ratio.clamp(low, high)
        return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
