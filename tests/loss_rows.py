"""Rows of a batch on which trainers' losses are compared, and their padded form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_probe.losses.rows import LossRows

LENGTHS, WIDTH = (7, 4, 9, 2, 6, 9), 9


def padded(values: Tensor, lengths: Sequence[int] = LENGTHS) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(torch.split(values, list(lengths))), batch_first=True)


def flat(values: Tensor, lengths: Sequence[int] = LENGTHS) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(values, lengths, strict=True)])


def rows_of(seed: int, *, spread: float = 0.6, masked: bool = True) -> LossRows:
    """Ratios on both sides of every clip, advantages of both signs, tokens out of the loss inside of responses."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(sum(LENGTHS), generator=generator, dtype=torch.float64)

    log_probs = -normal().abs() - 0.1
    mask = (torch.rand(sum(LENGTHS), generator=generator) > 0.25).double() if masked else torch.ones(sum(LENGTHS))
    mask[0] = 1.0
    advantages = torch.tensor([1.3, -0.7, -1.1, 0.4, 0.9, -0.2], dtype=torch.float64)
    return LossRows(
        LENGTHS,
        log_probs,
        torch.repeat_interleave(advantages, torch.tensor(LENGTHS)),
        mask.double(),
        old_log_probs=(old := log_probs + spread * normal()),
        sampler_log_probs=old + 0.2 * normal(),
        ref_log_probs=log_probs + 0.4 * normal(),
        # TRL takes its quantile in float32.
        entropies=normal().abs().float().double(),
    )
