"""What a backward starts with at every response token, and with which weights each sequence's gradient then counts.

A coefficient a response may stand in either place. In the weights, one backward of Σ_i S_i with ones serves several channels;
at the tokens, each channel needs a backward of its own, but coefficients may differ from token to token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.model.measured import Measured
from entropy_probe.targets.base import Ratio, Sample, Target, TokenPair, at_tokens, of_rows
from entropy_probe.targets.of_responses import TargetOfResponses


@dataclass(frozen=True)
class Sides:
    """Which vectors a unit has: X_u, Y_u, Z_u of further targets, and those of terms of the loss by themselves.

    Attributes:
        target: what X estimates, from what the forwards find; or X's coefficients, one a response [N] or one a response token
            [tokens], flat.
        update: Y's coefficients: a, one weight a response [N]; or ω on ∇log π and β on ∇H_t, each one a response [N] or one a
            response token [tokens].
        also: further targets, of each of which Z_u · P Y_w is asked for; see :meth:`backward_for_targets`.
        terms: by name, coefficients of terms of the loss that Y_u holds, whose vectors are wanted by themselves too; each takes
            a backward.
    """

    target: Target | Tensor
    update: Tensor | TokenPair
    also: tuple[TargetOfResponses, ...] = ()
    terms: Mapping[str, TokenPair] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """Vectors a unit."""
        return 2 + len(self.also) + len(self.terms)

    @property
    def of_update(self) -> TokenPair:
        """Y's coefficients as a pair."""
        return TokenPair.of(self.update)

    def of_targets(self, batch: RolloutBatch) -> Tensor:
        """Coefficients of every Z, one a response: float64 [also, N]."""
        sample, none = Sample.of(batch), torch.zeros((0, len(batch.responses)), dtype=torch.float64)
        return torch.cat([none, *(target.weights(sample).double()[None] for target in self.also)])

    def backward_for_targets(self, batch: RolloutBatch) -> bool:
        """Whether further targets take a backward of their own: neither X's nor Y's weights are one a response."""
        return TargetSide(batch, self.target).per_token and not self.of_update.weighs_responses(batch)


@dataclass(frozen=True)
class Backward:
    """One backward for some rows.

    Attributes:
        start: what it starts with at log π and at H_t of every response token of the rows, [tokens], float64.
        weights: of each row's gradient in each channel, [channels, rows], float64; ones where ``apart`` was asked for.
        channels: which these are.
    """

    start: TokenPair
    weights: Tensor
    channels: slice


class Coefficients(Protocol):
    """The backwards that given rows need."""

    needs_entropies: bool
    """Whether H_t of every response token is needed."""

    @property
    def channels(self) -> Sequence[slice]:
        """For every backward in turn: the same for all rows, unless coefficients are kept apart."""

    def needed_rows(self, rows: range) -> Sequence[int]:
        """Rows whose scores (and entropies) must be known before the backwards of ``rows``."""

    def backwards(self, rows: Sequence[int], found: Measured, *, apart: bool) -> list[Backward]:
        """The backwards for these flat rows.

        Args:
            rows: flat.
            found: scores and entropies, of :meth:`needed_rows` at least, NaN where no forward has been.
            apart: coefficients stand at the tokens alone, as where autograd sums over sequences itself.
        """


@dataclass
class TargetSide:
    """Channel 0 is X, for a target or from given coefficients.

    Attributes:
        batch: the rollouts.
        target: what X estimates; or its coefficients, one a response [N] or one a response token [tokens].
    """

    batch: RolloutBatch
    target: Target | Tensor
    needs_entropies: bool = field(init=False)

    def __post_init__(self) -> None:
        """Whether coefficients are one a token: known of the whole batch alone."""
        self._ratio: Ratio | None = None
        if isinstance(self.target, Tensor):
            self.needs_entropies = False
            self.per_token = TokenPair(self.target).is_per_token(self.batch)
        else:
            self.needs_entropies = self.per_token = self.target.needs_token_entropies

    @property
    def channels(self) -> Sequence[slice]:
        """One backward."""
        return (slice(0, 1),)

    def needed_rows(self, rows: range) -> Sequence[int]:
        """None for given coefficients, the whole batch for a ratio, else all responses to the rows' prompts."""
        if isinstance(self.target, Tensor):
            return ()
        if self.target.of_whole_batch:
            return range(len(self.batch.responses))
        first, prompts = self.batch.first_row, self.batch.prompt_of_row
        return range(first[prompts[rows.start]], first[prompts[rows.stop - 1] + 1])

    def backwards(self, rows: Sequence[int], found: Measured, *, apart: bool) -> list[Backward]:
        """One backward; its coefficients stand in the weights where they are one a response."""
        x, lengths = self.of_rows(rows, found), [self.batch.lengths[row] for row in rows]
        if not self.per_token:
            return _weighted(x.log_probs[None], lengths, 0, apart=apart)
        return [Backward(x.at_tokens(lengths), torch.ones((1, len(rows)), dtype=torch.float64), slice(0, 1))]

    def of_rows(self, rows: Sequence[int], found: Measured) -> TokenPair:
        """X's coefficients of these rows, one a response or one a token."""
        if isinstance(self.target, Tensor):
            return TokenPair(self.target).of_rows(rows, self.batch)
        # For the rows' prompts alone: the whole batch at every strip would be quadratic in it.
        prompts = sorted({self.batch.prompt_of_row[row] for row in rows})
        first = self.batch.first_row
        members = [row for n in prompts for row in range(first[n], first[n + 1])]
        part = self.batch.of_prompts(prompts)
        measured = Measured(
            found.scores[members],
            None if found.entropies is None else of_rows(found.entropies, members, self.batch),
        )
        pair = self.target.coefficients(Sample.of(part, measured), self._ratio_of(found))
        places = {row: place for place, row in enumerate(members)}
        return pair.of_rows([places[row] for row in rows], part)

    def _ratio_of(self, found: Measured) -> Ratio | None:
        """Of the whole batch, whose scores are all known by then; they do not change."""
        assert not isinstance(self.target, Tensor)
        if self._ratio is None and self.target.of_whole_batch:
            self._ratio = self.target.ratio(Sample.of(self.batch, found))
        return self._ratio


@dataclass
class ResponseSide:
    """Channels whose coefficients are known beforehand, one a response: Y, and Z beside it.

    Attributes:
        batch: the rollouts.
        weights: [channels, N].
        first: channel.
    """

    batch: RolloutBatch
    weights: Tensor
    first: int = 0
    needs_entropies: bool = False

    @property
    def channels(self) -> Sequence[slice]:
        """One backward."""
        return (slice(self.first, self.first + len(self.weights)),)

    def needed_rows(self, rows: range) -> Sequence[int]:
        """None: coefficients are given."""
        return ()

    def backwards(self, rows: Sequence[int], found: Measured, *, apart: bool) -> list[Backward]:
        """One backward, or one a channel where ``apart``."""
        lengths = [self.batch.lengths[row] for row in rows]
        return _weighted(self.weights[:, list(rows)], lengths, self.first, apart=apart)


class BothSides:
    """Channel 0 is X; Y and the Z of further targets have the others.

    Vectors whose coefficients are one a response share a backward, so that their channels lie together: X, Y and Z where Y's
    are, else X and Z, and Y behind them with a backward of its own. Each term of the loss that is wanted by itself comes last.

    Args:
        x: of channel 0.
        update: Y's coefficients.
        also: those of every Z, [also, N].
        terms: coefficients of terms of the loss.
        again: further channels that hold Y.

    ``y`` is Y's channel, ``z`` has those of Z, ``y_again`` those that hold Y again, ``of_terms`` those of the terms.
    """

    def __init__(
        self, x: TargetSide, update: TokenPair, also: Tensor, terms: Sequence[TokenPair] = (), again: int = 0
    ) -> None:
        """See the class."""
        self.x, self.update, self.also, self.terms = x, update, also, tuple(terms)
        weights, count = also, len(also)
        apart: list[tuple[TokenPair, slice]] = []
        if update.weighs_responses(x.batch):
            own = update.log_probs.double()[None]
            weights = torch.cat([own, also, own.expand(again, -1)])
            self.y, self.z, self.y_again = 1, range(2, 2 + count), range(2 + count, 2 + count + again)
        else:
            self.z, self.y = range(1, 1 + count), 1 + count
            self.y_again = range(self.y + 1, self.y + 1 + again)
            apart = [(update, slice(self.y, self.y + 1 + again))]
        self.of_terms = range(self.count - len(self.terms), self.count)
        apart += [(term, slice(c, c + 1)) for term, c in zip(self.terms, self.of_terms, strict=True)]
        self._of_tokens = Combinations(x.batch, [pair for pair, _ in apart], [channels for _, channels in apart])
        self._of_responses = ResponseSide(x.batch, weights, first=1)
        self.needs_entropies = x.needs_entropies or any(pair.entropies is not None for pair in (update, *self.terms))

    @staticmethod
    def of(batch: RolloutBatch, sides: Sides) -> BothSides:
        """The channels of these sides."""
        x = TargetSide(batch, sides.target)
        return BothSides(x, sides.of_update, sides.of_targets(batch), tuple(sides.terms.values()))

    @property
    def count(self) -> int:
        """Channels."""
        return 2 + len(self.also) + len(self.y_again) + len(self.terms)

    def without_targets(self) -> BothSides:
        """X, Y and the terms."""
        return BothSides(self.x, self.update, self.also[:0], self.terms)

    def with_y_again(self, times: int) -> BothSides:
        """X, Y and Z, with Y in so many further channels, and without the terms."""
        return BothSides(self.x, self.update, self.also, again=times)

    @property
    def channels(self) -> Sequence[slice]:
        """Of every backward: X's with all whose coefficients are one a response as X's are, theirs, Y's, and every term's."""
        last = 1 + len(self._of_responses.weights)
        found = [slice(0, last)]
        if self.x.per_token:
            found = [slice(0, 1), slice(1, last)] if last > 1 else [slice(0, 1)]
        return [*found, *self._of_tokens.channels]

    def needed_rows(self, rows: range) -> Sequence[int]:
        """As X needs them."""
        return self.x.needed_rows(rows)

    def backwards(self, rows: Sequence[int], found: Measured, *, apart: bool) -> list[Backward]:
        """Those of :attr:`channels`; where ``apart``, one a channel whose coefficients are one a response."""
        backwards = self.x.backwards(rows, found, apart=apart)
        if len(self._of_responses.weights):
            backwards += self._of_responses.backwards(rows, found, apart=apart)
        if not self.x.per_token and not apart:
            weights = torch.cat([backward.weights for backward in backwards])
            backwards = [Backward(backwards[0].start, weights, self.channels[0])]
        return backwards + self._of_tokens.backwards(rows, found, apart=apart)


def _weighted(values: Tensor, lengths: Sequence[int], first: int, *, apart: bool) -> list[Backward]:
    """``values`` [channels, rows] in the weights, or at the rows' tokens, a backward a channel, where ``apart``."""
    if apart:
        ones = torch.ones((1, len(lengths)), dtype=torch.float64)
        starts = [TokenPair(at_tokens(of_channel, lengths)) for of_channel in values]
        return [Backward(start, ones, slice(channel, channel + 1)) for channel, start in enumerate(starts, first)]
    start = TokenPair(torch.ones(sum(lengths), dtype=torch.float64))
    return [Backward(start, values.double(), slice(first, first + len(values)))]


def given_side(batch: RolloutBatch, coefficients: Tensor | TokenPair) -> ResponseSide | Combinations:
    """One channel of these coefficients."""
    pair = TokenPair.of(coefficients)
    if pair.weighs_responses(batch):
        return ResponseSide(batch, pair.log_probs[None])
    return Combinations(batch, [pair], [slice(0, 1)])


@dataclass
class Combinations:
    """Every channel of combination m is Σ over a row's tokens of what it multiplies; channels differ in their direction.

    Attributes:
        batch: the rollouts.
        combinations: what multiplies ∇log π and ∇H_t, each one value a response [N] or one a response token [tokens].
        channels: of each combination.
    """

    batch: RolloutBatch
    combinations: Sequence[TokenPair]
    channels: Sequence[slice]
    needs_entropies: bool = field(init=False)

    def __post_init__(self) -> None:
        """Entropies are needed where a combination has them."""
        self.needs_entropies = any(c.entropies is not None for c in self.combinations)

    def needed_rows(self, rows: range) -> Sequence[int]:
        """None: coefficients are given."""
        return ()

    def backwards(self, rows: Sequence[int], found: Measured, *, apart: bool) -> list[Backward]:
        """One backward a combination."""
        lengths = [self.batch.lengths[row] for row in rows]
        return [
            Backward(
                c.of_rows(rows, self.batch).at_tokens(lengths),
                torch.ones((channels.stop - channels.start, len(rows)), dtype=torch.float64),
                channels,
            )
            for c, channels in zip(self.combinations, self.channels, strict=True)
        ]
