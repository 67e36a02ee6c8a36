"""Rows that one enumerable policy drew, for the entropy of another: exact expectations, and batches drawn at random."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

import enumerable
from entropy_probe.common.arrays import FloatArray
from entropy_probe.data.importance import Importance
from entropy_probe.losses.advantages import AdvantageRule, advantages_from_rewards
from entropy_probe.losses.length_weights import LengthWeight, length_weights
from entropy_probe.targets.base import Ratio, Sample, Target, TokenPair
from entropy_probe.targets.choices import EntropyUnit
from entropy_probe.targets.entropy import EntropyTarget
from enumerable import EnumerablePolicy, TokenTerms

LIMIT = 3
Coefficients = Callable[[Target, Sample, Ratio | None], TokenPair]


def reward_of(response: tuple[int, ...]) -> float:
    return float(len(response) == 2) + 0.5 * float(response[-1] == 1)


def token_log_probs(policy: EnumerablePolicy, context: int) -> list[Tensor]:
    """log π(y_t) of every response to a context; written token by token."""
    found = []
    for response in enumerable.all_responses(policy.tokens, LIMIT):
        previous, values = policy.tokens + context, []
        for token in response:
            logits = (policy.table[context, previous] + policy.shared[previous]).detach()
            values.append(torch.log_softmax(logits, dim=-1)[token])
            previous = token
        found.append(torch.stack(values))
    return found


@dataclass(frozen=True)
class TwoPolicies:
    """π, whose entropy is asked about, and q, which draws: q's tables are π's plus ``distance`` times normal noise."""

    seed: int = 0
    contexts: int = 1
    tokens: int = 3
    distance: float = 0.5

    @cached_property
    def policy(self) -> EnumerablePolicy:
        return EnumerablePolicy(self.contexts, self.tokens, seed=self.seed)

    @cached_property
    def sampler(self) -> EnumerablePolicy:
        other = EnumerablePolicy(self.contexts, self.tokens, seed=self.seed)
        generator = torch.Generator().manual_seed(99)
        with torch.no_grad():
            for table in other.parameters():
                table += self.distance * torch.randn(table.shape, generator=generator, dtype=table.dtype)
        return other

    @cached_property
    def responses(self) -> list[tuple[int, ...]]:
        return enumerable.all_responses(self.tokens, LIMIT)

    @cached_property
    def log_probs(self) -> list[list[Tensor]]:
        return [token_log_probs(self.policy, n) for n in range(self.contexts)]

    @cached_property
    def log_ratios(self) -> list[list[Tensor]]:
        samplers = [token_log_probs(self.sampler, n) for n in range(self.contexts)]
        return [[a - b for a, b in zip(*both, strict=True)] for both in zip(self.log_probs, samplers, strict=True)]

    @cached_property
    def probabilities(self) -> Tensor:
        """q of every response, [contexts, responses]."""
        found = [
            [(own.sum() - ratio.sum()).exp() for own, ratio in zip(*both, strict=True)]
            for both in zip(self.log_probs, self.log_ratios, strict=True)
        ]
        return torch.tensor(found, dtype=torch.float64)

    @cached_property
    def terms(self) -> list[list[TokenTerms]]:
        return [enumerable.token_terms(self.policy, n, LIMIT) for n in range(self.contexts)]

    def sample(
        self, rows: Sequence[tuple[int, int]], sizes: Sequence[int], *, by_prefix: bool, log_mean: float = 0.0
    ) -> Sample:
        """What a target sees of responses (context, index), with weights over exp(``log_mean``) and not over W̄."""
        return Sample(
            sizes,
            [len(self.responses[i]) for _, i in rows],
            torch.stack([self.log_probs[n][i].sum() for n, i in rows]),
            torch.cat([self.terms[n][i].entropies for n, i in rows]),
            torch.tensor([reward_of(self.responses[i]) for _, i in rows], dtype=torch.float64),
            Importance(tuple(self.log_ratios[n][i] for n, i in rows), log_mean, by_prefix),
        )

    @cached_property
    def _gradients(self) -> Tensor:
        """∇log π(y_t) and ∇H_t of every response, zeros past its end: [2, contexts, responses, LIMIT, parameters]."""

        def padded(name: str) -> Tensor:
            flat = [getattr(terms, name) for of_context in self.terms for terms in of_context]
            laid = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True)
            return laid.view(self.contexts, len(self.responses), *laid.shape[1:])

        return torch.stack([padded("log_prob_gradients"), padded("entropy_gradients")])

    def vectors(self, pair: TokenPair, rows: Sequence[tuple[int, int]]) -> Tensor:
        """Σ_t (l ∇log π + e ∇H_t) of every row, [rows, parameters]; l one a response or one a token."""
        lengths = [len(self.responses[i]) for _, i in rows]

        def padded(values: Tensor) -> Tensor:
            if pair.entropies is None and len(pair.log_probs) == len(rows):
                values = torch.repeat_interleave(values, torch.tensor(lengths))
            short = LIMIT - max(lengths)
            return torch.nn.functional.pad(
                torch.nn.utils.rnn.pad_sequence(list(values.split(lengths)), batch_first=True), (0, short)
            )

        weights = [padded(values) for values in (pair.log_probs, pair.entropies) if values is not None]
        contexts, places = torch.tensor(rows).T
        found = []
        for part in torch.arange(len(rows)).split(10000):
            of_rows = self._gradients[:, contexts[part], places[part]]
            found.append(sum((w[part][..., None] * g).sum(1) for w, g in zip(weights, of_rows, strict=False)))
        return torch.cat(found)

    def expected(
        self,
        target: Target,
        ratio: Ratio | None = None,
        *,
        samples: int = 2,
        by_prefix: bool = False,
        coefficients: Coefficients = lambda target, sample, ratio: target.coefficients(sample, ratio),
    ) -> Tensor:
        """E_q[W̄ X_n] of context 0 over every tuple of responses, W̄ being left out of the package's coefficients."""
        total = torch.zeros(self.terms[0][0].log_prob_gradients.shape[1], dtype=torch.float64)
        for chosen in itertools.product(range(len(self.responses)), repeat=samples):
            rows = [(0, i) for i in chosen]
            sample = self.sample(rows, [samples], by_prefix=by_prefix)
            x = self.vectors(coefficients(target, sample, ratio), rows).sum(0)
            total += self.probabilities[0][list(chosen)].prod() * x
        return total

    def truth(self, target: EntropyTarget, context: int = 0) -> tuple[Tensor, Ratio | None]:
        """−∇H of π, or −∇(H/T̄) with the true ratio."""
        entropy = enumerable.exact_entropy(self.policy, context, LIMIT)
        if target.unit is EntropyUnit.PER_RESPONSE:
            return -enumerable.flat_gradient(entropy, self.policy), None
        scores = enumerable.response_scores(self.policy, context, LIMIT)
        length = (scores.exp() * torch.tensor([float(len(r)) for r in self.responses])).sum()
        ratio = Ratio(float(entropy.detach() / length.detach()), float(length.detach()))
        return -enumerable.flat_gradient(entropy / length, self.policy), ratio

    def biases(self, target: EntropyTarget, most: int, *, by_prefix: bool) -> list[float]:
        """Exact bias of X̄ over the norm of −∇H for 1, 2, 4, … prompts, two responses each.

        E[Σ X_n / Σ W_n] = B E[X_1 / (W_1 + the others' sum)], whose law is that of a sum of B − 1 independent W.
        """
        truth, _ = self.truth(target)
        laws: dict[float, tuple[float, Tensor]] = {}
        size = len(self.responses)
        for i in range(size):
            for j in range(size):
                rows = [(0, i), (0, j)]
                sample = self.sample(rows, [2], by_prefix=by_prefix)
                x = self.vectors(target.coefficients(sample), rows).sum(0)
                assert sample.importance is not None
                weight = round(float(sample.importance.weights.mean()), 12)
                p = float(self.probabilities[0][[i, j]].prod())
                before = laws.get(weight, (0.0, torch.zeros_like(x)))
                laws[weight] = (before[0] + p, before[1] + p * x)
        own = np.array(list(laws))
        chances = np.array([p for p, _ in laws.values()])
        weighted = torch.stack([x for _, x in laws.values()]).numpy()
        found, sums, masses = [], np.zeros(1), np.ones(1)
        for prompts in range(1, most + 1):
            if prompts & (prompts - 1) == 0:
                inverse = (masses[None, :] / (own[:, None] + sums[None, :])).sum(axis=1)
                mean = prompts * (inverse @ weighted)
                found.append(float(np.linalg.norm(mean - truth.numpy()) / truth.norm()))
            together = np.round((sums[:, None] + own[None, :]).ravel(), 10)
            sums, places = np.unique(together, return_inverse=True)
            masses = np.bincount(places, weights=(masses[:, None] * chances[None, :]).ravel())
        return found

    @cached_property
    def update(self) -> FloatArray:
        """E_q[Y] over contexts, of RLOO advantages over lengths."""
        rewards = torch.tensor([reward_of(r) for r in self.responses], dtype=torch.float64)
        lengths = torch.tensor([float(len(r)) for r in self.responses], dtype=torch.float64)
        total = torch.zeros(self.terms[0][0].log_prob_gradients.shape[1], dtype=torch.float64)
        for q, terms in zip(self.probabilities, self.terms, strict=True):
            gradients = torch.stack([t.log_prob_gradients.sum(0) for t in terms])
            total += (q * (rewards - q @ rewards) / lengths) @ gradients / self.contexts
        return total.numpy()

    def batches(
        self, target: EntropyTarget, *, units: int, samples: int, draws: int, seed: int, by_prefix: bool
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Of batches that q draws: X without 1/W̄ and Y, [draws, units, parameters], and W_n, [draws, units]."""
        rng = np.random.default_rng(seed)
        contexts = rng.integers(self.contexts, size=draws * units)
        q = self.probabilities.numpy()
        q = q / q.sum(axis=1, keepdims=True)
        rows = [(int(n), int(i)) for n in contexts for i in rng.choice(len(self.responses), size=samples, p=q[n])]
        sizes = [samples] * (draws * units)
        sample = self.sample(rows, sizes, by_prefix=by_prefix)
        x = self.vectors(target.coefficients(sample), rows)
        assert sample.rewards is not None
        assert sample.importance is not None
        advantages = advantages_from_rewards(sample.rewards, sizes, AdvantageRule.RLOO)
        weights = advantages * length_weights(list(sample.lengths), sizes, LengthWeight.GRPO)
        y = self.vectors(TokenPair(weights), rows)
        shape = (draws, units, samples, x.shape[1])
        of_prompts = sample.importance.of_prompts(sizes).numpy().reshape(draws, units)
        return x.view(shape).sum(2).numpy(), y.view(shape).sum(2).numpy(), of_prompts
