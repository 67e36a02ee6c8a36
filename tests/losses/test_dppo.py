"""DPPO as prime-rl, SkyRL and verl define it, on padded tensors, against the token weights of the same objective.

None of them is installed here: the formulas are those of prime-rl's trainer/rl/loss.py (``default_loss_fn``), SkyRL's
utils/ppo_utils.py (``dppo_policy_loss``) and verl's trainer/ppo/core_algos.py (``compute_policy_loss_dppo_tv``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from entropy_probe.losses.dppo import DPPO
from entropy_probe.losses.objective import Objective
from entropy_probe.losses.rows import LossRows
from entropy_probe.losses.token_loss import TokenLoss
from loss_rows import flat, padded, rows_of

TOLERANCE = 1e-12
LOW, HIGH, TAU, LARGEST = 0.15, 0.1, 0.03, 1.4


def prime_rl(log_probs: Tensor, rows: LossRows, weights: Tensor) -> Tensor:
    """Sums over tokens in the loss, divided by their number; weights multiply both terms."""
    old, advantages, mask = padded(rows.old), padded(rows.advantages), padded(rows.mask).bool()
    log_ratio = log_probs - old
    difference = torch.exp(log_probs) - torch.exp(old)
    invalid = torch.where(advantages > 0, difference > HIGH, difference < -LOW)
    policy = (mask & ~invalid) * advantages * torch.exp(log_ratio)
    return ((-policy + TAU * (mask * log_ratio**2)) * weights).sum() / mask.sum()


def skyrl(log_probs: Tensor, rows: LossRows, _: Tensor) -> Tensor:
    old, advantages, mask = padded(rows.old), padded(rows.advantages), padded(rows.mask)
    difference = torch.exp(log_probs.detach()) - torch.exp(old)
    keep = torch.ones_like(advantages)
    keep[(advantages > 0) & (difference > HIGH)] = 0.0
    keep[(advantages < 0) & (-difference > LOW)] = 0.0
    losses = -(torch.exp(torch.clamp(log_probs - old, -20.0, 20.0)) * advantages * keep)
    return (losses * mask).sum() / mask.sum()


def verl(log_probs: Tensor, rows: LossRows, _: Tensor) -> Tensor:
    """A largest ratio, held fixed."""
    old, advantages, mask = padded(rows.old), padded(rows.advantages), padded(rows.mask)
    ratio = torch.clamp(torch.exp(torch.clamp(log_probs - old, -20.0, 20.0)), max=LARGEST).detach()
    difference = torch.exp(log_probs) - torch.exp(old)
    valid = torch.where(advantages > 0, difference <= HIGH, difference >= -LOW).detach().double()
    return (-advantages * ratio * log_probs * valid * mask).sum() / mask.sum()


CASES: dict[str, tuple[Callable[[Tensor, LossRows, Tensor], Tensor], DPPO]] = {
    "prime-rl": (prime_rl, DPPO(LOW, HIGH, kl_tau=TAU)),
    "SkyRL": (skyrl, DPPO(LOW, HIGH)),
    "verl": (verl, DPPO(LOW, HIGH, largest_ratio=LARGEST)),
}


def difference(name: str, loss: TokenLoss | None = None, *, weighted: bool = False) -> float:
    """Between the trainer's gradient and the objective's, relative to the largest."""
    theirs, own = CASES[name]
    rows = rows_of(11, spread=0.9)
    # The clamp keeps old log-probs those of probabilities; one advantage is 0, which has no sign.
    rows = replace(rows, old_log_probs=rows.old.clamp(max=-1e-3), advantages=rows.advantages.clone())
    rows.advantages[rows.row_of_token == 3] = 0.0
    if weighted:
        rows = replace(rows, token_weights=torch.linspace(0.5, 2.0, len(rows.mask), dtype=torch.float64))
    weights = padded(torch.ones_like(rows.mask) if rows.token_weights is None else rows.token_weights)
    log_probs = padded(rows.log_probs).requires_grad_()
    (gradient,) = torch.autograd.grad(theirs(log_probs, rows, weights), log_probs)
    expected = -flat(gradient)
    found = Objective(loss or own).token_weights(rows, torch.ones_like(rows.mask) / rows.mask.sum()).reward
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", list(CASES))
def test_dppo_is_the_trainers(name: str) -> None:
    assert difference(name) <= TOLERANCE


def test_a_tokens_weight_multiplies_the_squared_log_ratio_too() -> None:
    assert difference("prime-rl", weighted=True) <= TOLERANCE


@dataclass(frozen=True)
class MaskedThroughout(DPPO):
    """A bug: where the mask is 0 the pull back to the sampler is gone too."""

    def __call__(self, log_probs: Tensor, rows: LossRows) -> Tensor:
        whole = super().__call__(log_probs, rows)
        reward = DPPO(self.epsilon_low, self.epsilon_high)(log_probs, rows)
        return torch.where(reward == 0.0, torch.zeros_like(whole), whole)


PLANTED: dict[str, DPPO] = {
    "thresholds swapped": DPPO(HIGH, LOW, kl_tau=TAU),
    "no pull back": DPPO(LOW, HIGH),
    "half of the pull back": DPPO(LOW, HIGH, kl_tau=TAU / 2),
    "pull back masked": MaskedThroughout(LOW, HIGH, kl_tau=TAU),
    "no mask": DPPO(1.0, 1.0, kl_tau=TAU),
    "a largest ratio": DPPO(LOW, HIGH, kl_tau=TAU, largest_ratio=LARGEST),
}


@pytest.mark.parametrize("bug", list(PLANTED))
def test_a_planted_bug_is_seen(bug: str) -> None:
    assert difference("prime-rl", PLANTED[bug]) > 1e-3
