"""A trainer's default loss, from its definition on its own tensors, has the gradient that the rows made of them give.

None of the trainers is installed here; each loss is written down from the file that its docstring names. The average is the
trainer's too: it goes over whole mini-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import trainer_tensors as made
from entropy_probe.data.rollouts import Rollout, RolloutBatch, group_rollouts
from entropy_probe.integrations.rows import (
    AREAL_DEFAULTS,
    OPENRLHF_DEFAULTS,
    PRIME_RL_DEFAULTS,
    SKYRL_DEFAULTS,
    SLIME_DEFAULTS,
    VERL_DEFAULTS,
    StepFacts,
    TrainersLoss,
    rows_of_areal,
    rows_of_openrlhf,
    rows_of_prime_rl,
    rows_of_skyrl,
    rows_of_slime,
    rows_of_verl,
)
from entropy_probe.losses.corrections import CorrectionMode
from entropy_probe.losses.kl import KLEstimator
from entropy_probe.losses.length_weights import LossAggregation
from update_rows import as_pair, measured_of, rule_of

TOLERANCE = 1e-12
DOUBLE = torch.float64
N = len(made.SAMPLES)
FACTS = StepFacts(prompts=made.NAMES, rewards=made.REWARDS)
Loss = Callable[[Tensor, Any], Tensor]
"""From log-probs where the trainer has them, and its tensors."""


def clipped(log_probs: Tensor, old: Tensor, advantages: Tensor, high: float = 0.2, dual: float | None = None) -> Tensor:
    ratio = torch.exp(log_probs - old)
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1 + high))
    return losses if dual is None else torch.where(advantages < 0, torch.min(losses, -dual * advantages), losses)


def bounded_k3(log_probs: Tensor, ref: Tensor) -> Tensor:
    gap = (ref - log_probs).clamp(-20, 20)
    return (gap.exp() - gap - 1).clamp(-10, 10)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """Junk under a mask is no number that a sum may see."""
    return torch.where(mask.bool(), values, torch.zeros_like(values))


def verl(log_probs: Tensor, batch: Any) -> Tensor:
    """core_algos.compute_policy_loss_vanilla and agg_loss, token-mean."""
    mask = batch["response_mask"]
    losses = clipped(log_probs, batch["old_log_probs"], batch["advantages"], dual=3.0)
    return masked(losses, mask).sum() / mask.sum()


def verl_with_kl(log_probs: Tensor, batch: Any) -> Tensor:
    """GRPO's recipe: use_kl_loss, low_var_kl, seq-mean-token-mean."""
    mask = batch["response_mask"]
    losses = clipped(log_probs, batch["old_log_probs"], batch["advantages"], dual=3.0)
    whole = masked(losses + 0.001 * bounded_k3(log_probs, batch["ref_log_prob"]), mask)
    return (whole.sum(-1) / mask.sum(-1)).sum() / N


def openrlhf(log_probs: Tensor, batch: Any) -> Tensor:
    """models/loss.PolicyLoss and aggregate_loss."""
    mask = batch["action_mask"]
    return masked(clipped(log_probs, batch["action_log_probs"], batch["advantages"]), mask).sum() / mask.sum()


def openrlhf_icepop(log_probs: Tensor, batch: Any) -> Tensor:
    """With the correction icepop between 0.9 and 1.2, whose default is 0.5 and 5."""
    mask = batch["action_mask"]
    weight = torch.exp(batch["action_log_probs"] - batch["rollout_log_probs"])
    weight = weight * ((weight >= 0.9) & (weight <= 1.2))
    return masked(weight * clipped(log_probs, batch["action_log_probs"], batch["advantages"]), mask).sum() / mask.sum()


def skyrl(log_probs: Tensor, batch: Any) -> Tensor:
    """ppo_utils.ppo_policy_loss, a sum of scaled advantages; worker.py's KL term, in micro-batches of two and three rows."""
    mask = batch["loss_mask"]
    policy = masked(clipped(log_probs, batch["action_log_probs"], batch["advantages"]), mask).sum()
    kl = masked(bounded_k3(log_probs, batch["base_action_log_probs"]), mask)
    of_rows = kl.sum(-1) / mask.sum(-1).clamp(min=1.0)
    return policy + sum(0.001 * of_rows[rows].mean() * len(rows) / N for rows in ([0, 1], [2, 3, 4]))


def slime(log_probs: Tensor, batch: Any) -> Tensor:
    """loss.policy_loss_function, one tensor a row laid end to end, a sum of means over N."""
    return slime_of(log_probs, batch, lambda old, sampler: torch.ones_like(old))


def slime_tis(log_probs: Tensor, batch: Any) -> Tensor:
    """With vanilla_tis_function, capped at 1.1 (default 2)."""
    return slime_of(log_probs, batch, lambda old, sampler: torch.exp(old - sampler).clamp(0, 1.1))


def slime_of(log_probs: Tensor, batch: Any, weigh: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    old, sampler, advantages, mask = (
        torch.cat(batch[name]) for name in ("log_probs", "rollout_log_probs", "advantages", "loss_masks")
    )
    losses = masked(weigh(old, sampler) * clipped(log_probs, old, advantages), mask)
    means = [
        part.sum() / own.sum().clamp(min=1)
        for part, own in zip(losses.split(batch["response_lengths"]), batch["loss_masks"], strict=True)
    ]
    return torch.stack(means).sum() / N


def areal(log_probs: Tensor, batch: Any) -> Tensor:
    """functional.ppo_actor_loss_fn without use_decoupled_loss: the ratio is to the sampler."""
    mask = batch["loss_mask"]
    return masked(clipped(log_probs, batch["logprobs"], batch["advantages"]), mask).sum() / mask.count_nonzero()


def areal_decoupled(log_probs: Tensor, batch: Any) -> Tensor:
    """With use_decoupled_loss, and rejection_sampling of tokens by the ratio above 1.1 (default 5)."""
    mask = batch["loss_mask"]
    weight = torch.exp(batch["prox_logp"] - batch["logprobs"])
    weight = weight * (weight <= 1.1)
    losses = weight * clipped(log_probs, batch["prox_logp"], batch["advantages"])
    return masked(losses, mask).sum() / mask.count_nonzero()


def prime_rl(log_probs: Tensor, batch: Any) -> Tensor:
    """rl/loss.default_loss_fn over micro-batches laid end to end, divided by the tokens of all."""
    sampler, advantages, mask = (
        torch.cat([one[name][0] for one in batch]) for name in ("inference_logprobs", "advantages", "loss_mask")
    )
    log_ratio = log_probs - sampler
    difference = torch.exp(log_probs) - torch.exp(sampler)
    invalid = torch.where(advantages > 0, difference > 0.2, difference < -0.2)
    policy = (mask & ~invalid) * advantages * torch.exp(log_ratio)
    return masked(-policy + 1e-3 * log_ratio**2, mask).sum() / mask.sum()


@dataclass(frozen=True)
class Case:
    """A trainer's tensors, the rows made of them, its loss written down, and the record of it."""

    tensors: Callable[[], Any]
    rows: Callable[[Any, StepFacts], list[Rollout]]
    loss: Loss
    record: TrainersLoss
    mask: Callable[[Any], Tensor]
    facts: StepFacts = FACTS


def mask_of(name: str) -> Callable[[Any], Tensor]:
    return lambda batch: batch[name].bool()


LONGER = replace(FACTS, prompts=[*made.NAMES, "a"], rewards=[*made.REWARDS, 0.0])
"""prime-rl's have a sample of padding more."""
MASK_OF_PRIME_RL: Callable[[Any], Tensor] = lambda batch: torch.cat([one["loss_mask"][0] for one in batch])  # noqa: E731
MASK_OF_SLIME: Callable[[Any], Tensor] = lambda batch: torch.cat(batch["loss_masks"]).bool()  # noqa: E731
NO_PROX: Callable[[], Any] = lambda: {k: v for k, v in made.areal(DOUBLE).items() if k != "prox_logp"}  # noqa: E731

CASES: dict[str, Case] = {
    "verl": Case(lambda: made.verl(DOUBLE), rows_of_verl, verl, VERL_DEFAULTS, mask_of("response_mask")),
    "verl, KL loss": Case(
        lambda: made.verl(DOUBLE), rows_of_verl, verl_with_kl,
        replace(VERL_DEFAULTS, loss_agg=LossAggregation.SEQ_MEAN_TOKEN_MEAN, beta=0.001, kl_estimator=KLEstimator.VERL_K3),
        mask_of("response_mask"),
    ),
    "OpenRLHF": Case(lambda: made.openrlhf(DOUBLE), rows_of_openrlhf, openrlhf, OPENRLHF_DEFAULTS, mask_of("action_mask")),
    "OpenRLHF, icepop": Case(
        lambda: made.openrlhf(DOUBLE), rows_of_openrlhf, openrlhf_icepop,
        replace(
            OPENRLHF_DEFAULTS, importance_sampling_mode=CorrectionMode.TOKEN_MASK, importance_sampling_clip_min=0.9,
            importance_sampling_clip_max=1.2,
        ),
        mask_of("action_mask"),
    ),
    "SkyRL": Case(lambda: made.skyrl(DOUBLE), rows_of_skyrl, skyrl, SKYRL_DEFAULTS, mask_of("loss_mask")),
    "slime": Case(lambda: made.slime(DOUBLE), rows_of_slime, slime, SLIME_DEFAULTS, MASK_OF_SLIME),
    "slime, TIS": Case(
        lambda: made.slime(DOUBLE), rows_of_slime, slime_tis,
        replace(
            SLIME_DEFAULTS, importance_sampling_mode=CorrectionMode.TOKEN_TRUNCATE, importance_sampling_clip_min=0.0,
            importance_sampling_clip_max=1.1,
        ),
        MASK_OF_SLIME,
    ),
    "AReaL": Case(NO_PROX, rows_of_areal, areal, AREAL_DEFAULTS, mask_of("loss_mask")),
    "AReaL, decoupled": Case(
        lambda: made.areal(DOUBLE), rows_of_areal, areal_decoupled,
        replace(AREAL_DEFAULTS, importance_sampling_mode=CorrectionMode.TOKEN_MASK, importance_sampling_clip_max=1.1),
        mask_of("loss_mask"),
    ),
    "prime-rl": Case(
        lambda: made.prime_rl(DOUBLE), rows_of_prime_rl, prime_rl, PRIME_RL_DEFAULTS, MASK_OF_PRIME_RL, LONGER
    ),
}  # fmt: skip


def batch_of(case: Case, record: TrainersLoss | None = None) -> RolloutBatch:
    return group_rollouts(case.rows(case.tensors(), replace(case.facts, loss=record or case.record)))


def error(case: Case, record: TrainersLoss | None = None) -> float:
    """Between the rows' update and the trainer's gradient, relative to its largest element; the largest of some policies θ."""
    return max(_error(case, record, seed) for seed in range(8))


def _error(case: Case, record: TrainersLoss | None, seed: int) -> float:
    batch, tensors = batch_of(case, record), case.tensors()
    measured = measured_of(batch, seed, spread=0.9)
    assert measured.log_probs is not None
    mask = case.mask(tensors)
    log_probs = torch.zeros(mask.shape, dtype=DOUBLE).masked_scatter(mask, measured.log_probs).requires_grad_()
    (gradient,) = torch.autograd.grad(case.loss(log_probs, tensors), log_probs)
    expected = -gradient[mask]
    assert float(expected.abs().max()) > 0
    found, bonus = as_pair(rule_of(batch).update(measured), batch)
    assert not bonus.any()
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", list(CASES))
def test_the_rows_have_the_gradient_of_the_trainers_loss(name: str) -> None:
    assert error(CASES[name]) <= TOLERANCE


def without(*names: str) -> Callable[[TrainersLoss], TrainersLoss]:
    return lambda loss: replace(loss, **dict.fromkeys(names))


PLANTED: Sequence[tuple[str, str, Callable[[TrainersLoss], TrainersLoss]]] = [
    ("verl", "no dual clip", lambda loss: replace(loss, clip_ratio_c=1e3)),
    ("verl", "another clip", lambda loss: replace(loss, epsilon_high=1.5)),
    ("verl", "another average", lambda loss: replace(loss, loss_agg=LossAggregation.SEQ_MEAN_TOKEN_MEAN)),
    ("verl, KL loss", "no KL term", without("beta")),
    ("verl, KL loss", "unbounded k1", lambda loss: replace(loss, kl_estimator=KLEstimator.K1)),
    ("OpenRLHF", "dual clip", lambda loss: replace(loss, clip_ratio_c=1.05)),
    ("OpenRLHF, icepop", "no correction", without(*(f"importance_sampling_{n}" for n in ("mode", "clip_min", "clip_max")))),
    ("OpenRLHF, icepop", "no lower bound", without("importance_sampling_clip_min")),
    ("SkyRL", "KL averaged as the loss", without("kl_agg")),
    ("SkyRL", "no KL term", without("beta")),
    ("slime", "over tokens", lambda loss: replace(loss, loss_agg=LossAggregation.TOKEN_MEAN)),
    ("slime, TIS", "masked", lambda loss: replace(loss, importance_sampling_mode=CorrectionMode.TOKEN_MASK)),
    ("AReaL, decoupled", "truncated", lambda loss: replace(loss, importance_sampling_mode=CorrectionMode.TOKEN_TRUNCATE)),
    ("prime-rl", "no pull back", without("kl_tau")),
    ("prime-rl", "a clip of the ratio", lambda loss: replace(loss, loss_type=OPENRLHF_DEFAULTS.loss_type, kl_tau=None)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bug", "plant"), PLANTED, ids=[f"{name}: {bug}" for name, bug, _ in PLANTED])
def test_another_loss_is_another_update(name: str, bug: str, plant: Callable[[TrainersLoss], TrainersLoss]) -> None:
    assert error(CASES[name], plant(CASES[name].record)) > 1e-5


def test_decoupled_areal_takes_its_ratio_to_the_proximal_policy() -> None:
    """A planted bug: to the sampler, as without use_decoupled_loss."""

    def to_the_sampler(tensors: Any, facts: StepFacts) -> list[Rollout]:
        return [replace(row, old_logprobs=row.logprobs) for row in rows_of_areal(tensors, facts)]

    assert error(replace(CASES["AReaL, decoupled"], rows=to_the_sampler)) > 1e-3
