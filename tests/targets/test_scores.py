"""Coefficients of both losses: baselines, advantages and the published length weights."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_probe.data.groups import leave_one_out_mean
from entropy_probe.errors import InputError
from entropy_probe.losses.advantages import AdvantageRule, advantages_from_rewards, advantages_over_batch
from entropy_probe.losses.length_weights import LengthWeight, length_weights
from entropy_probe.targets.score import score_coefficients

groups = st.lists(st.lists(st.floats(-50, 50), min_size=2, max_size=6), min_size=1, max_size=5)


def flat(values: list[list[float]]) -> tuple[torch.Tensor, list[int]]:
    return torch.tensor(list(itertools.chain(*values)), dtype=torch.float64), [len(v) for v in values]


@settings(max_examples=50, deadline=None)
@given(groups)
def test_leave_one_out_and_coefficients_equal_loops(values: list[list[float]]) -> None:
    scores, sizes = flat(values)
    means = [
        sum(v for h, v in enumerate(group) if h != g) / (len(group) - 1) for group in values for g in range(len(group))
    ]
    assert leave_one_out_mean(scores, sizes).tolist() == pytest.approx(means, abs=1e-10)
    expected = [(v - m) / len(g) for (v, g), m in zip(((v, g) for g in values for v in g), means, strict=True)]
    assert score_coefficients(scores, sizes).tolist() == pytest.approx(expected, abs=1e-10)


@settings(max_examples=50, deadline=None)
@given(groups)
def test_advantages_equal_the_published_formulas(values: list[list[float]]) -> None:
    rewards, sizes = flat(values)
    for rule, formula in (
        (AdvantageRule.DR_GRPO, lambda g, v: v - statistics.fmean(g)),
        (AdvantageRule.GRPO, lambda g, v: (v - statistics.fmean(g)) / (statistics.stdev(g) + 1e-4)),
        (AdvantageRule.RLOO, lambda g, v: v - (sum(g) - v) / (len(g) - 1)),
    ):
        expected = [formula(group, value) for group in values for value in group]
        assert advantages_from_rewards(rewards, sizes, rule).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_advantages_over_the_batch_share_one_deviation() -> None:
    rewards, sizes = [1.0, 2.0, 5.0, 0.0, 0.0], [3, 2]
    deviation = statistics.stdev(rewards) + 1e-4
    expected = [r - statistics.mean(group) for group in (rewards[:3], rewards[3:]) for r in group]
    found = advantages_over_batch(torch.tensor(rewards, dtype=torch.float64), sizes)
    assert found.tolist() == pytest.approx([a / deviation for a in expected])


LENGTHS, SIZES = [3, 5, 2, 4, 4, 6], [2, 2, 2]
SCORES = torch.tensor([0.3, -1.0, 0.7, 2.0, -0.4, 1.1], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0], dtype=torch.float64)


def mean_over_prompts(weights: torch.Tensor) -> float:
    return float((ADVANTAGES * weights * SCORES).sum() / 3)


def test_weights_give_the_trainers_losses() -> None:
    """TRL's loss expressions with ratio 1, over per-token values that sum to S."""
    tokens = [[float(s) / t] * t for s, t in zip(SCORES, LENGTHS, strict=True)]
    weighted = [sum(a * v for v in row) for a, row in zip(ADVANTAGES.tolist(), tokens, strict=True)]
    batch = len(LENGTHS)
    grpo = sum(w / t for w, t in zip(weighted, LENGTHS, strict=True)) / batch
    dr_grpo = sum(weighted) / (batch * 7)
    dapo = sum(weighted) / sum(LENGTHS)
    halves = [(0, 1, 2), (3, 4, 5)]
    bnpo = sum(sum(weighted[i] for i in half) / sum(LENGTHS[i] for i in half) for half in halves) / 2
    for rule, expected, extra in (
        (LengthWeight.GRPO, grpo, {}),
        (LengthWeight.DR_GRPO, dr_grpo, {"max_completion_length": 7}),
        (LengthWeight.DAPO, dapo, {}),
        (LengthWeight.BNPO, bnpo, {"micro_batches": [0, 0, 0, 1, 1, 1]}),
        (LengthWeight.BNPO, dapo, {}),
        (LengthWeight.DAPO, sum(weighted) / 100, {"window_tokens": 100.0}),
    ):
        found = length_weights(LENGTHS, SIZES, rule, **extra)
        assert mean_over_prompts(found) == pytest.approx(expected, rel=1e-12), rule


def test_the_guides_weight_is_the_prompts_longest_response() -> None:
    expected = [1 / (2 * longest) for longest in (5, 5, 4, 4, 6, 6)]
    assert length_weights(LENGTHS, SIZES, LengthWeight.GUIDE).tolist() == pytest.approx(expected)


def test_missing_constants_and_single_responses_are_refused() -> None:
    with pytest.raises(InputError, match="max_completion_length"):
        length_weights(LENGTHS, SIZES, LengthWeight.DR_GRPO)
    with pytest.raises(InputError, match="at least as long"):
        length_weights(LENGTHS, SIZES, LengthWeight.DR_GRPO, max_completion_length=5)
    with pytest.raises(InputError, match="at least two"):
        leave_one_out_mean(torch.ones(3), [2, 1])
    with pytest.raises(InputError, match="given"):
        advantages_from_rewards(torch.ones(4), [2, 2], AdvantageRule.GIVEN)
