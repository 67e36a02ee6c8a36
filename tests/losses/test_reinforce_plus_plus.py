"""REINFORCE++: advantages a token, whitened over the batch, under verl's loss and under OpenRLHF's.

Neither is installed here. verl's advantages are those of its trainer/ppo/core_algos.py, and its loss has dual clip;
OpenRLHF's loss (models/loss.py) has none.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from entropy_probe.losses.named import NAMED, LossConstants, LossName
from entropy_probe.losses.objective import Objective
from entropy_probe.losses.rows import LossRows
from loss_rows import LENGTHS, flat, padded, rows_of

TOLERANCE = 1e-12
EPSILON, DUAL = 0.2, 3.0


def advantages_of(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Discounted returns, carried past tokens that the mask leaves out, whitened over all that it keeps."""
    returns, running = torch.zeros_like(rewards), torch.zeros(len(rewards), dtype=rewards.dtype)
    for t in reversed(range(rewards.shape[1])):
        now = rewards[:, t] + gamma * running
        returns[:, t] = now * mask[:, t]
        running = now * mask[:, t] + running * (1 - mask[:, t])
    kept = returns[mask > 0]
    return (returns - kept.mean()) * torch.rsqrt(kept.var() + 1e-8) * mask


def rows_with_token_advantages() -> LossRows:
    rows = rows_of(12, spread=1.2)
    mask = padded(rows.mask)
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1] = torch.tensor(
        [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    ).double()
    return replace(rows, advantages=flat(advantages_of(rewards, mask, 0.9)))


def gradient(rows: LossRows, *, dual: bool) -> Tensor:
    old, advantages, mask = padded(rows.old), padded(rows.advantages), padded(rows.mask)
    log_probs = padded(rows.log_probs).requires_grad_()
    ratio = torch.exp(torch.clamp(log_probs - old, -20.0, 20.0))
    kept = torch.min(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages)
    if dual:
        kept = torch.where(advantages < 0, torch.max(kept, DUAL * advantages), kept)
    (found,) = torch.autograd.grad(-(kept * mask).sum() / mask.sum(), log_probs)
    return -flat(found)


def found(rows: LossRows, name: LossName, constants: LossConstants) -> Tensor:
    average = torch.ones_like(rows.mask) / rows.mask.sum()
    return Objective(NAMED[name].make(constants)).token_weights(rows, average).reward


OPENRLHF = (LossName.REINFORCE_PLUS_PLUS, LossConstants(EPSILON, EPSILON))
VERL = (LossName.PPO, LossConstants(EPSILON, EPSILON, dual_clip=DUAL))


@pytest.mark.parametrize("dual", [False, True])
def test_it_is_the_trainers_loss_with_an_advantage_a_token(dual: bool) -> None:
    rows = rows_with_token_advantages()
    expected = gradient(rows, dual=dual)
    largest = float(expected.abs().max())
    own, other = (VERL, OPENRLHF) if dual else (OPENRLHF, VERL)
    assert float((found(rows, *own) - expected).abs().max()) <= TOLERANCE * largest
    assert float((found(rows, *other) - expected).abs().max()) > 0.01 * largest


def test_one_advantage_a_response_is_another_update() -> None:
    rows = rows_with_token_advantages()
    flattened = replace(rows, advantages=rows.at_tokens(rows.averaged(rows.advantages)))
    expected = gradient(rows, dual=False)
    assert float((found(flattened, *OPENRLHF) - expected).abs().max()) > 0.01 * float(expected.abs().max())
