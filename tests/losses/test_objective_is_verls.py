"""verl's losses, from their definitions on padded tensors, against the token weights of the same objectives.

verl is not installed here: the formulas are those of its trainer/ppo/core_algos.py, written down in this test.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from entropy_probe.losses.gmpo import GMPO
from entropy_probe.losses.kl import KLEstimator, KLTerm
from entropy_probe.losses.length_weights import LossAggregation, length_weights
from entropy_probe.losses.objective import BonusAverage, EntropyBonus, Objective
from entropy_probe.losses.ppo_clip import PPOClip
from entropy_probe.losses.rows import LossRows
from loss_rows import LENGTHS, WIDTH, flat, padded, rows_of

TOLERANCE = 1e-12


def averaged(losses: Tensor, mask: Tensor, mode: str) -> Tensor:
    """verl's agg_loss over one mini-batch, from 0.7.1 on."""
    if mode == "token-mean":
        return (losses * mask).sum() / mask.sum()
    of_rows = (losses * mask).sum(-1)
    if mode == "seq-mean-token-mean":
        return (of_rows / mask.sum(-1)).mean()
    if mode == "seq-mean-token-sum":
        return of_rows.mean()
    return of_rows.mean() / mask.shape[-1]


def averaged_before(losses: Tensor, mask: Tensor, micro_batches: list[list[int]]) -> Tensor:
    """seq-mean-token-sum-norm up to verl 0.7.0: a micro-batch's sum over the width, and its actor's mean over micro-batches."""
    sums = [(losses[rows] * mask[rows]).sum() / mask.shape[-1] for rows in micro_batches]
    return torch.stack(sums).mean()


def weights_of(mode: str, rows: LossRows) -> Tensor:
    ones = torch.ones_like(rows.log_probs)
    return {
        "token-mean": ones / rows.mask.sum(),
        "seq-mean-token-mean": rows.at_tokens(1.0 / (rows.counts * len(LENGTHS))),
        "seq-mean-token-sum": ones / len(LENGTHS),
        "seq-mean-token-sum-norm": ones / (WIDTH * len(LENGTHS)),
    }[mode]


def dual_clip(log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    ratio = torch.exp(torch.clamp(log_probs - old, min=-20.0, max=20.0))
    first, second = -advantages * ratio, -advantages * torch.clamp(ratio, 1 - 0.2, 1 + 0.28)
    larger = torch.maximum(first, second)
    return torch.where(advantages < 0, torch.min(larger, -advantages * 3.0), larger)


def gspo(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The straight-through form: the response's ratio, with the token's gradient."""
    mean = ((log_probs - old) * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    ratio = torch.exp(torch.clamp(log_probs - log_probs.detach() + mean.detach()[:, None], max=10.0))
    return torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - 0.03, 1 + 0.04))


def gradient(loss: Callable[[Tensor], Tensor], rows: LossRows) -> Tensor:
    log_probs = padded(rows.log_probs).requires_grad_()
    (found,) = torch.autograd.grad(loss(log_probs), log_probs)
    return -flat(found)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert float(expected.abs().max()) > 0
    assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
def test_dual_clip_under_every_average(mode: str) -> None:
    rows = rows_of(2, spread=1.2)
    old, advantages, mask = padded(rows.old), padded(rows.advantages), padded(rows.mask)
    expected = gradient(lambda p: averaged(dual_clip(p, old, advantages), mask, mode), rows)
    found = Objective(PPOClip(0.2, 0.28, dual_clip=3.0)).token_weights(rows, weights_of(mode, rows)).reward
    assert_same(found, expected)
    without = Objective(PPOClip(0.2, 0.28)).token_weights(rows, weights_of(mode, rows)).reward
    assert float((without - expected).abs().max()) > 0.01 * float(expected.abs().max())


def test_the_norm_is_length_weights_own_and_that_of_older_verl_times_the_rows_of_a_micro_batch() -> None:
    rows = rows_of(7, spread=1.2)
    old, advantages, mask = padded(rows.old), padded(rows.advantages), padded(rows.mask)
    weights = length_weights(
        rows.tokens_in_loss, (2, 3, 1), LossAggregation.SEQ_MEAN_TOKEN_SUM_NORM, max_completion_length=WIDTH
    )
    found = Objective(PPOClip(0.2, 0.28, dual_clip=3.0)).token_weights(rows, rows.at_tokens(weights) / 3).reward
    now = gradient(lambda p: averaged(dual_clip(p, old, advantages), mask, "seq-mean-token-sum-norm"), rows)
    assert_same(found, now)
    for micro_batches in ([[0, 1, 2], [3, 4, 5]], [[0, 4], [1, 2], [3, 5]]):
        before = gradient(lambda p: averaged_before(dual_clip(p, old, advantages), mask, micro_batches), rows)  # noqa: B023
        assert_same(found * len(micro_batches[0]), before)


def test_gspo_in_its_straight_through_form_is_the_response_ratio() -> None:
    from entropy_probe.losses.token_loss import RatioLevel

    rows = rows_of(3)
    old, advantages, mask = padded(rows.old), padded(rows.advantages), padded(rows.mask)
    expected = gradient(lambda p: averaged(gspo(p, old, advantages, mask), mask, "seq-mean-token-mean"), rows)
    loss = PPOClip(0.03, 0.04, level=RatioLevel.SEQUENCE)
    assert_same(Objective(loss).token_weights(rows, weights_of("seq-mean-token-mean", rows)).reward, expected)


def test_gmpo() -> None:
    rows = rows_of(4)
    old, advantages, mask = padded(rows.old), padded(rows.advantages), padded(rows.mask)

    def loss(log_probs: Tensor) -> Tensor:
        difference, sign = log_probs - old, torch.sign(advantages)
        bounded = torch.clamp(difference, -0.4, 0.4)
        kept = sign * torch.min(sign * difference, sign * bounded)
        ratio = torch.exp((kept * mask).sum(-1) / mask.sum(-1))
        return (-(advantages * mask).sum(-1) / mask.sum(-1) * ratio).mean()

    found = Objective(GMPO()).token_weights(rows, weights_of("seq-mean-token-mean", rows)).reward
    assert_same(found, gradient(loss, rows))


KL: dict[KLEstimator, Callable[[Tensor, Tensor], Tensor]] = {
    KLEstimator.K1: lambda p, ref: p - ref,
    KLEstimator.ABS: lambda p, ref: (p - ref).abs(),
    KLEstimator.K2: lambda p, ref: 0.5 * (p - ref).square(),
    KLEstimator.K3: lambda p, ref: torch.exp(ref - p) - (ref - p) - 1,
    KLEstimator.VERL_K3: lambda p, ref: torch.clamp(
        torch.exp(torch.clamp(ref - p, -20, 20)) - torch.clamp(ref - p, -20, 20) - 1, min=-10, max=10
    ),
    KLEstimator.K1_STRAIGHT_THROUGH: lambda p, ref: 0.5 * (p - ref).square() - (0.5 * (p - ref).square()).detach(),
    KLEstimator.K3_STRAIGHT_THROUGH: lambda p, ref: 0.5 * (p - ref).square() - (0.5 * (p - ref).square()).detach(),
}


@pytest.mark.parametrize("estimator", list(KLEstimator))
def test_every_estimator_of_the_kl_term(estimator: KLEstimator) -> None:
    rows = rows_of(5)
    # One token far from the reference, where verl's bound holds its gradient at zero.
    far = rows.ref_log_probs.clone()
    far[0] = rows.log_probs[0] + 4.0
    rows = LossRows(LENGTHS, rows.log_probs, rows.advantages, rows.mask, ref_log_probs=far)
    ref, mask = padded(far), padded(rows.mask)
    expected = gradient(lambda p: 0.01 * averaged(KL[estimator](p, ref), mask, "token-mean"), rows)
    objective = Objective(PPOClip(), kl=KLTerm(0.01, estimator))
    found = objective.token_weights(rows, weights_of("token-mean", rows)).kl
    assert found is not None
    assert_same(found, expected)
    assert (float(found[0]) == 0.0) is (estimator is KLEstimator.VERL_K3)


def test_the_bonus_by_the_losss_own_average() -> None:
    rows = rows_of(6)
    entropies = padded(rows.entropies).requires_grad_()
    mask = padded(rows.mask)
    (expected,) = torch.autograd.grad(-0.003 * averaged(entropies, mask, "seq-mean-token-mean"), entropies)
    objective = Objective(PPOClip(), bonus=EntropyBonus(0.003, BonusAverage.LOSS))
    found = objective.token_weights(rows, weights_of("seq-mean-token-mean", rows)).bonus
    assert found is not None
    assert_same(found, -flat(expected))
