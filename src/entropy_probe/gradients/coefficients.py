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

from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.targets.entropy import (
    EntropyCoefficients,
    EntropyRatio,
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

    @property
    def channels(self) -> Sequence[slice]:
        """Of every backward in turn: the same for all rows, unless coefficients are to stand apart."""

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
class EntropySide:
    """Channel 0 is X, for a target or from given coefficients.

    Attributes:
        batch: the rollouts.
        entropy: what X estimates; or its coefficients, one a response [N] or one a response token [tokens].
    """

    batch: RolloutBatch
    entropy: EntropyTarget | Tensor
    needs_entropies: bool = field(init=False)

    def __post_init__(self) -> None:
        """Tables of rows, prompts and tokens."""
        self._lengths = [len(r.response_ids) for r in self.batch.responses]
        self._first_token = [0, *itertools.accumulate(self._lengths)]
        self._group_of_row = [n for n, size in enumerate(self.batch.group_sizes) for _ in range(size)]
        self._first_row = [0, *itertools.accumulate(self.batch.group_sizes)]
        self.needs_entropies = isinstance(self.entropy, EntropyTarget) and self.entropy.needs_token_entropies
        self._ratio: EntropyRatio | None = None
        # Of the whole batch: in rows of one token each the two could not be told apart.
        self.per_token = self.needs_entropies
        if isinstance(self.entropy, Tensor):
            self.per_token = len(self.entropy) != len(self._lengths)
            assert len(self.entropy) in (len(self._lengths), self._first_token[-1])

    @property
    def channels(self) -> Sequence[slice]:
        """One backward."""
        return (slice(0, 1),)

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
        """One backward; its coefficients stand in the weights where they are one a response."""
        x = self.of_rows(rows, found)
        if not self.per_token:
            return [_weighted(x.log_probs, [self._lengths[row] for row in rows], 0, apart=apart)]
        return [
            Backward(x.log_probs.double(), x.entropies, torch.ones((1, len(rows)), dtype=torch.float64), slice(0, 1))
        ]

    def of_rows(self, rows: Sequence[int], found: Found) -> EntropyCoefficients:
        """X's coefficients of these rows, one a response or one a token."""
        if isinstance(self.entropy, Tensor):
            return EntropyCoefficients(
                _of_rows(self.entropy, rows, self._first_token) if self.per_token else self.entropy[list(rows)]
            )
        # Of the rows' prompts alone: over the whole batch anew for every strip would be quadratic in it.
        groups = sorted({self._group_of_row[row] for row in rows})
        members = [row for n in groups for row in range(self._first_row[n], self._first_row[n + 1])]
        lengths = [self._lengths[row] for row in members]
        of_groups = entropy_coefficients(
            self.entropy,
            found.scores[members],
            None if found.token_entropies is None else _of_rows(found.token_entropies, members, self._first_token),
            lengths,
            [self.batch.group_sizes[n] for n in groups],
            self._ratio_of(found) if self.entropy.unit is EntropyUnit.PER_TOKEN else None,
        )
        places = {row: place for place, row in enumerate(members)}

        def picked(values: Tensor, sizes: Sequence[int]) -> Tensor:
            parts = torch.split(values, list(sizes))
            return torch.cat([parts[places[row]] for row in rows])

        if of_groups.entropies is None:
            return EntropyCoefficients(picked(of_groups.log_probs, [1] * len(members)))
        return EntropyCoefficients(picked(of_groups.log_probs, lengths), picked(of_groups.entropies, lengths))

    def _ratio_of(self, found: Found) -> EntropyRatio:
        """Of the whole batch, whose scores are all known by then; they do not change."""
        if self._ratio is None:
            assert isinstance(self.entropy, EntropyTarget)
            entropies = response_entropies(self.entropy.estimator, found.scores, found.token_entropies, self._lengths)
            self._ratio = entropy_ratio(entropies, self._lengths, self.batch.group_sizes)
        return self._ratio


@dataclass
class UpdateSide:
    """One channel is Y with the advantage coefficients a, [N]."""

    batch: RolloutBatch
    advantage: Tensor
    channel: int = 0
    needs_entropies: bool = False

    @property
    def channels(self) -> Sequence[slice]:
        """One backward."""
        return (slice(self.channel, self.channel + 1),)

    def needed_rows(self, rows: range) -> Sequence[int]:
        """None: coefficients are given."""
        return ()

    def backwards(self, rows: Sequence[int], found: Found, *, apart: bool) -> list[Backward]:
        """One backward."""
        lengths = [len(self.batch.responses[row].response_ids) for row in rows]
        return [_weighted(self.advantage[list(rows)], lengths, self.channel, apart=apart)]


class EntropyAndUpdate:
    """Channel 0 is X and channel 1 is Y; arguments as of :class:`EntropySide` and :class:`UpdateSide`."""

    def __init__(self, batch: RolloutBatch, entropy: EntropyTarget | Tensor, advantage: Tensor) -> None:
        """See the class."""
        self._x, self._y = EntropySide(batch, entropy), UpdateSide(batch, advantage, channel=1)
        self.needs_entropies = self._x.needs_entropies

    @property
    def channels(self) -> Sequence[slice]:
        """Both in one backward where X's coefficients, as Y's, are one a response."""
        return (slice(0, 1), slice(1, 2)) if self._x.per_token else (slice(0, 2),)

    def needed_rows(self, rows: range) -> Sequence[int]:
        """As X needs them."""
        return self._x.needed_rows(rows)

    def backwards(self, rows: Sequence[int], found: Found, *, apart: bool) -> list[Backward]:
        """One backward where both coefficients are one a response, else one for X and one for Y."""
        (x,), (y,) = (side.backwards(rows, found, apart=apart) for side in (self._x, self._y))
        if len(self.channels) == 1 and not apart:
            return [Backward(x.log_probs, None, torch.cat([x.weights, y.weights]), slice(0, 2))]
        return [x, y]


def _of_rows(values: Tensor, rows: Sequence[int], first_token: Sequence[int]) -> Tensor:
    """Those of ``values`` [tokens] that are of these rows, one after the other."""
    return torch.cat([values[first_token[row] : first_token[row + 1]] for row in rows])


def _weighted(values: Tensor, lengths: Sequence[int], channel: int, *, apart: bool) -> Backward:
    """One value a response, in the weights, or at its tokens where ``apart``."""
    tokens = torch.tensor(list(lengths))
    channels = slice(channel, channel + 1)
    if apart:
        ones = torch.ones((1, len(lengths)), dtype=torch.float64)
        return Backward(torch.repeat_interleave(values.double(), tokens), None, ones, channels)
    return Backward(torch.ones(int(tokens.sum()), dtype=torch.float64), None, values.double()[None], channels)


@dataclass
class Combinations:
    """Every channel of combination m is Σ over a row's tokens of what it multiplies; channels differ in their direction.

    Attributes:
        batch: the rollouts.
        combinations: what multiplies ∇log π and ∇H_t, each one value a response [N] or one a response token [tokens].
        channels: of each combination.
    """

    batch: RolloutBatch
    combinations: Sequence[EntropyCoefficients]
    channels: Sequence[slice]
    needs_entropies: bool = field(init=False)

    def __post_init__(self) -> None:
        """Entropies are needed where a combination has them."""
        self._lengths = [len(r.response_ids) for r in self.batch.responses]
        self._first_token = [0, *itertools.accumulate(self._lengths)]
        self.needs_entropies = any(c.entropies is not None for c in self.combinations)

    def needed_rows(self, rows: range) -> Sequence[int]:
        """None: coefficients are given."""
        return ()

    def backwards(self, rows: Sequence[int], found: Found, *, apart: bool) -> list[Backward]:
        """One backward a combination."""
        tokens = torch.tensor([self._lengths[row] for row in rows])

        def by_token(values: Tensor) -> Tensor:
            if len(values) != len(self._lengths):
                assert len(values) == self._first_token[-1]
                return _of_rows(values, rows, self._first_token).double()
            return torch.repeat_interleave(values[list(rows)].double(), tokens)

        return [
            Backward(
                by_token(c.log_probs),
                None if c.entropies is None else by_token(c.entropies),
                torch.ones((channels.stop - channels.start, len(rows)), dtype=torch.float64),
                channels,
            )
            for c, channels in zip(self.combinations, self.channels, strict=True)
        ]
