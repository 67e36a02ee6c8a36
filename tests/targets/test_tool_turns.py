"""Responses of several turns: tokens of a tool are context, and the entropy is that of the policy's own tokens.

Every trajectory is enumerated: the policy draws a token, a tool answers with two that depend on it, the policy draws two more.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import enumerable
from entropy_probe import InputError, Rollout, group_rollouts
from entropy_probe.model.padding import pad_right
from entropy_probe.model.policy import Policy
from entropy_probe.realized.resampling import plan_resampling
from entropy_probe.targets.base import Sample
from entropy_probe.targets.choices import EntropyUnit, Estimator
from entropy_probe.targets.entropy import EntropyTarget
from enumerable import EnumerablePolicy
from support import tiny_model

TOKENS = 3
DRAWN = (True, False, False, True, True)


def tool(token: int) -> tuple[int, int]:
    return (2, 1) if token == 1 else (1, 0)


POLICY = EnumerablePolicy(contexts=2, tokens=TOKENS, seed=3)
ROWS = [
    Rollout("a", enumerable.prompt_of(POLICY, 0), (first, *tool(first), *rest), 0.0, sampled=DRAWN)
    for first, *rest in itertools.product(range(TOKENS), repeat=3)
]


def trajectory(row: Rollout, *, every: bool = False) -> tuple[Tensor, Tensor]:
    """log π and H at the tokens that the policy drew, or at all, with the graph; written token by token."""
    (prompt,) = row.prompt_ids
    previous, log_probs, entropies = prompt, [], []
    for token, drawn in zip(row.response_ids, DRAWN, strict=True):
        log_p = torch.log_softmax(POLICY.table[prompt - TOKENS, previous] + POLICY.shared[previous], dim=-1)
        if drawn or every:
            log_probs.append(log_p[token])
            entropies.append(-(log_p.exp() * log_p).sum())
        previous = token
    return torch.stack(log_probs), torch.stack(entropies)


def gradients(values: Tensor) -> Tensor:
    return torch.stack([enumerable.flat_gradient(value, POLICY) for value in values])


def expected_x(estimator: Estimator, rows: list[Rollout], *, every: bool = False) -> tuple[Tensor, Tensor]:
    """E[X] over every pair of trajectories, and −∇H."""
    found = [trajectory(row, every=every) for row in rows]
    own = [trajectory(row)[0].sum() for row in rows]
    probabilities = torch.stack(own).exp().detach()
    assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-12)
    of_log_probs, of_entropies = ([gradients(values[k]) for values in found] for k in (0, 1))
    mean = torch.zeros_like(of_log_probs[0][0])
    target = EntropyTarget(estimator)
    for i, j in itertools.product(range(len(rows)), repeat=2):
        lengths = [len(found[k][0]) for k in (i, j)]
        sample = Sample(
            (2,),
            lengths,
            torch.stack([found[k][0].sum() for k in (i, j)]).detach(),
            torch.cat([found[k][1] for k in (i, j)]).detach(),
        )
        pair = target.coefficients(sample).at_tokens(lengths)
        x = pair.log_probs @ torch.cat([of_log_probs[i], of_log_probs[j]])
        if pair.entropies is not None:
            x = x + pair.entropies @ torch.cat([of_entropies[i], of_entropies[j]])
        mean += probabilities[i] * probabilities[j] * x
    entropy = -torch.stack([score.exp() * score for score in own]).sum()
    return mean, -enumerable.flat_gradient(entropy, POLICY)


@pytest.mark.parametrize("estimator", Estimator)
def test_x_is_unbiased_for_the_entropy_of_what_the_policy_drew(estimator: Estimator) -> None:
    found, expected = expected_x(estimator, ROWS)
    assert float((found - expected).norm()) < 1e-12 * float(expected.norm())


@pytest.mark.parametrize("estimator", Estimator)
def test_tool_tokens_that_are_scored_as_drawn_bias_it(estimator: Estimator) -> None:
    """The planted bug: the mask is not looked at."""
    found, expected = expected_x(estimator, ROWS, every=True)
    assert float((found - expected).norm()) > 0.05 * float(expected.norm())


def test_forwards_measure_the_drawn_tokens_after_the_whole_context() -> None:
    batch = group_rollouts([*ROWS, *(replace(row, prompt_id="b") for row in ROWS)])
    measured = Policy(POLICY, microbatch_size=7).measure(batch.responses)
    found = [trajectory(row) for row in batch.responses]
    assert measured.log_probs is not None
    assert measured.entropies is not None
    assert torch.allclose(measured.log_probs, torch.cat([p for p, _ in found]).detach(), rtol=1e-12, atol=0)
    assert torch.allclose(measured.entropies, torch.cat([h for _, h in found]).detach(), rtol=1e-12, atol=0)
    assert torch.allclose(measured.scores, torch.stack([p.sum() for p, _ in found]).detach(), rtol=1e-12, atol=0)
    assert batch.mean_length == 3.0
    ratio = EntropyTarget(Estimator.SCORE, EntropyUnit.PER_TOKEN).ratio(Sample.of(batch, measured))
    assert ratio is not None
    assert ratio.mean_length == 3.0


def test_padded_rows_keep_tool_tokens_in_the_context() -> None:
    padded = pad_right(ROWS[:2], torch.device("cpu"))
    assert padded.input_ids.shape == (2, 6)
    assert len(padded.targets) == 6


def test_fresh_responses_are_refused_where_a_tool_answered() -> None:
    rows = [Rollout(f"p{n // 2}", (5, 6), (7, 8, 9, 4, 1), 0.0, sampled=DRAWN) for n in range(4)]
    with pytest.raises(InputError, match="'p0' has tokens that the policy did not draw"):
        plan_resampling(Policy(tiny_model()), group_rollouts(rows), None, 0, 32)
