"""The engine: every unit's X_u and Y_u from one forward and one activation backward, exactly.

Sequences do not interact, so one backward of Σ_i S_i with unit coefficients leaves at every use of a parameter each
sequence's own output gradient; its gradient g_i is one GEMM, and enters X_u += c_i g_i and Y_u += a_i g_i (design section
6). Coefficients a token, as Rao-Blackwell has them, need a backward for X and one for Y. Parameters without a rule get both
gradients from autograd, unit by unit, in two backwards. Compared in float64 with :mod:`~entropy_probe.gradients.reference`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from entropy_probe.collectives import deal
from entropy_probe.errors import InputError
from entropy_probe.gradients.backward_order import Layer, announced, sharded_layers
from entropy_probe.gradients.batching import Microbatch, microbatches, strips
from entropy_probe.gradients.capture import Capture, Sink, leaked
from entropy_probe.gradients.checkpointing import checkpointing
from entropy_probe.gradients.coefficients import (
    Backward,
    Coefficients,
    Combinations,
    EntropyAndUpdate,
    EntropySide,
    Found,
    UpdateSide,
)
from entropy_probe.gradients.contractions import Contractions
from entropy_probe.gradients.exchange import Shards, exchanged, reached_anywhere
from entropy_probe.gradients.interface import Coverage, Look, Looked, Storage, UnitGradients
from entropy_probe.gradients.layers import RULES
from entropy_probe.gradients.modules import Treatment, fall_back_around, parameter_owners, treated
from entropy_probe.gradients.products import (
    Dots,
    StreamedSums,
    cross_kernel,
    looked_along,
    looked_kernel,
    own_sums,
    stored_dots,
    third_directions,
)
from entropy_probe.gradients.sequences import IDLE, Mixing, Strip, padded_length
from entropy_probe.gradients.sharded_vectors import ShardedVectors
from entropy_probe.gradients.treatments import Rules, prove_rules
from entropy_probe.gradients.unit_vectors import UnitVectors
from entropy_probe.policy import (
    Measured,
    PaddedResponses,
    Policy,
    TokenValues,
    check_finite,
    combine,
    idle_row,
    pad_right,
    sum_over_tokens,
)
from entropy_probe.progress import Progress, Silent
from entropy_probe.rollouts import RolloutBatch
from entropy_probe.scores import EntropyCoefficients, EntropyTarget
from entropy_probe.u_statistics import FloatArray
from entropy_probe.units import Units


def unit_gradients(
    policy: Policy,
    batch: RolloutBatch,
    units: Units,
    entropy: EntropyTarget | Tensor,
    advantage_coefficients: Tensor,
    preconditioners: Mapping[str, Tensor],
    learning_rates: Mapping[str, float],
    *,
    storage: Storage = Storage.STORED,
    vector_dtype: torch.dtype | None = None,
    thirds: bool = False,
    rules: Rules | None = None,
    look: Callable[[Mapping[str, Tensor]], Look] | None = None,
    progress: Progress | None = None,
) -> UnitGradients:
    """XS_u and YS_u for every unit, and their dots under P.

    Of several ranks each does its share of the units, and all get all the dots.

    Args:
        policy: the model at θ; trainable parameters are those that require grad.
        batch: the rollouts, flat order as in ``batch.responses``.
        units: a partition of its prompts.
        entropy: what X estimates, from the scores and entropies of this very forward; or its coefficients, one a response
            [N] or one a response token [tokens], flat.
        advantage_coefficients: a_i, [N].
        preconditioners: P by parameter name.
        learning_rates: η by parameter name; dots are kept apart by it.
        storage: keep all vectors (and get the kernel), or stream them in two passes.
        vector_dtype: of stored vectors; None takes the weights', float32 at least.
        thirds: whether to find the directions of :mod:`entropy_probe.noise`, three units or more, where vectors are stored.
        rules: of an earlier call on this very model; None proves them first.
        look: from Ȳ, what else to take dots of unit vectors with. Stored vectors are at hand; streamed, it is a third pass.
        progress: told of every microbatch.

    Raises:
        InputError: no trainable parameter receives a gradient, a score is not finite, sequences depend on each other, or the
            rules are another model's.
    """
    progress = progress if progress is not None else Silent()
    sharding = policy.sharding
    parameters = policy.trainable()
    rules = _proved(policy, batch, rules)
    shapes = {name: p.shape for name, p in parameters.items()}
    dtype = vector_dtype if vector_dtype is not None else torch.promote_types(policy.dtype, torch.float32)
    units_of_rank = units.deal(batch.positions, sharding.ranks.count)
    run = _Run(
        policy,
        batch,
        units.of_rows(batch.group_sizes),
        EntropyAndUpdate(batch, entropy, advantage_coefficients),
        dict(rules.treatments),
        rules.unproven,
        [units.prompts(share) for share in units_of_rank],
    )
    every, own = range(len(units.ranges)), units_of_rank[sharding.ranks.rank]
    directions: tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]] | None = None
    shards: Shards | None = None
    y_sums: dict[str, Tensor] = {}
    if storage is Storage.STORED:
        held = every if sharding.sharded else own
        vectors = run.vectors(shapes, len(held), dtype)
        vectors.open(held)
        rounds = run.rounds()
        for turn in progress.track(rounds, "unit gradients", len(rounds)):
            run.backward(turn, vectors)
        run.share()
        vectors.settle(held)
        reached = reached_anywhere(vectors.reached, list(shapes), sharding.ranks)
        vectors.reached = reached
        if isinstance(vectors, ShardedVectors):
            shards = vectors
        else:
            if sharding.replicated:
                y_sums = own_sums(vectors, own, sharding)
                if thirds:
                    directions = third_directions(vectors, own, units.sizes, preconditioners, learning_rates, sharding)
            shards = exchanged(vectors, units_of_rank, sharding)
        dots = stored_dots(shards, units.sizes, preconditioners, learning_rates, sharding.ranks)
        if not sharding.replicated:
            y_sums = dots.y_sums
            if thirds:
                directions = third_directions(shards, every, units.sizes, preconditioners, learning_rates, sharding)
    else:
        dots, reached = _streamed(run, units, shapes, dtype, preconditioners, learning_rates, progress)
        y_sums = dots.y_sums
    if not reached:
        raise InputError("no trainable parameter receives a gradient from these responses; is the model frozen?")
    prompts = len(batch.groups)
    ascent = {
        name: y_sums[name].div_(prompts).view(sharding.held(name, shapes[name])) for name in shapes if name in y_sums
    }
    looked = None
    if look is not None:
        if shards is not None:
            asked = look(ascent)
            along, kernel = looked_along(shards, every, ascent, asked), looked_kernel(shards, every, ascent, asked)
            numbers = sharding.ranks.sum_numbers(torch.cat([along, kernel.to(along)], dim=1).cpu().numpy())
            looked = Looked(numbers[:, : asked.count], numbers[:, asked.count :])
        else:
            looked = Looked(_third_pass(run, len(every), shapes, dtype, ascent, look(ascent), progress), None)
    return UnitGradients(
        dots=dots.dots,
        ascent=ascent,
        untouched=tuple(name for name in parameters if name not in reached),
        scores=run.found.scores,
        token_entropies=run.found.token_entropies,
        third_directions=directions,
        coverage=run.coverage(),
        rules=replace(rules, treatments=run.treatments),
        looked=looked,
    )


def _third_pass(
    run: _Run,
    units: int,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    names: Collection[str],
    look: Look,
    progress: Progress,
) -> FloatArray:
    """:func:`looked_along` from the vectors of a few units at a time."""
    rounds = run.rounds()
    vectors = run.vectors(shapes, most_open_units(rounds), dtype)
    along = np.zeros((units, look.count))
    for turn in progress.track(rounds, "unit gradients, third pass", len(rounds)):
        vectors.open(turn.open)
        run.backward(turn, vectors)
        if turn.closed:
            vectors.settle(turn.closed)
            along[turn.closed] = looked_along(vectors, turn.closed, names, look).cpu().numpy()
            vectors.close(turn.closed)
    return run.ranks.sum_numbers(along)


def _streamed(
    run: _Run,
    units: Units,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    preconditioners: Mapping[str, Tensor],
    learning_rates: Mapping[str, float],
    progress: Progress,
) -> tuple[Dots, set[str]]:
    """Two passes: sums and diagonal from the vectors of a few units at a time, then every unit's dots with the sums."""
    rounds = run.rounds()
    vectors = run.vectors(shapes, most_open_units(rounds), dtype)
    sums = StreamedSums(preconditioners, learning_rates, vectors.arithmetic, len(units.ranges), run.policy.sharding)
    for turn in progress.track(rounds, "unit gradients, first pass", len(rounds)):
        vectors.open(turn.open)
        run.backward(turn, vectors)
        if turn.closed:
            vectors.settle(turn.closed)
            sums.add(vectors, turn.closed)
            vectors.close(turn.closed)
    run.share()
    reached = reached_anywhere(vectors.reached, list(shapes), run.ranks)
    sums.reduce(vectors)
    del vectors
    contractions = run.contractions(sums.directions(), len(units.ranges), dtype)
    for turn in progress.track(rounds, "unit gradients, second pass", len(rounds)):
        run.backward(turn, contractions)
    return sums.finish(contractions, units.sizes, reached), reached


def cross_gradients(
    policy: Policy,
    evaluation: RolloutBatch,
    update: RolloutBatch,
    target: EntropyTarget,
    advantage_coefficients: Tensor,
    preconditioners: Mapping[str, Tensor],
    learning_rates: Mapping[str, float],
    *,
    vector_dtype: torch.dtype | None = None,
    rules: Rules | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """X_n · η P Y_m for prompts n of one batch and m of another, all vectors stored: float64 [B_E, B_U], on the CPU.

    Args:
        policy: the model at θ.
        evaluation: its prompts' X are taken; one response a prompt will do for Rao-Blackwell.
        update: its prompts' Y are taken.
        target: what X estimates.
        advantage_coefficients: a, of the update batch's responses.
        preconditioners: P by parameter name.
        learning_rates: η by parameter name.
        rules: of an earlier call on this very model; None proves them first.
        vector_dtype: of stored vectors; None takes the weights', float32 at least.
        progress: told of every microbatch.
    """
    progress = progress if progress is not None else Silent()
    rules = _proved(policy, evaluation, rules)
    parameters = policy.trainable()
    counts = (len(evaluation.groups), len(update.groups))
    dtype = vector_dtype if vector_dtype is not None else torch.promote_types(policy.dtype, torch.float32)
    shapes = {name: p.shape for name, p in parameters.items()}
    sharding = policy.sharding
    shares = [deal(part.positions, sharding.ranks.count) for part in (evaluation, update)]
    units_of_rank = [
        [*of_evaluation, *(counts[0] + n for n in of_update)] for of_evaluation, of_update in zip(*shares, strict=True)
    ]
    treatments = dict(rules.treatments)
    sides: list[tuple[RolloutBatch, Coefficients, int, list[range]]] = [
        (evaluation, EntropySide(evaluation, target), 0, shares[0]),
        (update, UpdateSide(update, advantage_coefficients), counts[0], shares[1]),
    ]
    runs = [
        _Run(
            policy,
            batch,
            [first + n for n, size in enumerate(batch.group_sizes) for _ in range(size)],
            coefficients,
            treatments,
            rules.unproven,
            share,
        )
        for batch, coefficients, first, share in sides
    ]
    held = range(sum(counts)) if sharding.sharded else units_of_rank[sharding.ranks.rank]
    vectors = runs[0].vectors(shapes, len(held), dtype, channels=1)
    vectors.open(held)
    for run in runs:
        rounds = run.rounds()
        for turn in progress.track(rounds, "gradients of two batches", len(rounds)):
            run.backward(turn, vectors)
        run.share()
    vectors.settle(held)
    shards = vectors if isinstance(vectors, ShardedVectors) else exchanged(vectors, units_of_rank, sharding)
    rows, columns = range(counts[0]), range(counts[0], sum(counts))
    return cross_kernel(shards, rows, columns, preconditioners, learning_rates, sharding.ranks)


def weighted_gradient(
    policy: Policy,
    batch: RolloutBatch,
    coefficients: Tensor,
    *,
    rules: Rules | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Σ_i a_i ∇S_i over all responses, by parameter name, float64; of parameters that some response reaches.

    Of several ranks each does its share; each gets the sum, or of shards its rows of it.

    Args:
        policy: the model at θ.
        batch: the rollouts.
        coefficients: a, [N].
        rules: of an earlier call on this very model; None proves them first.
        progress: told of every microbatch.
    """
    progress = progress if progress is not None else Silent()
    rules = _proved(policy, batch, rules)
    sharding, shapes = policy.sharding, {name: p.shape for name, p in policy.trainable().items()}
    shares = deal(batch.positions, sharding.ranks.count)
    all_one_unit = [0] * len(batch.responses)
    side = UpdateSide(batch, coefficients)
    run = _Run(policy, batch, all_one_unit, side, dict(rules.treatments), rules.unproven, shares)
    vectors = run.vectors(shapes, 1, torch.promote_types(policy.dtype, torch.float32), channels=1)
    vectors.open([0])
    rounds = run.rounds()
    for turn in progress.track(rounds, "gradient", len(rounds)):
        run.backward(turn, vectors)
    run.share()
    vectors.settle([0])
    reached = reached_anywhere(vectors.reached, list(shapes), sharding.ranks)
    found = {name: vectors.of(name, [0])[0, 0].double() for name in shapes if name in reached}
    if sharding.replicated:
        sharding.ranks.sum_vectors(list(found.values()))
    return {name: total.view(sharding.held(name, shapes[name])) for name, total in found.items()}


def response_dots(
    policy: Policy,
    batch: RolloutBatch,
    directions: Sequence[Mapping[str, Tensor]],
    combinations: Sequence[EntropyCoefficients] | None = None,
    *,
    rules: Rules | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """What every response changes to first order in each direction: float64 [N, M, K], on the CPU.

    D_imk = Σ_t (l_mit ∇log π_it + e_mit ∇H_it) · V_k, by one forward and M backwards. By default M = 1 and D_i1k = dS_i =
    ∇S_i · V_k.

    Args:
        policy: the model at θ.
        batch: the rollouts.
        directions: V by parameter name; names that one lacks count as zero, and names that are not trainable are passed by.
        combinations: l and e, each one value a response [N] or one a response token [tokens], e None for zeros.
        rules: of an earlier call on this very model; None proves them first.
        progress: told of every microbatch.
    """
    if combinations is None:
        combinations = [EntropyCoefficients(torch.ones(len(batch.responses), dtype=torch.float64))]
    count = len(directions)
    channels = [slice(m * count, (m + 1) * count) for m in range(len(combinations))]
    dots = _contracted(policy, batch, directions, combinations, channels, rules, progress)
    return dots.view(len(batch.responses), len(combinations), count)


def response_parts(
    policy: Policy,
    batch: RolloutBatch,
    target: EntropyTarget,
    measured: Measured,
    advantage_coefficients: Tensor,
    x_directions: Sequence[Mapping[str, Tensor]],
    y_directions: Sequence[Mapping[str, Tensor]],
    *,
    rules: Rules | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """ξ_ik and ψ_ik, what each response adds to X_n · V_k and to Y_n · W_k: float64 [N, K] each, on the CPU.

    Args:
        policy: the model at θ.
        batch: the rollouts.
        target: what X estimates.
        measured: scores, and entropies where the target needs them, as found at θ.
        advantage_coefficients: a, [N].
        x_directions: V by parameter name.
        y_directions: W by parameter name.
        rules: of an earlier call on this very model; None proves them first.
        progress: told of every microbatch.
    """
    found = Found(measured.scores, measured.entropies)
    x = EntropySide(batch, target).of_rows(range(len(batch.responses)), found)
    ones = EntropyCoefficients(torch.ones(len(batch.responses), dtype=torch.float64))
    of_x = slice(0, len(x_directions))
    of_y = slice(of_x.stop, of_x.stop + len(y_directions))
    directions = [*x_directions, *y_directions]
    if x.entropies is None:
        # Coefficients a response stand outside of dS_i · V_k, which is then all that is needed.
        dots = _contracted(policy, batch, directions, [ones], [slice(0, of_y.stop)], rules, progress)
        dots[:, of_x] *= x.log_probs.double()[:, None]
    else:
        dots = _contracted(policy, batch, directions, [x, ones], [of_x, of_y], rules, progress)
    return dots[:, of_x], dots[:, of_y] * advantage_coefficients.double()[:, None]


def _contracted(
    policy: Policy,
    batch: RolloutBatch,
    directions: Sequence[Mapping[str, Tensor]],
    combinations: Sequence[EntropyCoefficients],
    channels: Sequence[slice],
    rules: Rules | None,
    progress: Progress | None,
) -> Tensor:
    """Each row's combinations in the directions of their channels (modulo the number of directions): [N, channels]."""
    progress = progress if progress is not None else Silent()
    rules = _proved(policy, batch, rules)
    rows = list(range(len(batch.responses)))
    like = {name: policy.sharding.held(name, p.shape).numel() for name, p in policy.trainable().items()}
    # In the type that the contractions want: a stack in float64 beside theirs would be 16 bytes a parameter and more.
    arithmetic = torch.promote_types(policy.dtype, torch.float32)
    zeros = {name: torch.zeros(count, dtype=arithmetic, device=policy.device) for name, count in like.items()}
    together = {
        name: torch.stack([v[name].flatten().to(zero) if name in v else zero for v in directions])
        for name, zero in zeros.items()
    }
    run = _Run(
        policy,
        batch,
        rows,
        Combinations(batch, combinations, channels),
        dict(rules.treatments),
        rules.unproven,
        deal(batch.positions, policy.sharding.ranks.count),
    )
    combined = -(-max(c.stop for c in channels) // len(directions))
    contractions = run.contractions(together, len(rows), policy.dtype, combined)
    rounds = run.rounds()
    for turn in progress.track(rounds, "dots with directions", len(rounds)):
        run.backward(turn, contractions)
    return torch.from_numpy(run.ranks.sum_numbers(contractions.total.cpu().numpy()))


def _proved(policy: Policy, batch: RolloutBatch, rules: Rules | None) -> Rules:
    """Rules of an earlier call, if they are this model's, or new ones."""
    if rules is None:
        return prove_rules(policy, batch)
    rules.check(policy)
    return rules


@dataclass
class _Run:
    """The rows, units and coefficients of one call, and what its forwards have found so far.

    ``shares`` are the consecutive prompts whose rows are each rank's; rows and units keep their numbers in the whole batch.
    """

    policy: Policy
    batch: RolloutBatch
    unit_of_row: Sequence[int]
    coefficients: Coefficients
    treatments: dict[str, Treatment]
    unproven: frozenset[str]
    shares: Sequence[range]
    found: Found = field(init=False)

    def __post_init__(self) -> None:
        self.responses = self.batch.responses
        self.first_token = [0, *itertools.accumulate(len(r.response_ids) for r in self.responses)]
        counts = (len(self.responses), self.first_token[-1])
        unknown = [torch.full((count,), torch.nan, dtype=torch.float64) for count in counts]
        self.found = Found(unknown[0], unknown[1] if self.coefficients.needs_entropies else None)
        self.last_row = {unit: row for row, unit in enumerate(self.unit_of_row)}
        self.lengths = [response.length for response in self.responses]
        self.parameters = self.policy.in_forwards()
        self.owners = parameter_owners(self.policy.model, self.policy.trainable())
        self.ranks = self.policy.sharding.ranks
        self.first_row = [0, *itertools.accumulate(self.batch.group_sizes)]

    def rounds(self) -> list[Round]:
        """The microbatches of one pass over this rank's rows; where weights are sharded, as many on every rank."""
        if self._rows_of_others():
            # All ranks together, not each all of them.
            self._score_ahead(range(len(self.responses)), self.policy.measure)
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
        self, directions: Mapping[str, Tensor], units: int, dtype: torch.dtype, combinations: int = 1
    ) -> Contractions:
        """Dots with directions, of which sharded ranks have their spans."""
        sharding = self.policy.sharding
        layers = [layer.names for layer in self.layers()]
        return Contractions(directions, units, dtype, self.policy.device, combinations, sharding, layers)

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
        tokens, entropies = slice(self.first_token[rows.start], self.first_token[rows.stop]), self.found.token_entropies
        own = Measured(self.found.scores[rows.start : rows.stop], None if entropies is None else entropies[tokens])
        every = combine(own, self.responses, rows, self.ranks)
        check_finite(every.scores, self.responses)
        self.found = Found(every.scores, every.entropies)

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
                f"parameter {min(escaped)} is used in a way that no rule follows, and the fallback needs whole weights: use "
                "--sharding replicated"
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
        self._note(rows, measured.scores, measured.entropies)
        if self.ranks.count == 1:
            check_finite(self.found.scores[list(rows)], responses)

    def _record_scores(self, part: Microbatch, forwards: Sequence[_Forward]) -> None:
        for forward in forwards:
            if not forward.rows:
                continue
            scores = sum_over_tokens(forward.values.log_probs.detach(), forward.padded).cpu()
            entropies = forward.values.entropies
            self._note(forward.rows, scores, None if entropies is None else entropies.detach().double().cpu())
        if self.ranks.count == 1:
            rows = slice(part.rows.start, part.rows.stop)
            check_finite(self.found.scores[rows], self.responses[rows])

    def _note(self, rows: Sequence[int], scores: Tensor, entropies: Tensor | None) -> None:
        """Keep what is new: a second pass, or a prompt in pieces, must not mix two roundings of one score."""
        start = 0
        for row, score in zip(rows, scores, strict=True):
            tokens = slice(self.first_token[row], self.first_token[row + 1])
            stop = start + tokens.stop - tokens.start
            if bool(self.found.scores[row].isnan()):
                self.found.scores[row] = score
                if self.found.token_entropies is not None:
                    assert entropies is not None
                    self.found.token_entropies[tokens] = entropies[start:stop]
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
                for root, start in zip(forward.roots, (backward.log_probs, backward.entropies), strict=False):
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
        entropies = none if self.coefficients.needs_entropies else None
        return [
            Backward(none, entropies, torch.zeros((len(range(c.start, c.stop)), 1), dtype=torch.float64), c)
            for c in self.coefficients.channels
        ]


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
