"""The realised change by decision: unbiased by enumeration, its linear term is −X̄ · Δθ, its error covers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import enumerable
from entropy_probe.statistics import by_decision
from entropy_probe.statistics.by_decision import TokensOfPrompts, change_by_decision
from entropy_probe.targets.base import Sample
from entropy_probe.targets.choices import EntropyUnit, Estimator
from entropy_probe.targets.entropy import EntropyTarget
from enumerable import EnumerablePolicy

Array = NDArray[np.float64]
LIMIT, TOKENS = 3, 3
RESPONSES = enumerable.all_responses(TOKENS, LIMIT)
BEFORE, AFTER = (EnumerablePolicy(contexts=2, tokens=TOKENS, seed=seed, scale=0.6) for seed in (1, 2))


def values(policy: EnumerablePolicy, context: int) -> list[tuple[Array, Array]]:
    """H_s and log π(y_s) of every response; written token by token."""
    found = []
    for response in RESPONSES:
        previous, rows = TOKENS + context, []
        for token in response:
            log_p = torch.log_softmax(policy.table[context, previous] + policy.shared[previous], dim=-1).detach()
            rows.append((float(-(log_p.exp() * log_p).sum()), float(log_p[token])))
            previous = token
        found.append((np.array([h for h, _ in rows]), np.array([p for _, p in rows])))
    return found


OLD, NEW = ([values(policy, n) for n in range(2)] for policy in (BEFORE, AFTER))


def estimate(picks: list[list[int]], new: Any = NEW, **options: Any) -> by_decision.ChangeByDecision:
    """From these responses of both prompts."""
    chosen = [(n, k) for n, of_prompt in enumerate(picks) for k in of_prompt]
    tokens = TokensOfPrompts([len(p) for p in picks], [len(RESPONSES[k]) for _, k in chosen])
    entropies, log_probs = (
        tuple(np.concatenate([of[n][k][i] for n, k in chosen]) for of in (OLD, new)) for i in (0, 1)
    )
    return change_by_decision(tokens, entropies, log_probs, **options)  # type: ignore[arg-type]


def mean_over_pairs(of: Callable[[list[int]], float], context: int) -> float:
    probabilities = np.exp([p.sum() for _, p in OLD[context]])
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)
    pairs = itertools.product(range(len(RESPONSES)), repeat=2)
    return float(sum(probabilities[i] * probabilities[j] * of([i, j]) for i, j in pairs))


def expected_change() -> float:
    """E of ΔH: the mean over prompts, each over every pair of its responses."""
    return float(np.mean([mean_over_pairs(lambda pair, n=n: own_change(pair, n), n) for n in range(2)]))


def own_change(pair: list[int], context: int) -> float:
    """One prompt's: ΔH is a mean over prompts, of which the other gives what it gives."""
    other = [0, 1]
    both = estimate([pair, other] if context == 0 else [other, pair]).delta_h
    return 2.0 * both - alone(other, 1 - context)


def alone(pair: list[int], context: int) -> float:
    tokens = TokensOfPrompts([2], [len(RESPONSES[k]) for k in pair])
    entropies, log_probs = (
        tuple(np.concatenate([of[context][k][i] for k in pair]) for of in (OLD, NEW)) for i in (0, 1)
    )
    return float(by_decision._changes(tokens, entropies, log_probs)[0])  # type: ignore[arg-type]


def exact_change() -> float:
    found = [float(enumerable.exact_entropy(policy, n, LIMIT).detach()) for policy in (BEFORE, AFTER) for n in range(2)]
    return (found[2] + found[3] - found[0] - found[1]) / 2


def test_it_is_unbiased_whatever_the_step() -> None:
    assert abs(exact_change()) > 0.05
    assert expected_change() == pytest.approx(exact_change(), abs=1e-13)


def own_response_in_the_baseline(own: Array) -> Array:
    return np.broadcast_to(own.mean(0), own.shape)


def test_a_baseline_that_holds_the_response_itself_biases_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_decision, "others_mean", own_response_in_the_baseline)
    assert abs(expected_change() - exact_change()) > 1e-3


def test_weights_that_end_with_the_response_bias_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: past its end a response no longer weighs the baseline."""

    def cut(log_ratios: Array) -> Array:
        weights = prefix_weights(log_ratios)
        return np.where(log_ratios == 0.0, 1.0, weights)

    prefix_weights = by_decision.prefix_weights
    monkeypatch.setattr(by_decision, "prefix_weights", cut)
    assert abs(expected_change() - exact_change()) > 1e-3


@pytest.mark.parametrize("unit", EntropyUnit)
def test_its_derivative_is_minus_x_along_the_step(unit: EntropyUnit) -> None:
    """−X̄ · Δθ by Rao-Blackwell's own coefficients, against a finite difference of the estimate."""
    picks = [[0, 4, 7], [3, 5, 10]]
    chosen = [(n, k) for n, of_prompt in enumerate(picks) for k in of_prompt]
    lengths = [len(RESPONSES[k]) for _, k in chosen]
    entropies = torch.from_numpy(np.concatenate([OLD[n][k][0] for n, k in chosen]))
    sample = Sample([3, 3], lengths, token_entropies=entropies)
    target = EntropyTarget(Estimator.RAO_BLACKWELL, unit)
    pair = target.coefficients(sample, target.ratio(sample)).at_tokens(lengths)
    size = 1e-5
    moved = []
    for sign in (1.0, -1.0):
        nearby = EnumerablePolicy(contexts=2, tokens=TOKENS, seed=1, scale=0.6)
        with torch.no_grad():
            for own, other in zip(nearby.parameters(), AFTER.parameters(), strict=True):
                own += sign * size * (other - own)
        moved.append([values(nearby, n) for n in range(2)])
    ahead, behind = (estimate(picks, new, per_token=unit is EntropyUnit.PER_TOKEN).delta_h for new in moved)
    d_log_probs, d_entropies = (
        torch.from_numpy(np.concatenate([moved[0][n][k][i] - moved[1][n][k][i] for n, k in chosen])) / (2 * size)
        for i in (1, 0)
    )
    assert pair.entropies is not None
    expected = -float(pair.log_probs @ d_log_probs + pair.entropies @ d_entropies) / 2
    assert abs(expected) > 1e-2
    assert (ahead - behind) / (2 * size) == pytest.approx(expected, rel=1e-7)


def test_no_step_changes_nothing() -> None:
    found = estimate([[0, 4], [3, 5]], OLD)
    assert (found.delta_h, found.se) == (0.0, 0.0)
    assert found.entropy_after == found.entropy_before


@pytest.mark.parametrize("per_token", [False, True])
def test_its_error_covers(per_token: bool) -> None:
    """64 prompts, four responses each, of contexts at random: 95 % intervals, so many binomial errors wide."""
    generator = np.random.default_rng(0)
    probabilities = [np.exp([p.sum() for _, p in OLD[n]]) for n in range(2)]
    lengths = [
        float(np.exp([p.sum() for _, p in of[n]]) @ [len(r) for r in RESPONSES]) for of in (OLD, NEW) for n in range(2)
    ]
    entropies = [
        float(enumerable.exact_entropy(policy, n, LIMIT).detach()) for policy in (BEFORE, AFTER) for n in range(2)
    ]
    truth = exact_change()
    if per_token:
        truth = sum(entropies[2:]) / sum(lengths[2:]) - sum(entropies[:2]) / sum(lengths[:2])
    inside, runs = 0, 400
    for _ in range(runs):
        contexts = generator.integers(2, size=64)
        chosen = [(n, k) for n in contexts for k in generator.choice(len(RESPONSES), size=4, p=probabilities[n])]
        tokens = TokensOfPrompts([4] * 64, [len(RESPONSES[k]) for _, k in chosen])
        columns = (tuple(np.concatenate([of[n][k][i] for n, k in chosen]) for of in (OLD, NEW)) for i in (0, 1))
        found = change_by_decision(tokens, *columns, per_token=per_token)  # type: ignore[arg-type]
        inside += abs(found.delta_h - truth) <= 2.0 * found.se
    assert abs(inside / runs - 0.95) < 4 * np.sqrt(0.95 * 0.05 / runs)
