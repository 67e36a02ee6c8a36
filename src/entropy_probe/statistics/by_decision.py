"""The realised entropy change by decision: every token's entropy weighted by the ratio of the tokens before it.

With w_{<s} = exp Σ_{k<s} (log π⁺(y_k) − log π(y_k)) and H̄_−g,s the mean of H_s over the prompt's other responses at θ,

    ΔH = (1/B) Σ_n (1/G_n) Σ_g Σ_s [ w_{<s} (H⁺_s − H̄_−g,s) − (H_s − H̄_−g,s) ]          nats per response

s runs over all positions of the prompt's longest response; past a response's end H = 0, and w stays the whole ratio. Given the
tokens before s, H⁺_s is what θ⁺ would have there, and w_{<s} is the ratio of having come there: each term is unbiased for
θ⁺'s own, and H̄, which does not depend on response g, adds no bias since E[w_{<s}] = 1. No weight is normalised. The
derivative at θ is −X̄ · Δθ with Rao-Blackwell's X̄, baseline included, so that its linear term needs no gradient of its own.
For the entropy per token the same of T, with 1 in the place of H, is divided by.
Source: docs/method.md, section 7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from entropy_probe.common.arrays import FloatArray


@dataclass(frozen=True)
class TokensOfPrompts:
    """Values a response token, flat, of responses that stand prompt by prompt.

    Attributes:
        group_sizes: G_n.
        lengths: T of every response, [N].
    """

    group_sizes: Sequence[int]
    lengths: Sequence[int]

    def padded(self, values: FloatArray) -> list[FloatArray]:
        """Of every prompt [G_n, longest], zeros past a response's end."""
        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        found: list[FloatArray] = []
        row = 0
        for size in self.group_sizes:
            rows = range(row, row + size)
            table = np.zeros((size, max(self.lengths[i] for i in rows)))
            for place, i in enumerate(rows):
                table[place, : self.lengths[i]] = values[starts[i] : starts[i + 1]]
            found.append(table)
            row += size
        return found


@dataclass(frozen=True)
class ChangeByDecision:
    """ΔH, its clustered standard error and the entropy at θ; nats per response or per token."""

    entropy_before: float
    delta_h: float
    se: float

    @property
    def entropy_after(self) -> float:
        """At θ⁺."""
        return self.entropy_before + self.delta_h


def change_by_decision(
    tokens: TokensOfPrompts,
    entropies: tuple[FloatArray, FloatArray],
    log_probs: tuple[FloatArray, FloatArray],
    *,
    per_token: bool = False,
) -> ChangeByDecision:
    """ΔH between two policies on common samples.

    Args:
        tokens: how values are laid out; two prompts or more.
        entropies: H_s of every response token at θ and at θ⁺, nats, [tokens] each.
        log_probs: log π(y_s) at θ and at θ⁺, [tokens] each.
        per_token: of H over the mean length.

    Raises:
        ValueError: a log-probability is not finite.
    """
    if not all(np.isfinite(values).all() for values in log_probs):
        raise ValueError("a log-probability is not finite; the step or the model has left the range of its number type")
    before = _means(tokens, entropies[0])
    changes = _changes(tokens, entropies, log_probs)
    if not per_token:
        return ChangeByDecision(float(before.mean()), float(changes.mean()), _error(changes))
    ones = np.ones(len(entropies[0]))
    lengths, of_lengths = _means(tokens, ones), _changes(tokens, (ones, ones), log_probs)
    h, mean = float(before.mean() / lengths.mean()), float(lengths.mean())
    mean_after = mean + float(of_lengths.mean())
    after = float(before.mean() + changes.mean()) / mean_after
    # The delta method for both ratios, of the same prompts.
    influence = (before + changes - after * (lengths + of_lengths)) / mean_after - (before - h * lengths) / mean
    return ChangeByDecision(h, after - h, _error(influence))


def _means(tokens: TokensOfPrompts, values: FloatArray) -> FloatArray:
    """Σ_s v_s, its mean over every prompt's responses: [B]."""
    return np.array([table.sum(1).mean() for table in tokens.padded(values)])


def changes_of_responses(
    tokens: TokensOfPrompts, values: tuple[FloatArray, FloatArray], log_probs: tuple[FloatArray, FloatArray]
) -> FloatArray:
    """Every response's Σ_s [ w_{<s} (v⁺_s − v̄_−g,s) − (v_s − v̄_−g,s) ]: [N]."""
    found = []
    tables = (tokens.padded(part) for part in (*values, log_probs[1] - log_probs[0]))
    for own, after, log_ratios in zip(*tables, strict=True):
        others = others_mean(own)
        found.append((prefix_weights(log_ratios) * (after - others) - (own - others)).sum(1))
    return np.concatenate(found)


def _changes(
    tokens: TokensOfPrompts, values: tuple[FloatArray, FloatArray], log_probs: tuple[FloatArray, FloatArray]
) -> FloatArray:
    """Every prompt's ΔH: [B]."""
    starts = np.concatenate([[0], np.cumsum(tokens.group_sizes)[:-1]])
    sums = np.add.reduceat(changes_of_responses(tokens, values, log_probs), starts)
    means: FloatArray = sums / np.asarray(tokens.group_sizes)
    return means


def prefix_weights(log_ratios: FloatArray) -> FloatArray:
    """w_{<s} from log π⁺ − log π, zeros past a response's end: [G, positions]. There it is the whole ratio."""
    weights: FloatArray = np.exp(np.cumsum(log_ratios, axis=1) - log_ratios)
    return weights


def others_mean(values: FloatArray) -> FloatArray:
    """Of every response the mean of the others' at the same position, [G, positions]; 0 for a prompt's only response."""
    found: FloatArray = (values.sum(0) - values) / max(1, len(values) - 1)
    return found


def _error(by_prompt: FloatArray) -> float:
    """The standard error of a mean over prompts."""
    return math.sqrt(float(by_prompt.var(ddof=1)) / len(by_prompt))
