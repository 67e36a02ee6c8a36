"""The engine: every unit's X_u and Y_u from one forward and one activation backward, exactly.

Sequences do not interact, so one backward of Σ_i S_i with unit coefficients leaves at every use of a parameter each
sequence's own output gradient; its gradient g_i is one GEMM, and enters X_u += c_i g_i and Y_u += a_i g_i
(docs/method.md, section 8). Coefficients a token, as Rao-Blackwell has them, need a backward for X and one for Y.
Parameters without a rule get both gradients from autograd, unit by unit, in two backwards. Compared in float64 with
:mod:`~entropy_probe.gradients.reference`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from entropy_probe.common.arrays import FloatArray
from entropy_probe.common.progress import Progress, Silent
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.data.units import Units
from entropy_probe.errors import InputError
from entropy_probe.gradients.coefficients import (
    BothSides,
    Coefficients,
    Combinations,
    ResponseSide,
    Sides,
    TargetSide,
)
from entropy_probe.gradients.interface import DOTS_ALONE, Directions, Looked, Storage, UnitGradients, Wanted
from entropy_probe.gradients.passes import Passes, most_open_units
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
from entropy_probe.gradients.treatments import Rules, prove_rules
from entropy_probe.gradients.unreached import unexplained
from entropy_probe.gradients.vectors.exchange import Shards, exchanged, reached_anywhere
from entropy_probe.gradients.vectors.sharded_vectors import ShardedVectors
from entropy_probe.model.measured import Measured
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.base import Look
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.ranks.dealing import deal
from entropy_probe.targets.base import Target, TokenPair


def unit_gradients(
    policy: Policy,
    batch: RolloutBatch,
    units: Units,
    sides: Sides,
    geometry: Geometry,
    *,
    wanted: Wanted = DOTS_ALONE,
    rules: Rules | None = None,
    progress: Progress | None = None,
) -> UnitGradients:
    """XS_u and YS_u for every unit, and their dots under P.

    Of several ranks each does its share of the units, and all get all the dots.

    Args:
        policy: the model at θ; trainable parameters are those that require grad.
        batch: the rollouts, flat order as in ``batch.responses``.
        units: a partition of its prompts.
        sides: what X, Y and the vectors of further targets are made of.
        geometry: P and η, and the type of stored vectors; dots are kept apart by its dot groups.
        wanted: whether vectors are stored, and what else is taken of them.
        rules: of an earlier call on this very model; None proves them first.
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
    dtype = geometry.vector_dtype(policy.dtype)
    units_of_rank = units.deal(batch.positions, sharding.ranks.count)
    both = BothSides(TargetSide(batch, sides.target), sides.weights(batch))
    passes = Passes(
        policy,
        batch,
        units.of_rows(batch.group_sizes),
        both,
        dict(rules.treatments),
        rules.unproven,
        [units.prompts(share) for share in units_of_rank],
    )
    every, own = range(len(units.ranges)), units_of_rank[sharding.ranks.rank]
    directions: Directions | None = None
    shards: Shards | None = None
    y_sums: dict[str, Tensor] = {}
    if wanted.storage is Storage.STORED:
        held = every if sharding.sharded else own
        vectors = passes.vectors(shapes, len(held), dtype, sides.channels)
        vectors.open(held)
        rounds = passes.rounds()
        for turn in progress.track(rounds, "unit gradients", len(rounds)):
            passes.backward(turn, vectors)
        passes.share()
        vectors.settle(held)
        reached = reached_anywhere(vectors.reached, list(shapes), sharding.ranks)
        vectors.reached = reached
        if isinstance(vectors, ShardedVectors):
            shards = vectors
        else:
            if sharding.replicated:
                y_sums = own_sums(vectors, own, sharding)
                if wanted.thirds:
                    directions = third_directions(vectors, own, units.sizes, geometry, sharding)
            shards = exchanged(vectors, units_of_rank, sharding)
        dots, *also = (
            stored_dots(shards, units.sizes, geometry, sharding.ranks, left=channel)
            for channel in (0, *range(2, sides.channels))
        )
        if not sharding.replicated:
            y_sums = dots.y_sums
            if wanted.thirds:
                directions = third_directions(shards, every, units.sizes, geometry, sharding)
    elif wanted.storage is Storage.STREAMED:
        (dots, *also), reached = _streamed(passes, both, units, dtype, geometry, progress)
        y_sums = dots.y_sums
    else:
        assert_never(wanted.storage)
    if not reached:
        raise InputError("no trainable parameter receives a gradient from these responses; is the model frozen?")
    prompts = len(batch.groups)
    ascent = {
        name: y_sums[name].div_(prompts).view(sharding.held(name, shapes[name])) for name in shapes if name in y_sums
    }
    looked = None
    if wanted.look is not None:
        if shards is not None:
            asked = wanted.look(ascent)
            along, kernel = looked_along(shards, every, ascent, asked), looked_kernel(shards, every, ascent, asked)
            numbers = sharding.ranks.sum_numbers(torch.cat([along, kernel.to(along)], dim=1).cpu().numpy())
            looked = Looked(numbers[:, : asked.count], numbers[:, asked.count :])
        else:
            passes.coefficients = both.of_xy()
            looked = Looked(_third_pass(passes, len(every), shapes, dtype, ascent, wanted.look(ascent), progress), None)
    untouched = tuple(name for name in parameters if name not in reached)
    ran = reached_anywhere(passes.ran, list(shapes), sharding.ranks) if untouched else set()
    return UnitGradients(
        dots=dots.dots,
        also={target.name: found.dots for target, found in zip(sides.also, also, strict=True)},
        ascent=ascent,
        untouched=untouched,
        cut=unexplained(policy.model, untouched, ran),
        scores=passes.found.scores,
        token_entropies=passes.found.entropies,
        third_directions=directions,
        coverage=passes.coverage(),
        rules=replace(rules, treatments=passes.treatments),
        looked=looked,
        zero_v=dots.zero_v,
    )


def _third_pass(
    passes: Passes,
    units: int,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    names: Collection[str],
    look: Look,
    progress: Progress,
) -> FloatArray:
    """:func:`looked_along` from the vectors of a few units at a time."""
    rounds = passes.rounds()
    vectors = passes.vectors(shapes, most_open_units(rounds), dtype)
    along = np.zeros((units, look.count))
    for turn in progress.track(rounds, "unit gradients, third pass", len(rounds)):
        vectors.open(turn.open)
        passes.backward(turn, vectors)
        if turn.closed:
            vectors.settle(turn.closed)
            along[turn.closed] = looked_along(vectors, turn.closed, names, look).cpu().numpy()
            vectors.close(turn.closed)
    return passes.ranks.sum_numbers(along)


def _streamed(
    passes: Passes,
    both: BothSides,
    units: Units,
    dtype: torch.dtype,
    geometry: Geometry,
    progress: Progress,
) -> tuple[list[Dots], set[str]]:
    """Two passes: sums and diagonal from the vectors of a few units at a time, then every unit's dots with the sums.

    Dots of X with Y, then those of every further target's vectors.
    """
    sharding, shapes = passes.policy.sharding, {name: p.shape for name, p in passes.policy.trainable().items()}
    rounds = passes.rounds()
    vectors = passes.vectors(shapes, most_open_units(rounds), dtype, both.count)
    sums = [
        StreamedSums(geometry, vectors.arithmetic, len(units.ranges), sharding, left=channel)
        for channel in (0, *range(2, both.count))
    ]
    for of_target in sums[1:]:
        of_target.y_sums = sums[0].y_sums
    for turn in progress.track(rounds, "unit gradients, first pass", len(rounds)):
        vectors.open(turn.open)
        passes.backward(turn, vectors)
        if turn.closed:
            vectors.settle(turn.closed)
            for of_target in sums:
                of_target.add(vectors, turn.closed)
            vectors.close(turn.closed)
    passes.share()
    reached = reached_anywhere(vectors.reached, list(shapes), passes.ranks)
    for of_target in sums:
        of_target.reduce(vectors)
    del vectors
    # Every Z_u meets P ΣY, and Y_u meets every P ΣZ: the same ∇S with weights that are known.
    also = len(sums) - 1
    passes.coefficients = both.with_y_again(also)
    of_channel = [0, 1, *[0] * also, *range(2, 2 + also)]
    contractions = passes.contractions(sums[0].directions(sums[1:]), len(units.ranges), dtype, of_channel)
    for turn in progress.track(rounds, "unit gradients, second pass", len(rounds)):
        passes.backward(turn, contractions)
    channels = [(0, 1), *((2 + k, 2 + also + k) for k in range(also))]
    found = [
        of_target.finish(contractions, units.sizes, reached, pair)
        for of_target, pair in zip(sums, channels, strict=True)
    ]
    return found, reached


def cross_gradients(
    policy: Policy,
    evaluation: RolloutBatch,
    update: RolloutBatch,
    target: Target,
    advantage_coefficients: Tensor,
    geometry: Geometry,
    *,
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
        geometry: P and η, and the type of stored vectors.
        rules: of an earlier call on this very model; None proves them first.
        progress: told of every microbatch.
    """
    progress = progress if progress is not None else Silent()
    rules = _proved(policy, evaluation, rules)
    parameters = policy.trainable()
    counts = (len(evaluation.groups), len(update.groups))
    dtype = geometry.vector_dtype(policy.dtype)
    shapes = {name: p.shape for name, p in parameters.items()}
    sharding = policy.sharding
    shares = [deal(part.positions, sharding.ranks.count) for part in (evaluation, update)]
    units_of_rank = [
        [*of_evaluation, *(counts[0] + n for n in of_update)] for of_evaluation, of_update in zip(*shares, strict=True)
    ]
    treatments = dict(rules.treatments)
    sides: list[tuple[RolloutBatch, Coefficients, int, list[range]]] = [
        (evaluation, TargetSide(evaluation, target), 0, shares[0]),
        (update, ResponseSide(update, advantage_coefficients[None]), counts[0], shares[1]),
    ]
    both = [
        Passes(
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
    vectors = both[0].vectors(shapes, len(held), dtype, channels=1)
    vectors.open(held)
    for passes in both:
        rounds = passes.rounds()
        for turn in progress.track(rounds, "gradients of two batches", len(rounds)):
            passes.backward(turn, vectors)
        passes.share()
    vectors.settle(held)
    shards = vectors if isinstance(vectors, ShardedVectors) else exchanged(vectors, units_of_rank, sharding)
    rows, columns = range(counts[0]), range(counts[0], sum(counts))
    return cross_kernel(shards, rows, columns, geometry, sharding.ranks)


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
    side = ResponseSide(batch, coefficients[None])
    passes = Passes(policy, batch, all_one_unit, side, dict(rules.treatments), rules.unproven, shares)
    vectors = passes.vectors(shapes, 1, torch.promote_types(policy.dtype, torch.float32), channels=1)
    vectors.open([0])
    rounds = passes.rounds()
    for turn in progress.track(rounds, "gradient", len(rounds)):
        passes.backward(turn, vectors)
    passes.share()
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
    combinations: Sequence[TokenPair] | None = None,
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
        combinations = [TokenPair(torch.ones(len(batch.responses), dtype=torch.float64))]
    count = len(directions)
    channels = [slice(m * count, (m + 1) * count) for m in range(len(combinations))]
    dots = _contracted(policy, batch, directions, combinations, channels, rules, progress)
    return dots.view(len(batch.responses), len(combinations), count)


def response_parts(
    policy: Policy,
    batch: RolloutBatch,
    target: Target,
    measured: Measured,
    advantage_coefficients: Tensor,
    directions: Directions,
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
        directions: V and W.
        rules: of an earlier call on this very model; None proves them first.
        progress: told of every microbatch.
    """
    x = TargetSide(batch, target).of_rows(range(len(batch.responses)), measured)
    ones = TokenPair(torch.ones(len(batch.responses), dtype=torch.float64))
    of_x = slice(0, len(directions.of_x))
    of_y = slice(of_x.stop, of_x.stop + len(directions.of_y))
    every = [*directions.of_x, *directions.of_y]
    if x.entropies is None:
        # Coefficients a response stand outside of dS_i · V_k, which is then all that is needed.
        dots = _contracted(policy, batch, every, [ones], [slice(0, of_y.stop)], rules, progress)
        dots[:, of_x] *= x.log_probs.double()[:, None]
    else:
        dots = _contracted(policy, batch, every, [x, ones], [of_x, of_y], rules, progress)
    return dots[:, of_x], dots[:, of_y] * advantage_coefficients.double()[:, None]


def _contracted(
    policy: Policy,
    batch: RolloutBatch,
    directions: Sequence[Mapping[str, Tensor]],
    combinations: Sequence[TokenPair],
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
    passes = Passes(
        policy,
        batch,
        rows,
        Combinations(batch, combinations, channels),
        dict(rules.treatments),
        rules.unproven,
        deal(batch.positions, policy.sharding.ranks.count),
    )
    of_channel = [channel % len(directions) for channel in range(max(c.stop for c in channels))]
    contractions = passes.contractions(together, len(rows), policy.dtype, of_channel)
    rounds = passes.rounds()
    for turn in progress.track(rounds, "dots with directions", len(rounds)):
        passes.backward(turn, contractions)
    return torch.from_numpy(passes.ranks.sum_numbers(contractions.total.cpu().numpy()))


def _proved(policy: Policy, batch: RolloutBatch, rules: Rules | None) -> Rules:
    """Rules of an earlier call, if they are this model's, or new ones."""
    if rules is None:
        return prove_rules(policy, batch)
    rules.check(policy)
    return rules
