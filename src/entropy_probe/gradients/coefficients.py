"""What a backward starts with at every response token, and with which weights each sequence's gradient then counts.

A coefficient a response may stand in either place. In the weights, one backward of Σ_i S_i with ones serves several channels;
at the tokens, each channel needs a backward of its own, but coefficients may differ from token to token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from entropy_probe.rollouts import RolloutBatch
from entropy_probe.scores import entropy_coefficients as score_coefficients


@dataclass(frozen=True)
class Backward:
    """One backward for some rows.

    Attributes:
        starts: ∂/∂ log π of every response token of the rows, [tokens], float64.
        weights: of each row's gradient in each channel, [channels, rows], float64; ones where ``apart`` was asked for.
        channels: which these are.
    """

    starts: Tensor
    weights: Tensor
    channels: slice


class Coefficients(Protocol):
    """The backwards that given rows need."""

    needs_groups: bool
    """Whether a row's coefficient depends on the scores of all responses to its prompt."""

    def backwards(self, rows: Sequence[int], scores: Tensor, *, apart: bool) -> list[Backward]:
        """The backwards for these flat rows.

        Args:
            rows: flat.
            scores: S of every response found so far, [N].
            apart: coefficients stand at the tokens alone, as where autograd sums over sequences itself.
        """


class EntropyAndUpdate:
    """Channel 0 is X with the entropy coefficients c, channel 1 is Y with the advantage coefficients a.

    Args:
        batch: the rollouts.
        entropy: c, one a response [N] or one a response token [tokens]; None takes the score estimator's.
        advantage: a, [N].
    """

    def __init__(self, batch: RolloutBatch, entropy: Tensor | None, advantage: Tensor) -> None:
        """See the class."""
        self._batch, self._entropy, self._advantage = batch, entropy, advantage
        self._first_token = [0, *itertools.accumulate(len(r.response_ids) for r in batch.responses)]
        self._lengths = [len(r.response_ids) for r in batch.responses]
        self._group_of_row = [n for n, size in enumerate(batch.group_sizes) for _ in range(size)]
        self._per_token = entropy is not None and len(entropy) != len(self._lengths)
        assert entropy is None or len(entropy) in (len(self._lengths), self._first_token[-1])
        self.needs_groups = entropy is None

    def backwards(self, rows: Sequence[int], scores: Tensor, *, apart: bool) -> list[Backward]:
        """One backward where both coefficients are one a response, else one for X and one for Y."""
        a = self._advantage[list(rows)].double()
        if self._per_token:
            assert self._entropy is not None
            x = torch.cat([self._entropy[self._first_token[row] : self._first_token[row + 1]] for row in rows]).double()
        else:
            c = self._entropy_of(rows, scores).double()
            if not apart:
                ones = torch.ones(sum(self._lengths[row] for row in rows), dtype=torch.float64)
                return [Backward(ones, torch.stack([c, a]), slice(0, 2))]
            x = self._by_token(rows, c)
        ones = torch.ones((1, len(rows)), dtype=torch.float64)
        return [Backward(x, ones, slice(0, 1)), Backward(self._by_token(rows, a), ones, slice(1, 2))]

    def _by_token(self, rows: Sequence[int], values: Tensor) -> Tensor:
        return torch.repeat_interleave(values, torch.tensor([self._lengths[row] for row in rows]))

    def _entropy_of(self, rows: Sequence[int], scores: Tensor) -> Tensor:
        if self._entropy is not None:
            return self._entropy[list(rows)]
        groups = sorted({self._group_of_row[row] for row in rows})
        members = [row for row, n in enumerate(self._group_of_row) if n in set(groups)]
        sizes = [self._batch.group_sizes[n] for n in groups]
        by_row = dict(zip(members, score_coefficients(scores[members], sizes), strict=True))
        return torch.stack([by_row[row] for row in rows])


class Unweighted:
    """Every channel is Σ over its rows of ∇S_i itself."""

    needs_groups = False

    def __init__(self, batch: RolloutBatch, channels: int) -> None:
        """See the class."""
        self._lengths = [len(r.response_ids) for r in batch.responses]
        self._channels = channels

    def backwards(self, rows: Sequence[int], scores: Tensor, *, apart: bool) -> list[Backward]:
        """One backward."""
        ones = torch.ones(sum(self._lengths[row] for row in rows), dtype=torch.float64)
        weights = torch.ones((self._channels, len(rows)), dtype=torch.float64)
        return [Backward(ones, weights, slice(0, self._channels))]
