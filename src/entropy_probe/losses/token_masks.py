"""Masks that a loss makes of the rows themselves: tokens of high entropy, responses that are not too far off-policy."""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_probe.losses.rows import LossRows, required


def high_entropy_mask(rows: LossRows, quantile: float) -> Tensor:
    """1 at tokens in the loss whose entropy is in the top ``quantile`` of their micro-batch's, [tokens].

    Source: the 80/20 rule, arXiv 2506.01939; TRL's ``top_entropy_quantile``, which takes the quantile over the tokens of one
    micro-batch, of all processes.

    Raises:
        InputError: the entropies are not known.
    """
    entropies = required(rows.entropies, "entropies", "the quantile of entropies")
    found = torch.zeros_like(rows.mask)
    for part in range(int(rows.micro_batch_of_token.max()) + 1):
        inside = (rows.micro_batch_of_token == part) & (rows.mask > 0)
        if bool(inside.any()):
            # In the entropies' own precision: a token that is the quantile itself is kept, as where TRL's are float32.
            found[inside & (entropies >= torch.quantile(entropies[inside], 1.0 - quantile))] = 1.0
    return found


def off_policy_mask(rows: LossRows, threshold: float) -> Tensor:
    """0 at the tokens of responses with A < 0 whose mean log π_sampler − log π_θ is above ``threshold``, [tokens].

    Source: DeepSeek-V3.2, arXiv 2512.02556; TRL's ``off_policy_mask_threshold``. The sampler's log-probs, or the trainer's old
    ones where those are not known.
    """
    before = rows.old if rows.sampler_log_probs is None else rows.sampler_log_probs
    drift = rows.at_tokens(rows.averaged(before - rows.log_probs))
    return ((rows.advantages >= 0) | (drift <= threshold)).to(rows.mask)
