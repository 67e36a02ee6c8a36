"""A policy small enough to enumerate every response: the exact truth for entropy, its gradient and every expectation.

Responses are drawn from R tokens, token 0 ends them, and the length limit L cuts them (the capped policy). The logits of the
next token are ``table[context, previous] + shared[previous]``: the context is the prompt's first token, so prompts differ but
share parameters.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from entropy_probe.data.rollouts import Rollout

END = 0


class EnumerablePolicy(nn.Module):
    """``logits [n, L, R]`` from two tables; prompt tokens are R, R + 1, …, one a context."""

    def __init__(self, contexts: int, tokens: int = 2, *, seed: int = 0, scale: float = 0.8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.tokens = tokens
        self.contexts = contexts
        self.table = table(contexts, tokens + contexts, tokens)
        self.shared = table(tokens + contexts, tokens)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> SimpleNamespace:
        context = (input_ids[:, :1] - self.tokens).expand_as(input_ids)
        return SimpleNamespace(logits=self.table[context, input_ids] + self.shared[input_ids])


def all_responses(tokens: int, limit: int) -> list[tuple[int, ...]]:
    """Every response: ended by token 0, or cut at the limit."""
    found = []
    for length in range(1, limit + 1):
        for body in itertools.product(range(1, tokens), repeat=length - 1):
            found.append((*body, END))
    found.extend(itertools.product(range(1, tokens), repeat=limit))
    return found


def prompt_of(policy: EnumerablePolicy, context: int) -> tuple[int, ...]:
    return (policy.tokens + context,)


def response_scores(policy: EnumerablePolicy, context: int, limit: int, temperature: float = 1.0) -> Tensor:
    """S of every response to a context, with the graph: [responses]; written token by token."""
    scores = []
    for response in all_responses(policy.tokens, limit):
        previous, total = policy.tokens + context, torch.zeros((), dtype=torch.float64)
        for token in response:
            logits = (policy.table[context, previous] + policy.shared[previous]) / temperature
            total = total + torch.log_softmax(logits, dim=-1)[token]
            previous = token
        scores.append(total)
    return torch.stack(scores)


def exact_entropy(policy: EnumerablePolicy, context: int, limit: int, temperature: float = 1.0) -> Tensor:
    """H = −Σ p log p over every response, with the graph."""
    scores = response_scores(policy, context, limit, temperature)
    return -(scores.exp() * scores).sum()


def flat_gradient(value: Tensor, policy: EnumerablePolicy, *, retain: bool = True) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(policy.parameters()), retain_graph=retain)])


def score_gradients(
    policy: EnumerablePolicy, context: int, limit: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(S [responses], ∇S [responses, parameters]) of every response to a context."""
    scores = response_scores(policy, context, limit, temperature)
    return scores.detach(), torch.stack([flat_gradient(score, policy) for score in scores])


def row(
    policy: EnumerablePolicy, context: int, response: tuple[int, ...], reward: float, prompt_id: object = None
) -> Rollout:
    return Rollout(
        prompt_id=f"c{context}" if prompt_id is None else str(prompt_id),
        prompt_ids=prompt_of(policy, context),
        response_ids=response,
        reward=reward,
    )


@dataclass(frozen=True)
class TokenTerms:
    """Of one response, token by token: ∇log π(y_t) [T, parameters], H_t [T] and ∇H_t [T, parameters]."""

    log_prob_gradients: Tensor
    entropies: Tensor
    entropy_gradients: Tensor


def token_terms(policy: EnumerablePolicy, context: int, limit: int, temperature: float = 1.0) -> list[TokenTerms]:
    """Of every response to a context, in the order of :func:`all_responses`; written token by token."""
    found = []
    for response in all_responses(policy.tokens, limit):
        previous = policy.tokens + context
        rows = []
        for token in response:
            logits = (policy.table[context, previous] + policy.shared[previous]) / temperature
            log_p = torch.log_softmax(logits, dim=-1)
            entropy = -(log_p.exp() * log_p).sum()
            rows.append((flat_gradient(log_p[token], policy), entropy, flat_gradient(entropy, policy)))
            previous = token
        found.append(
            TokenTerms(
                torch.stack([g for g, _, _ in rows]),
                torch.stack([h.detach() for _, h, _ in rows]),
                torch.stack([g for _, _, g in rows]),
            )
        )
    return found
