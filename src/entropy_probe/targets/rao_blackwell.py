"""The Rao-Blackwell estimator of the entropy: what was drawn after a token gives way to its mean given the tokens so far.

With H_t the entropy of the next-token distribution at position t, nats, and F_t = Σ_{s>t} H_s the entropy still to come,

    X_n = −(1/G_n) Σ_g [ Σ_t (F_ngt − F̄_n,−g,t) ∇log π(y_ngt) + Σ_t ∇H_ngt ]           E[X_n] = −∇H_n

F̄_n,−g,t being the mean over the prompt's other responses at the same position, 0 past their end. Given the tokens up to t,
F_t has the mean of −Σ_{s>t} log π(y_s): X_n is the score estimator's conditional expectation, with the same mean and less
variance; F̄ does not depend on response g, so it adds no bias. The two terms need a backward of their own beside Y's.

Rows of another policy enter with w_{<s}, the ratio of both policies' probabilities of the tokens before s (the whole ratio
past the end, where H = 0), inside of the sum over s, over W̄ (:mod:`~entropy_probe.data.importance`):

    X_n = −(1/W̄)(1/G_n) Σ_g [ Σ_t ( Σ_{s>t} w_{g,<s} (H_gs − H̄_−g,s) ) ∇log π(y_t) + Σ_t w_{g,<t} ∇H_t ]

with H̄_−g,s = Σ_{j≠g} w_{j,<s} H_js / Σ_{j≠g} w_{j,<s}. Or with whole ratios, both brackets times w_g and F̄ weighted by
the others' w. Source: docs/method.md, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_probe.data.groups import by_group, less_weighted_others, repeat_by_group
from entropy_probe.data.importance import Importance
from entropy_probe.targets.base import EntropyEstimator, Sample, TokenPair, at_tokens, sum_by_response


class RaoBlackwell(EntropyEstimator):
    """From the entropy of every next-token distribution. One response a prompt will do: it then has no baseline."""

    name = "rao-blackwell"
    needs_token_entropies = True

    def values(self, sample: Sample) -> Tensor:
        """Σ_t H_t of every response, [N], nats."""
        return sum_by_response(_entropies(sample), sample.lengths)

    def coefficients(self, sample: Sample, rate: float = 0.0) -> TokenPair:
        """−(f_t − f̄_−g,t) / G_n and −1 / G_n with f_t = F_t − rate · (T − t): [tokens] each; weighted as above."""
        entropies = _entropies(sample).detach()
        sizes = at_tokens(repeat_by_group(sample.group_sizes, sample.group_sizes), sample.lengths)
        if sample.importance is not None:
            weigh = _by_prefix if sample.importance.by_prefix else _by_response
            centred, of_gradients = weigh(entropies - rate, sample.lengths, sample.group_sizes, sample.importance)
            return TokenPair(-centred / sizes, -of_gradients / sizes)
        to_come = entropy_to_come(entropies, sample.lengths, rate)
        baseline = leave_one_out_by_position(to_come, sample.lengths, sample.group_sizes)
        return TokenPair(-(to_come - baseline) / sizes, -1.0 / sizes)


def entropy_to_come(token_entropies: Tensor, lengths: Sequence[int], rate: float = 0.0) -> Tensor:
    """F_t − h (T − t) with F_t = Σ_{s>t} H_s and T − t the tokens after t: flat [tokens], nats."""
    return torch.cat(
        [(h - rate).flip(0).cumsum(0).flip(0) - (h - rate) for h in torch.split(token_entropies, list(lengths))]
    )


def leave_one_out_by_position(values: Tensor, lengths: Sequence[int], group_sizes: Sequence[int]) -> Tensor:
    """At every response token, the mean of ``values`` [tokens] at that position over the prompt's other responses.

    A response counts as 0 past its end. For a prompt with one response it is 0: there is no baseline, and no bias either.
    """
    found = []
    start = 0
    parts = torch.split(values, list(lengths))
    for size in group_sizes:
        group = parts[start : start + size]
        start += size
        total = torch.nn.utils.rnn.pad_sequence(list(group), batch_first=True).sum(0)
        found += [(total[: len(own)] - own) / max(1, size - 1) for own in group]
    return torch.cat(found)


def _by_response(
    entropies: Tensor, lengths: Sequence[int], group_sizes: Sequence[int], importance: Importance
) -> tuple[Tensor, Tensor]:
    """(w/W̄)(F_t − F̄_−g,t) with F̄ weighted by the others' w, and w/W̄: flat [tokens] each."""
    to_come = list(torch.split(entropy_to_come(entropies, lengths), list(lengths)))
    padded = torch.nn.utils.rnn.pad_sequence(to_come, batch_first=True)
    log_weights = importance.log_weights[:, None].expand_as(padded)
    centred = _at_own_tokens(_less_others(padded, log_weights, group_sizes), lengths)
    weights = at_tokens(importance.weights, lengths)
    return weights * centred, weights


def _by_prefix(
    entropies: Tensor, lengths: Sequence[int], group_sizes: Sequence[int], importance: Importance
) -> tuple[Tensor, Tensor]:
    """Σ_{s>t} (w_{<s}/W̄)(H_s − H̄_−g,s), s over all positions of the prompt's responses, and w_{<t}/W̄: flat [tokens] each."""
    padded = torch.nn.utils.rnn.pad_sequence(list(torch.split(entropies, list(lengths))), batch_first=True)
    log_before = importance.log_weights[:, None].repeat(1, padded.shape[1])
    for row, own in enumerate(importance.log_before):
        log_before[row, : len(own)] = own
    centred = log_before.exp() * _less_others(padded, log_before, group_sizes)
    # Past the end of all of a prompt's responses every H is 0, and so is what is centred.
    to_come = centred.flip(1).cumsum(1).flip(1) - centred
    return _at_own_tokens(to_come, lengths), importance.before


def _less_others(padded: Tensor, log_weights: Tensor, group_sizes: Sequence[int]) -> Tensor:
    """Values [N, L] less the others' weighted means by position; a prompt with one response has none."""
    found = []
    for v, log_w in zip(by_group(padded, group_sizes), by_group(log_weights, group_sizes), strict=True):
        found.append(v if len(v) == 1 else less_weighted_others(v, log_w, [len(v)]))
    return torch.cat(found)


def _at_own_tokens(padded: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.cat([own[:length] for own, length in zip(padded, lengths, strict=True)])


def _entropies(sample: Sample) -> Tensor:
    assert sample.token_entropies is not None, "Rao-Blackwell needs the entropies of the next-token distributions"
    return sample.token_entropies
