"""What a backward starts with at every response token, and with which weights each sequence's gradient then counts.

A coefficient a response may stand in either place. In the weights, one backward of Σ_i S_i with ones serves several channels;
at the tokens, each channel needs a backward of its own, but coefficients may differ from token to token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from entropy_probe.rollouts import RolloutBatch
from entropy_probe.scores import (
    EntropyCoefficients,
    EntropyTarget,
    EntropyUnit,
    entropy_coefficients,
    entropy_ratio,
    response_entropies,
)


@dataclass(frozen=True)
class Found:
    """What the forwards have found so far, NaN elsewhere: S [N], and H_t [tokens] where asked for; float64, on the CPU."""

    scores: Tensor
    token_entropies: Tensor | None


@dataclass(frozen=True)
class Backward:
    """One backward for some rows.

    Attributes:
        log_probs: what it starts with at log π of every response token of the rows, [tokens], float64.
        entropies: the same at H_t; None for zeros.
        weights: of each row's gradient in each channel, [channels, rows], float64; ones where ``apart`` was asked for.
        channels: which these are.
    """

    log_probs: Tensor
    entropies: Tensor | None
    weights: Tensor
    channels: slice


class Coefficients(Protocol):
    """The backwards that given rows need."""

    needs_entropies: bool
    """Whether H_t of every response token is needed."""

    def needed_rows(self, rows: range) -> Sequence[int]:
        """Rows whose scores (and entropies) must be known before the backwards of ``rows``."""

    def backwards(self, rows: Sequence[int], found: Found, *, apart: bool) -> list[Backward]:
        """The backwards for these flat rows.

        Args:
            rows: flat.
            found: scores and entropies, of :meth:`needed_rows` at least.
            apart: coefficients stand at the tokens alone, as where autograd sums over sequences itself.
        """


@dataclass
class EntropyAndUpdate:
    """Channel 0 is X, for a target or from given coefficients; channel 1 is Y with the advantage coefficients a.

    Attributes:
        batch: the rollouts.
        entropy: what X estimates; or its coefficients, one a response [N] or one a response token [tokens].
        advantage: a, [N].
    """

    batch: RolloutBatch
    entropy: EntropyTarget | Tensor
    advantage: Tensor
    needs_entropies: bool = field(init=False)

    def __post_init__(self) -> None:
        """Tables of rows, prompts and tokens."""
        self._lengths = [len(r.response_ids) for r in self.batch.responses]
        self._first_token = [0, *itertools.accumulate(self._lengths)]
        self._group_of_row = [n for n, size in enumerate(self.batch.group_sizes) for _ in range(size)]
        self._first_row = [0, *itertools.accumulate(self.batch.group_sizes)]
        self.needs_entropies = isinstance(self.entropy, EntropyTarget) and self.entropy.needs_token_entropies
        if isinstance(self.entropy, Tensor):
            assert len(self.entropy) in (len(self._lengths), self._first_token[-1])

    def needed_rows(self, rows: range) -> Sequence[int]:
        """None for given coefficients, the whole batch for a ratio, else all responses to the rows' prompts."""
        if isinstance(self.entropy, Tensor):
            return ()
        if self.entropy.unit is EntropyUnit.PER_TOKEN:
            return range(len(self._lengths))
        return range(
            self._first_row[self._group_of_row[rows.start]], self._first_row[self._group_of_row[rows.stop - 1] + 1]
        )

    def backwards(self, rows: Sequence[int], found: Found, *, apart: bool) -> list[Backward]:
        """One backward where both coefficients are one a response, else one for X and one for Y."""
        a = self.advantage[list(rows)].double()
        x = self._of_rows(rows, found)
        if len(x.log_probs) == len(rows) and x.entropies is None and not apart:
            ones = torch.ones(sum(self._lengths[row] for row in rows), dtype=torch.float64)
            return [Backward(ones, None, torch.stack([x.log_probs.double(), a]), slice(0, 2))]
        ones = torch.ones((1, len(rows)), dtype=torch.float64)
        return [
            Backward(self._by_token(rows, x.log_probs.double()), x.entropies, ones, slice(0, 1)),
            Backward(self._by_token(rows, a), None, ones, slice(1, 2)),
        ]

    def _by_token(self, rows: Sequence[int], values: Tensor) -> Tensor:
        tokens = [self._lengths[row] for row in rows]
        return values if len(values) == sum(tokens) else torch.repeat_interleave(values, torch.tensor(tokens))

    def _of_rows(self, rows: Sequence[int], found: Found) -> EntropyCoefficients:
        """X's coefficients of these rows."""
        if isinstance(self.entropy, Tensor):
            whole = EntropyCoefficients(self.entropy)
        else:
            whole = self._of_target(self.entropy, rows, found)
        per_token = len(whole.log_probs) != len(self._lengths)
        return EntropyCoefficients(
            self._tokens(rows, whole.log_probs) if per_token else whole.log_probs[list(rows)],
            None if whole.entropies is None else self._tokens(rows, whole.entropies),
        )

    def _tokens(self, rows: Sequence[int], values: Tensor) -> Tensor:
        return torch.cat([values[self._first_token[row] : self._first_token[row + 1]] for row in rows])

    def _of_target(self, target: EntropyTarget, rows: Sequence[int], found: Found) -> EntropyCoefficients:
        """Over the whole batch; only what belongs to the rows' prompts need be finite there."""
        ratio = None
        if target.unit is EntropyUnit.PER_TOKEN:
            entropies = response_entropies(target.estimator, found.scores, found.token_entropies, self._lengths)
            ratio = entropy_ratio(entropies, self._lengths, self.batch.group_sizes)
        return entropy_coefficients(
            target, found.scores, found.token_entropies, self._lengths, self.batch.group_sizes, ratio
        )


class Unweighted:
    """Every channel is Σ over its rows of ∇S_i itself."""

    needs_entropies = False

    def __init__(self, batch: RolloutBatch, channels: int) -> None:
        """See the class."""
        self._lengths = [len(r.response_ids) for r in batch.responses]
        self._channels = channels

    def needed_rows(self, rows: range) -> Sequence[int]:
        """None."""
        return ()

    def backwards(self, rows: Sequence[int], found: Found, *, apart: bool) -> list[Backward]:
        """One backward."""
        ones = torch.ones(sum(self._lengths[row] for row in rows), dtype=torch.float64)
        weights = torch.ones((self._channels, len(rows)), dtype=torch.float64)
        return [Backward(ones, None, weights, slice(0, self._channels))]
