"""Rao-Blackwell: what was drawn after a token is replaced by its expectation given the tokens so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def entropy_to_come(token_entropies: Tensor, lengths: Sequence[int], rate: float = 0.0) -> Tensor:
    """F_t − h (T − t) with F_t = Σ_{s>t} H_s and T − t the tokens after t: flat [tokens], nats.

    Given the tokens up to t, F_t has the mean of −Σ_{s>t} log π(y_s), without the noise of what was drawn there.
    """
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


def of_tokens(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """One value a response, repeated for each of its tokens."""
    return torch.repeat_interleave(values, torch.tensor(list(lengths)))
