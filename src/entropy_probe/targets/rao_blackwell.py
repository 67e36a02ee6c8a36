"""The Rao-Blackwell estimator of the entropy: what was drawn after a token gives way to its mean given the tokens so far.

With H_t the entropy of the next-token distribution at position t, nats, and F_t = Σ_{s>t} H_s the entropy still to come,

    X_n = −(1/G_n) Σ_g [ Σ_t (F_ngt − F̄_n,−g,t) ∇log π(y_ngt) + Σ_t ∇H_ngt ]           E[X_n] = −∇H_n

F̄_n,−g,t being the mean over the prompt's other responses at the same position, 0 past their end. Given the tokens up to t,
F_t has the mean of −Σ_{s>t} log π(y_s): X_n is the score estimator's conditional expectation, with the same mean and less
variance; F̄ does not depend on response g, so it adds no bias. The two terms need a backward of their own beside Y's.
Source: docs/method.md, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_probe.data.groups import repeat_by_group
from entropy_probe.targets.base import EntropyEstimator, Sample, TokenPair, at_tokens


class RaoBlackwell(EntropyEstimator):
    """From the entropy of every next-token distribution. One response a prompt will do: it then has no baseline."""

    name = "rao-blackwell"
    needs_token_entropies = True

    def values(self, sample: Sample) -> Tensor:
        """Σ_t H_t of every response, [N], nats."""
        return torch.stack([part.sum() for part in torch.split(_entropies(sample), list(sample.lengths))])

    def coefficients(self, sample: Sample, rate: float = 0.0) -> TokenPair:
        """−(f_t − f̄_−g,t) / G_n and −1 / G_n with f_t = F_t − rate · (T − t): [tokens] each."""
        to_come = entropy_to_come(_entropies(sample).detach(), sample.lengths, rate)
        baseline = leave_one_out_by_position(to_come, sample.lengths, sample.group_sizes)
        sizes = at_tokens(repeat_by_group(sample.group_sizes, sample.group_sizes), sample.lengths)
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


def _entropies(sample: Sample) -> Tensor:
    assert sample.token_entropies is not None, "Rao-Blackwell needs the entropies of the next-token distributions"
    return sample.token_entropies
