"""Every outcome of one prompt of an enumerable policy, with its X and Y: exact moments, and replicates by look-up.

A prompt draws a context and G responses. X_n and Y_n do not depend on the order of the responses, so an outcome is a context
and a multiset of responses, with probability (1/contexts) G! / Π_k m_k! · Π_k p_k^m_k for multiplicities m. Coefficients are
the package's own; ∇log π, H_t and ∇H_t are those of ``tests/oracles/enumerable.py``, token by token. With M = E[X], N = E[Y]
and the second moments of one outcome everything about U_cross and the two-batch mean is exact:

    E U_cross = M · N       g = ½ (X · N + Y · M) − M · N,  ζ₁ = Var g       τ² = Var h − 2 ζ₁
    E h² = ½ tr(E[XXᵀ] E[YYᵀ]) + ½ tr(E[YXᵀ]²)
    Var X̄_E · Ȳ_U = Nᵀ Cov(X) N / B_E + Mᵀ Cov(Y) M / B_U + tr(Cov(X) Cov(Y)) / (B_E B_U)
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "oracles"))

from coverage import LIMIT, policy_rewards

import enumerable
from entropy_probe.common.arrays import FloatArray
from entropy_probe.losses.advantages import AdvantageRule, advantages_from_rewards
from entropy_probe.losses.length_weights import LengthWeight, length_weights
from entropy_probe.statistics.variance import variance_at
from entropy_probe.targets.base import Sample
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.entropy import EntropyTarget
from enumerable import EnumerablePolicy

IntArray = NDArray[np.int64]
TOKENS = 3


@dataclass(frozen=True)
class Subject:
    """An enumerable policy with rewards of its responses, [contexts, responses]."""

    name: str
    policy: EnumerablePolicy
    rewards: FloatArray


def make_subject(name: str, *, seed: int, contexts: int = 6, stationary: bool = False) -> Subject:
    """The policy and the rewards of ``coverage.policy_family``."""
    policy = EnumerablePolicy(contexts=contexts, tokens=TOKENS, seed=seed)
    tables = [enumerable.score_gradients(policy, n, LIMIT) for n in range(contexts)]
    p = np.exp(np.stack([s.numpy() for s, _ in tables]))
    lengths = np.array([float(len(r)) for r in enumerable.all_responses(TOKENS, LIMIT)])
    gradients = np.stack([g.numpy() for _, g in tables])
    return Subject(name, policy, policy_rewards(p, gradients, lengths, stationary, seed))


@dataclass(frozen=True)
class PromptLaw:
    """Outcomes of one prompt: probabilities [outcomes], X and Y [outcomes, parameters]; Y is 0 at G = 1 (no baseline).

    ``context`` [outcomes] and ``responses`` [outcomes, G] say which rollouts an outcome stands for.
    """

    probabilities: FloatArray
    context: IntArray
    responses: IntArray
    x: FloatArray
    y: FloatArray

    def draw(self, shape: tuple[int, ...], rng: np.random.Generator) -> IntArray:
        """Independent prompts, as outcomes."""
        cumulated = np.cumsum(self.probabilities)
        found = np.searchsorted(cumulated, rng.random(shape) * cumulated[-1], side="right")
        return np.minimum(found, len(cumulated) - 1).astype(np.int64)

    @property
    def mean_x(self) -> FloatArray:
        """E[X]: −∇H for an unbiased estimator."""
        return np.asarray(self.probabilities @ self.x)

    @property
    def mean_y(self) -> FloatArray:
        """E[Y]."""
        return np.asarray(self.probabilities @ self.y)

    def covariance(self, values: FloatArray) -> FloatArray:
        """Of one prompt's X or Y."""
        centred = values - self.probabilities @ values
        return np.asarray(centred.T @ (centred * self.probabilities[:, None]))

    def exact_parts(self) -> tuple[float, float]:
        """(ζ₁, τ²) of U_cross."""
        p, x, y = self.probabilities, self.x, self.y
        weighted = p[:, None]
        truth = float(self.mean_x @ self.mean_y)
        g = 0.5 * (x @ self.mean_y + y @ self.mean_x) - truth
        zeta1 = float(p @ g**2)
        xx, yy, yx = x.T @ (weighted * x), y.T @ (weighted * y), y.T @ (weighted * x)
        square = 0.5 * float((xx * yy).sum()) + 0.5 * float((yx * yx.T).sum())
        return zeta1, square - truth**2 - 2.0 * zeta1

    def exact_se(self, units: int) -> float:
        """Standard deviation of U_cross over batches of ``units`` prompts."""
        return math.sqrt(variance_at(units, *self.exact_parts()))


def prompt_law(subject: Subject, samples: int, estimator: Estimator) -> PromptLaw:
    """All outcomes with the package's coefficients; RLOO advantages and weights 1/(G T): E[Y_n] = E[(r − E r) ∇S / T]."""
    policy = subject.policy
    responses = enumerable.all_responses(TOKENS, LIMIT)
    lengths = [len(r) for r in responses]
    first = np.concatenate([[0], np.cumsum(lengths)])
    sets = np.array(list(itertools.combinations_with_replacement(range(len(responses)), samples)))
    ways = np.array([math.factorial(samples) / math.prod(math.factorial(int(m)) for m in np.bincount(s)) for s in sets])
    flat, sizes = sets.reshape(-1), [samples] * len(sets)
    chosen_lengths = [lengths[k] for k in flat]
    outcome = np.repeat(np.arange(len(sets)), samples)
    atoms = np.concatenate([np.arange(first[k], first[k + 1]) for k in flat])
    outcome_of_token = np.repeat(outcome, chosen_lengths)
    probabilities, xs, ys = [], [], []
    for n in range(policy.contexts):
        scores = enumerable.response_scores(policy, n, LIMIT).detach()
        terms = enumerable.token_terms(policy, n, LIMIT)
        log_prob_gradients = torch.cat([t.log_prob_gradients for t in terms]).numpy()
        entropy_gradients = torch.cat([t.entropy_gradients for t in terms]).numpy()
        score_gradients = np.add.reduceat(log_prob_gradients, first[:-1])
        entropies = torch.cat([t.entropies for t in terms])[torch.from_numpy(atoms)]
        found = EntropyTarget(estimator).coefficients(
            Sample(sizes, chosen_lengths, scores[torch.from_numpy(flat)], entropies)
        )
        if estimator is Estimator.SCORE:
            x = gathered(outcome, flat, found.log_probs.numpy(), len(sets), len(responses)) @ score_gradients
        else:
            assert found.entropies is not None
            shape = (len(sets), len(log_prob_gradients))
            x = gathered(outcome_of_token, atoms, found.log_probs.numpy(), *shape) @ log_prob_gradients
            x += gathered(outcome_of_token, atoms, found.entropies.numpy(), *shape) @ entropy_gradients
        y = np.zeros_like(x)
        if samples > 1:
            rewards = torch.from_numpy(subject.rewards[n][flat])
            advantages = advantages_from_rewards(rewards, sizes, AdvantageRule.RLOO)
            a = (advantages * length_weights(chosen_lengths, sizes, LengthWeight.GRPO)).numpy()
            y = gathered(outcome, flat, a, len(sets), len(responses)) @ score_gradients
        probabilities.append(ways * np.exp(scores.numpy())[sets].prod(axis=1) / policy.contexts)
        xs.append(x)
        ys.append(y)
    return PromptLaw(
        np.concatenate(probabilities),
        np.repeat(np.arange(policy.contexts), len(sets)),
        np.tile(sets, (policy.contexts, 1)),
        np.concatenate(xs),
        np.concatenate(ys),
    )


def gathered(rows: IntArray, columns: IntArray, values: FloatArray, count: int, width: int) -> FloatArray:
    """Values added up at (row, column) of a [count, width] table."""
    total = np.bincount(rows * width + columns, weights=values, minlength=count * width)
    return np.asarray(total.reshape(count, width))


def true_u_cross(subject: Subject) -> float:
    """−∇H · E[Y] by autograd through the exact entropy, and E[Y_n] = E[(r − E r) ∇S / T] written out."""
    policy, total_x, total_y = subject.policy, 0.0, 0.0
    lengths = np.array([float(len(r)) for r in enumerable.all_responses(TOKENS, LIMIT)])
    for n in range(policy.contexts):
        scores, gradients = enumerable.score_gradients(policy, n, LIMIT)
        p, rewards = scores.exp().numpy(), subject.rewards[n]
        total_x = total_x - enumerable.flat_gradient(enumerable.exact_entropy(policy, n, LIMIT), policy).numpy()
        total_y = total_y + (p * (rewards - p @ rewards) / lengths) @ gradients.numpy()
    return float(np.dot(total_x, total_y)) / policy.contexts**2


def narrowed(law: PromptLaw) -> PromptLaw:
    """The same without parameters that no outcome touches: kernels are the same, and cheaper."""
    used = (np.abs(law.x).max(axis=0) > 0) | (np.abs(law.y).max(axis=0) > 0)
    return PromptLaw(law.probabilities, law.context, law.responses, law.x[:, used], law.y[:, used])
