"""Rows with all that a loss may use, as a file has them, and what a forward at θ would measure of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from entropy_probe.data.rollouts import Rollout, RolloutBatch, group_rollouts
from entropy_probe.losses.rows import LossRows
from entropy_probe.model.measured import Measured
from entropy_probe.pipeline.recorded import trainers_step
from entropy_probe.pipeline.settings import Settings
from entropy_probe.pipeline.update import Update, UpdateRule
from entropy_probe.targets.base import TokenPair

PROMPTS, RESPONSES, MICRO_BATCHES = 4, 3, 4
LONGEST = 9


def rows_of_a_step(seed: int = 0) -> list[Rollout]:
    """Twelve rows in four micro-batches that cut across prompts; two have no token in the loss, others some less."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    rows = []
    for i in range(PROMPTS * RESPONSES):
        n, tokens = i // RESPONSES, int(torch.randint(2, LONGEST, (1,), generator=generator))
        old = -normal(tokens).abs() - 0.5
        mask = (torch.rand(tokens, generator=generator) > 0.3).int()
        mask[0] = 1
        rows.append(
            Rollout(
                f"p{n}",
                (3 + n, 4),
                torch.randint(5, 20, (tokens,), generator=generator),
                reward=float(i % 2),
                advantage=float(normal(1)),
                logprobs=(old + 0.3 * normal(tokens)).clamp(max=0.0),
                old_logprobs=old.clamp(max=0.0),
                ref_logprobs=(old + 0.3 * normal(tokens)).clamp(max=0.0),
                loss_mask=(0,) * tokens if i in (4, 7) else mask if i % 3 == 0 else None,
                micro_batch=(5 * i + 2) % MICRO_BATCHES,
            )
        )
    return rows


def said(rows: Sequence[Rollout], columns: Mapping[str, Any], **declared: Any) -> RolloutBatch:
    """The same with these columns in every row."""
    return group_rollouts(replace(row, extra=dict(columns), **declared) for row in rows)


def measured_of(batch: RolloutBatch, seed: int = 1, *, spread: float = 0.5) -> Measured:
    """Log-probs that differ from the trainer's old ones on both sides of every clip, and entropies."""
    generator = torch.Generator().manual_seed(seed)
    noise = spread * torch.randn(batch.tokens, generator=generator, dtype=torch.float64)
    old = batch.of_tokens("old_logprobs")
    log_probs = (torch.zeros(batch.tokens) if old is None else torch.tensor(old, dtype=torch.float64)) + noise
    entropies = (2 * torch.rand(batch.tokens, generator=generator)).double()  # TRL takes its quantile in float32
    scores = torch.stack([part.sum() for part in torch.split(log_probs, list(batch.lengths))])
    return Measured(scores, entropies, log_probs)


def rule_of(batch: RolloutBatch, **settings: Any) -> UpdateRule:
    asked = Settings(**settings)
    return UpdateRule.of(batch, trainers_step(batch, asked, assumed=None), asked.advantage)


def as_pair(update: Update, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
    """ω and β of every response token, as the trainer's own gradient has them: Ȳ's, without the mean over prompts."""
    pair = TokenPair.of(update.whole).at_tokens(batch.lengths).scaled(1.0 / len(batch.groups))
    none = torch.zeros_like(pair.log_probs)
    return pair.log_probs, none if pair.entropies is None else pair.entropies


def loss_rows(batch: RolloutBatch, measured: Measured, kept: Sequence[int]) -> LossRows:
    """What a trainer would hold of some rows, by their places: made of the columns one by one, by no code of the update's."""
    first = batch.first_token
    assert measured.log_probs is not None
    assert measured.entropies is not None
    rows = [batch.responses[i] for i in kept]
    places = torch.tensor([t for i in kept for t in range(first[i], first[i + 1])])

    def column(name: str, default: float | None = None) -> Tensor | None:
        found: list[float] = []
        for row in rows:
            values = getattr(row, name)
            if values is None and default is None:
                return None
            drawn = row.sampled or (True,) * len(row.response_ids)
            found += [
                v
                for v, kept in zip(
                    values if isinstance(values, tuple) else [default if values is None else values] * len(drawn),
                    drawn,
                    strict=True,
                )
                if kept
            ]
        return torch.tensor(found, dtype=torch.float64)

    advantages, mask = column("advantage"), column("loss_mask", 1.0)
    assert advantages is not None
    assert mask is not None
    return LossRows(
        tuple(batch.lengths[i] for i in kept),
        measured.log_probs[places],
        advantages,
        mask,
        old_log_probs=column("old_logprobs"),
        sampler_log_probs=column("logprobs"),
        ref_log_probs=column("ref_logprobs"),
        entropies=measured.entropies[places],
    )
