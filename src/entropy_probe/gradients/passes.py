"""Passes over a batch: of every microbatch one forward and one activation backward, into unit vectors or dots with directions.

Of several ranks each passes over its own rows; where weights are sharded, all ranks run as many microbatches, those without
rows an idle one, and layers are gathered and reduced in the same order on each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.errors import InputError
from entropy_probe.gradients.batching import Microbatch, microbatches, strips
from entropy_probe.gradients.capture.backward_order import Layer, announced, sharded_layers
from entropy_probe.gradients.capture.checkpointing import checkpointing
from entropy_probe.gradients.capture.layers import RULES
from entropy_probe.gradients.capture.modules import Treatment, fall_back_around, parameter_owners, treated
from entropy_probe.gradients.capture.sequences import IDLE, Mixing, Strip, padded_length
from entropy_probe.gradients.capture.uses import Capture, Sink, leaked
from entropy_probe.gradients.coefficients import Backward, Coefficients
from entropy_probe.gradients.interface import Coverage
from entropy_probe.gradients.unreached import callers, noting
from entropy_probe.gradients.vectors.contractions import Contractions
from entropy_probe.gradients.vectors.exchange import reached_anywhere
from entropy_probe.gradients.vectors.sharded_vectors import ShardedVectors
from entropy_probe.gradients.vectors.unit_vectors import UnitVectors
from entropy_probe.model.measured import Measured, TokenValues
from entropy_probe.model.padding import PaddedResponses, idle_row, pad_right, sum_over_tokens
from entropy_probe.model.policy import Policy, check_finite, combine
from entropy_probe.targets.base import TokenPair


@dataclass(frozen=True)
class Round:
    """One microbatch of a pass.

    Attributes:
        part: this rank's rows; none where other ranks have some left.
        open: units whose vectors are built: of this rank, or of all where weights are sharded.
        closed: those of them whose last row this was.
        units_of_rank: units of the ranks that run it together.
    """

    part: Microbatch
    open: list[int]
    closed: list[int]
    units_of_rank: list[list[int]]


def most_open_units(rounds: Sequence[Round]) -> int:
    """Units whose vectors stand in memory together when streamed."""
    return max((len(turn.open) for turn in rounds), default=0)


@dataclass(frozen=True)
class _Forward:
    """One strip's forward: its flat rows, and what it found of its response tokens, with the graph."""

    rows: tuple[int, ...]
    strip: Strip
    padded: PaddedResponses
    values: TokenValues

    @property
    def roots(self) -> tuple[Tensor, ...]:
        """What backwards may start from: log-probs, then entropies where there are any."""
        both = (self.values.log_probs, self.values.entropies)
        return tuple(root for root in both if root is not None)


@dataclass
class Passes:
    """The rows, units and coefficients of one call, and what its forwards have found so far.

    Attributes:
        policy: the model at θ.
        batch: the rollouts; rows and units keep their numbers in it on every rank.
        unit_of_row: of every response.
        coefficients: what a row's gradient is multiplied with, by channel.
        treatments: of every parameter; those that rows show to be outside of the rules become fallbacks.
        unproven: parameters for which no rule was proved: one that is used becomes a fallback too.
        shares: the consecutive prompts whose rows are each rank's.
        found: scores (and entropies) so far, NaN where no forward has been.
        ran: names of the parameters whose modules a forward has called.
    """

    policy: Policy
    batch: RolloutBatch
    unit_of_row: Sequence[int]
    coefficients: Coefficients
    treatments: dict[str, Treatment]
    unproven: frozenset[str]
    shares: Sequence[range]
    found: Measured = field(init=False)
    ran: set[str] = field(init=False)

    def __post_init__(self) -> None:
        """Nothing is found yet."""
        self.responses = self.batch.responses
        self.first_token, self.first_row = self.batch.first_token, self.batch.first_row
        counts = (len(self.responses), self.batch.tokens)
        unknown = [torch.full((count,), torch.nan, dtype=torch.float64) for count in counts]
        entropies = unknown[1].clone() if self.coefficients.needs_entropies else None
        self.found = Measured(unknown[0], entropies, unknown[1])
        self.last_row = {unit: row for row, unit in enumerate(self.unit_of_row)}
        self.lengths = [response.length for response in self.responses]
        self.parameters = self.policy.in_forwards()
        self.owners = parameter_owners(self.policy.model, self.policy.trainable())
        self.callers = callers(self.policy.model, self.owners)
        self.ran = set()
        self.ranks = self.policy.sharding.ranks

    def rounds(self) -> list[Round]:
        """The microbatches of one pass over this rank's rows; where weights are sharded, as many on every rank."""
        if self._rows_of_others():
            # All ranks together, not each all of them.
            self._score_ahead(range(len(self.responses)), self.policy.measure)
            # On all ranks at once: to one of them its rows' NaN would look like what is not known yet.
            check_finite(self.found.scores, self.responses)
        rank = self.ranks.rank
        parts = [self._parts(share) for share in self.shares]
        if not self.policy.sharding.sharded:
            return [
                Round(part, units, self._closed_by(part), [units])
                for part in parts[rank]
                for units in [self._units_of(part)]
            ]
        found = []
        for of_rank in itertools.zip_longest(*parts, fillvalue=Microbatch(range(0), whole=True)):
            units = [self._units_of(part) for part in of_rank]
            closed = [unit for part in of_rank for unit in self._closed_by(part)]
            found.append(Round(of_rank[rank], list(itertools.chain(*units)), closed, units))
        return found

    def _parts(self, share: range) -> list[Microbatch]:
        return microbatches(
            self.batch.group_sizes,
            self.unit_of_row,
            self.policy.microbatch_size,
            share,
            within_units=bool(self.fallback),
        )

    def vectors(
        self, shapes: Mapping[str, torch.Size], slots: int, dtype: torch.dtype, channels: int = 2
    ) -> UnitVectors | ShardedVectors:
        """Room for unit vectors: of this rank's units, or where weights are sharded, of all units' elements of its spans."""
        sharding, device = self.policy.sharding, self.policy.device
        if sharding.sharded:
            layers = [layer.names for layer in self.layers()]
            return ShardedVectors(shapes, slots, dtype, device, sharding, layers, channels)
        return UnitVectors(shapes, slots, dtype, device, channels)

    def contractions(
        self,
        directions: Mapping[str, Tensor],
        units: int,
        dtype: torch.dtype,
        of_channel: Sequence[int] | None = None,
    ) -> Contractions:
        """Dots with directions, of which sharded ranks have their spans."""
        sharding = self.policy.sharding
        layers = [layer.names for layer in self.layers()]
        return Contractions(directions, units, dtype, self.policy.device, of_channel, sharding, layers)

    def layers(self) -> list[Layer]:
        """See :func:`sharded_layers`; none where weights are whole."""
        return sharded_layers(self.policy.model, self.treatments) if self.policy.sharding.sharded else []

    def _rows_of_others(self) -> bool:
        """Whether coefficients of some rank's rows need scores, not known so far, of rows that are another's."""
        if not bool(self.found.scores.isnan().any()):
            return False
        if self.policy.sharding.sharded and max(self.batch.group_sizes) > self.policy.microbatch_size:
            # A forward that one rank needs for the rest of a prompt is a forward of all.
            return bool(self.coefficients.needed_rows(range(1)))
        rows = [range(self.first_row[share.start], self.first_row[share.stop]) for share in self.shares]
        return any(row not in own for own in rows if own for row in self.coefficients.needed_rows(own))

    def share(self) -> None:
        """Every rank gets what the others' forwards have found, and how they treated parameters; after a pass.

        Raises:
            InputError: a response of some rank has no finite score: on all of them, or the others would wait for that one.
        """
        if self.ranks.count == 1:
            return
        fallback = self.ranks.sum_numbers(np.array([float(name in self.fallback) for name in self.parameters]))
        self.treatments.update(
            {name: Treatment.FALLBACK for name, ranks in zip(self.parameters, fallback, strict=True) if ranks}
        )
        share = self.shares[self.ranks.rank]
        rows = range(self.first_row[share.start], self.first_row[share.stop])
        tokens = slice(self.first_token[rows.start], self.first_token[rows.stop])
        entropies, log_probs = (None if v is None else v[tokens] for v in (self.found.entropies, self.found.log_probs))
        own = Measured(self.found.scores[rows.start : rows.stop], entropies, log_probs)
        every = combine(own, self.responses, rows, self.ranks)
        check_finite(every.scores, self.responses)
        self.found = every

    @property
    def fallback(self) -> dict[str, nn.Parameter]:
        """The parameters that autograd serves unit by unit."""
        return {name: p for name, p in self.parameters.items() if self.treatments[name] is Treatment.FALLBACK}

    def _units_of(self, part: Microbatch) -> list[int]:
        """The units that rows of ``part`` belong to."""
        return sorted({self.unit_of_row[row] for row in part.rows})

    def _closed_by(self, part: Microbatch) -> list[int]:
        """The units whose last row ``part`` held."""
        return [unit for unit in self._units_of(part) if self.last_row[unit] in part.rows]

    def coverage(self) -> Coverage:
        """How the parameters were treated in the end."""
        total = sum(p.numel() for p in self.parameters.values())
        return Coverage(
            recomputed=tuple(name for name, how in self.treatments.items() if how is Treatment.RECOMPUTE),
            fallback=tuple(self.fallback),
            fallback_share=sum(p.numel() for p in self.fallback.values()) / total,
        )

    def backward(self, turn: Round, sink: Sink) -> None:
        """Add every sequence's gradient of these rows to its unit."""
        part, units = turn.part, turn.units_of_rank
        missing = [row for row in self.coefficients.needed_rows(part.rows) if row not in part.rows] if part.rows else []
        if any(bool(self.found.scores[row].isnan()) for row in missing):
            unknown = [row for row in (*part.rows, *missing) if bool(self.found.scores[row].isnan())]
            self._score_ahead(unknown, self.policy.measure_here)
        several = len(self._units_of(part)) > 1
        if (several and self.fallback) or not self._captured_backward(part, units, sink):
            # A parameter that the short rows did not show to be outside of the rules: from here on unit by unit.
            for _, rows in itertools.groupby(part.rows, key=self.unit_of_row.__getitem__):
                of_unit = list(rows)
                one = Microbatch(range(of_unit[0], of_unit[-1] + 1), part.whole)
                self._captured_backward(one, units, sink)

    def _captured_backward(self, part: Microbatch, units_of_rank: Sequence[Sequence[int]], sink: Sink) -> bool:
        """False, with nothing added, where a parameter turned out to need the fallback and the rows are of several units."""
        policy, fallback = self.policy, self.fallback
        single_unit = len(self._units_of(part)) == 1
        assert single_unit or not fallback
        with policy.arithmetic(), torch.enable_grad():
            captured = {name: p for name, p in self.parameters.items() if name not in fallback}
            anchor = torch.zeros((), device=policy.device, requires_grad=True)
            capture = Capture(
                captured,
                RULES,
                anchor,
                float64=policy.dtype == torch.float64,
                keeps_casts=not policy.sharding.sharded,
            )
            forwards: list[_Forward] = []
            # The backward is inside too: what it recomputes runs by the same rules.
            with (
                capture,
                treated(capture, self.owners, self.treatments),
                checkpointing(policy.model, capture.modes),
                announced(self.layers(), sink.arrive),
                noting(self.callers, self.ran),
            ):
                for rows, strip, padded in self._strips(part):
                    with capture.over(strip):
                        values = policy.token_values(padded, entropies=self.coefficients.needs_entropies)
                        forwards.append(_Forward(rows, strip, padded, values))
                escaped = {*leaked([root for forward in forwards for root in forward.roots], captured)}
                escaped |= capture.used & self.unproven - fallback.keys()
                if policy.sharding.sharded:
                    # On all ranks alike: else the others would wait for the one that refuses.
                    escaped = reached_anywhere(escaped, list(self.parameters), self.ranks)
                if not escaped:
                    self._record_scores(part, forwards)
                    if not any(root.requires_grad for forward in forwards for root in forward.roots):
                        return True
                    with torch.autocast(policy.device.type, enabled=False), capture.into(sink):
                        self._differentiate(forwards, capture, units_of_rank, sink, fallback)
        if not escaped:
            return True
        if policy.sharding.sharded:
            raise InputError(
                f"parameter {min(escaped)} is used in a way that no rule follows, or below something that cuts the graph "
                "(detach, no_grad), and the fallback needs whole weights: use replicated sharding"
            )
        # Only now, with this capture and its activations gone, may the rows be tried again.
        del forwards, capture
        self.treatments.update(dict.fromkeys(escaped, Treatment.FALLBACK))
        fall_back_around(self.owners, self.treatments, self.unproven)
        return single_unit and self._captured_backward(part, units_of_rank, sink)

    def _strips(self, part: Microbatch) -> Iterator[tuple[tuple[int, ...], Strip, PaddedResponses]]:
        """The rows of every forward; where weights are sharded, of the one that every rank runs."""
        if not part.rows:
            row = idle_row(self.responses)
            padded = pad_right([row], self.policy.device, padded_length([row.length]))
            yield (), Strip(IDLE, padded.input_ids.shape[1]), padded
            return
        every = strips(part.rows, self.lengths, self.unit_of_row)
        for rows in [tuple(part.rows)] if self.policy.sharding.sharded else every:
            lengths = [self.lengths[row] for row in rows]
            strip = Strip(tuple(self.unit_of_row[row] for row in rows), padded_length(lengths))
            yield rows, strip, pad_right([self.responses[row] for row in rows], self.policy.device, strip.length)

    def _score_ahead(self, rows: Sequence[int], measure: Callable[..., Measured]) -> None:
        """Scores (and entropies) of rows whose coefficients depend on more than a microbatch holds."""
        responses = [self.responses[row] for row in rows]
        measured = measure(responses, entropies=self.coefficients.needs_entropies)
        self._note(rows, measured)
        if self.ranks.count == 1:
            check_finite(self.found.scores[list(rows)], responses)

    def _record_scores(self, part: Microbatch, forwards: Sequence[_Forward]) -> None:
        for forward in forwards:
            if not forward.rows:
                continue
            log_probs, entropies = forward.values.log_probs.detach(), forward.values.entropies
            scores = sum_over_tokens(log_probs, forward.padded).cpu()
            of_tokens = None if entropies is None else entropies.detach().double().cpu()
            self._note(forward.rows, Measured(scores, of_tokens, log_probs.double().cpu()))
        if self.ranks.count == 1:
            rows = slice(part.rows.start, part.rows.stop)
            check_finite(self.found.scores[rows], self.responses[rows])

    def _note(self, rows: Sequence[int], measured: Measured) -> None:
        """Keep what is new: a second pass, or a prompt in pieces, must not mix two roundings of one score."""
        start = 0
        kept = (self.found.entropies, self.found.log_probs)
        for row, score in zip(rows, measured.scores, strict=True):
            tokens = slice(self.first_token[row], self.first_token[row + 1])
            stop = start + tokens.stop - tokens.start
            if bool(self.found.scores[row].isnan()):
                self.found.scores[row] = score
                for values, new in zip(kept, (measured.entropies, measured.log_probs), strict=True):
                    if values is not None:
                        assert new is not None
                        values[tokens] = new[start:stop]
            start = stop

    def _differentiate(
        self,
        forwards: Sequence[_Forward],
        capture: Capture,
        units_of_rank: Sequence[Sequence[int]],
        sink: Sink,
        fallback: Mapping[str, nn.Parameter],
    ) -> None:
        leaves = capture.take_leaves()
        wanted = [capture.anchor, *[leaf for _, leaf, _ in leaves], *fallback.values()]
        device, dtype = self.policy.device, sink.arithmetic
        # Every strip needs the same backwards; each is run over all strips at once.
        by_strip = [
            self.coefficients.backwards(f.rows, self.found, apart=bool(fallback)) if f.rows else self._idle_backwards()
            for f in forwards
        ]
        remaining = list(zip(*by_strip, strict=True))
        for number, backwards in enumerate(remaining):
            roots: list[Tensor] = []
            starts: list[Tensor] = []
            for forward, backward in zip(forwards, backwards, strict=True):
                forward.strip.mix(Mixing(backward.weights.to(device, dtype), backward.channels))
                for root, start in zip(
                    forward.roots, (backward.start.log_probs, backward.start.entropies), strict=False
                ):
                    if start is not None:
                        roots.append(root)
                        starts.append(start.to(root))
            sink.begin_backward(backwards[0].channels, units_of_rank)
            found = torch.autograd.grad(
                roots, wanted, starts, retain_graph=number + 1 < len(remaining), allow_unused=True
            )
            arrived = iter(found[1:])
            for name, _, strip in leaves:
                if (gradient := next(arrived)) is not None:
                    sink.add(name, gradient, strip)
            # Autograd has summed over the sequences of the one unit, whose coefficients stand at the tokens.
            together = Strip((forwards[0].strip.units[0],), 1)
            together.mix(Mixing(backwards[0].weights[:, :1].to(device, dtype), backwards[0].channels))
            for name in fallback:
                if (gradient := next(arrived)) is not None:
                    sink.add(name, gradient[None], together)
            sink.end_backward()

    def _idle_backwards(self) -> list[Backward]:
        """As many as other ranks' rows have, of one row of one token, with nothing to add."""
        none = torch.zeros(1, dtype=torch.float64)
        start = TokenPair(none, none if self.coefficients.needs_entropies else None)
        return [
            Backward(start, torch.zeros((len(range(c.start, c.stop)), 1), dtype=torch.float64), c)
            for c in self.coefficients.channels
        ]
