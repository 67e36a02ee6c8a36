"""The engine: every unit's X_u and Y_u from one forward and one activation backward, exactly.

Sequences do not interact, so one backward of Σ_i S_i with unit coefficients leaves at every use of a parameter each
sequence's own output gradient; its gradient g_i is one GEMM, and enters X_u += c_i g_i and Y_u += a_i g_i
(docs/method.md, section 8). Coefficients a token need a backward of their own: Rao-Blackwell's X, and a Y whose loss
weighs tokens; what multiplies ∇H_t is added at the logits in the same one. Parameters without a rule get every gradient from
autograd, unit by unit, in a backward each. Compared in float64 with
:mod:`~entropy_probe.gradients.reference`.
"""

from __future__ import annotations

from collections.abc import Collection
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
from entropy_probe.gradients.coefficients import BothSides, Sides
from entropy_probe.gradients.interface import DOTS_ALONE, Directions, Looked, Storage, UnitGradients, Wanted
from entropy_probe.gradients.passes import Passes, most_open_units
from entropy_probe.gradients.products import (
    Dots,
    StreamedSums,
    add_sums,
    looked_along,
    looked_kernels,
    own_sums,
    stored_dots,
    third_directions,
)
from entropy_probe.gradients.treatments import Rules, prove_rules
from entropy_probe.gradients.unreached import unexplained
from entropy_probe.gradients.vectors.exchange import Shards, exchanged, reached_anywhere
from entropy_probe.gradients.vectors.sharded_vectors import ShardedVectors
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.base import Look
from entropy_probe.optimizers.geometry import Geometry


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
    rules = proved(policy, batch, rules)
    shapes = {name: p.shape for name, p in parameters.items()}
    dtype = geometry.vector_dtype(policy.dtype)
    units_of_rank = units.deal(batch.positions, sharding.ranks.count)
    both = BothSides.of(batch, sides)
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
    x_sums: dict[str, Tensor] = {}
    y_sums: dict[str, Tensor] = {}
    term_sums: list[dict[str, Tensor]] = []
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
        term_sums = [own_sums(vectors, held, sharding, channel) for channel in both.of_terms]
        if isinstance(vectors, ShardedVectors):
            shards = vectors
        else:
            if sharding.replicated:
                x_sums, y_sums = (own_sums(vectors, own, sharding, channel) for channel in (0, both.y))
                if wanted.thirds:
                    directions = third_directions(vectors, own, units.sizes, geometry, sharding, both.y)
            shards = exchanged(vectors, units_of_rank, sharding)
        dots, *also = (
            stored_dots(shards, units.sizes, geometry, sharding.ranks, (channel, both.y)) for channel in (0, *both.z)
        )
        if not sharding.replicated:
            x_sums, y_sums = dots.x_sums, dots.y_sums
            if wanted.thirds:
                directions = third_directions(shards, every, units.sizes, geometry, sharding, both.y)
    elif wanted.storage is Storage.STREAMED:
        (dots, *also), term_sums, reached = _streamed(passes, both, units, dtype, geometry, progress)
        x_sums, y_sums = dots.x_sums, dots.y_sums
    else:
        assert_never(wanted.storage)
    if not reached:
        raise InputError("no trainable parameter receives a gradient from these responses; is the model frozen?")
    prompts = len(batch.groups)
    slope, ascent, *term_ascents = (
        {name: sums[name].div_(prompts).view(sharding.held(name, shapes[name])) for name in shapes if name in y_sums}
        for sums in (x_sums, y_sums, *term_sums)
    )
    looked = None
    if wanted.look is not None:
        asked, channels = wanted.look(ascent, term_ascents), (both.y, *both.of_terms)
        if shards is not None:
            along = looked_along(shards, every, ascent, asked, channels)
            kernels = looked_kernels(shards, every, ascent, asked, channels)
            beside = torch.cat([along, *kernels.to(along)], dim=1)
            numbers = sharding.ranks.sum_numbers(beside.cpu().numpy())
            kernel, *of_terms = np.split(numbers[:, asked.count :], len(channels), axis=1)
            looked = Looked(numbers[:, : asked.count], kernel, np.array(of_terms).reshape(-1, *kernel.shape))
        else:
            looked = Looked(_third_pass(passes, both, len(every), dtype, ascent, asked, progress), None)
    untouched = tuple(name for name in parameters if name not in reached)
    ran = reached_anywhere(passes.ran, list(shapes), sharding.ranks) if untouched else set()
    return UnitGradients(
        dots=dots.dots,
        also={target.name: found.dots for target, found in zip(sides.also, also, strict=True)},
        ascent=ascent,
        slope=slope,
        untouched=untouched,
        cut=unexplained(policy.model, untouched, ran),
        scores=passes.found.scores,
        token_entropies=passes.found.entropies,
        token_log_probs=passes.found.log_probs,
        third_directions=directions,
        coverage=passes.coverage(),
        rules=replace(rules, treatments=passes.treatments),
        looked=looked,
        zero_v=dots.zero_v,
    )


def _third_pass(
    passes: Passes,
    both: BothSides,
    units: int,
    dtype: torch.dtype,
    names: Collection[str],
    look: Look,
    progress: Progress,
) -> FloatArray:
    """:func:`looked_along` from the vectors of a few units at a time."""
    sides = both.without_targets()
    passes.coefficients = sides
    rounds, shapes = passes.rounds(), {name: p.shape for name, p in passes.policy.trainable().items()}
    vectors = passes.vectors(shapes, most_open_units(rounds), dtype, sides.count)
    along = np.zeros((units, look.count))
    for turn in progress.track(rounds, "unit gradients, third pass", len(rounds)):
        vectors.open(turn.open)
        passes.backward(turn, vectors)
        if turn.closed:
            vectors.settle(turn.closed)
            found = looked_along(vectors, turn.closed, names, look, (sides.y, *sides.of_terms))
            along[turn.closed] = found.cpu().numpy()
            vectors.close(turn.closed)
    return passes.ranks.sum_numbers(along)


def _streamed(
    passes: Passes,
    both: BothSides,
    units: Units,
    dtype: torch.dtype,
    geometry: Geometry,
    progress: Progress,
) -> tuple[list[Dots], list[dict[str, Tensor]], set[str]]:
    """Two passes: sums and diagonal from the vectors of a few units at a time, then every unit's dots with the sums.

    Dots of X with Y, then those of every further target's vectors; the sums of every term's vectors; what is reached.
    """
    sharding, shapes = passes.policy.sharding, {name: p.shape for name, p in passes.policy.trainable().items()}
    rounds = passes.rounds()
    vectors = passes.vectors(shapes, most_open_units(rounds), dtype, both.count)
    sums = [
        StreamedSums(geometry, vectors.arithmetic, len(units.ranges), sharding, (channel, both.y))
        for channel in (0, *both.z)
    ]
    for of_target in sums[1:]:
        of_target.y_sums = sums[0].y_sums
    term_sums: list[dict[str, Tensor]] = [{} for _ in both.of_terms]
    for turn in progress.track(rounds, "unit gradients, first pass", len(rounds)):
        vectors.open(turn.open)
        passes.backward(turn, vectors)
        if turn.closed:
            vectors.settle(turn.closed)
            for of_target in sums:
                of_target.add(vectors, turn.closed)
            for of_term, channel in zip(term_sums, both.of_terms, strict=True):
                add_sums(of_term, vectors, turn.closed, channel)
            vectors.close(turn.closed)
    passes.share()
    reached = reached_anywhere(vectors.reached, list(shapes), passes.ranks)
    for of_target in sums:
        of_target.reduce(vectors)
    for of_term, channel in zip(term_sums, both.of_terms, strict=True):
        add_sums(of_term, vectors, (), channel)  # zeros of a rank without units
        if sharding.replicated:
            sharding.ranks.sum_vectors(list(of_term.values()))
    del vectors
    # X_u and every Z_u meet P ΣY; Y_u meets P ΣX and, once more for each, every P ΣZ.
    second = both.with_y_again(len(both.z))
    passes.coefficients = second
    meets = {second.y: 1} | {channel: 2 + k for k, channel in enumerate(second.y_again)}
    of_channel = [meets.get(channel, 0) for channel in range(second.count)]
    contractions = passes.contractions(sums[0].directions(sums[1:]), len(units.ranges), dtype, of_channel)
    for turn in progress.track(rounds, "unit gradients, second pass", len(rounds)):
        passes.backward(turn, contractions)
    channels = [(0, second.y), *zip(second.z, second.y_again, strict=True)]
    found = [
        of_target.finish(contractions, units.sizes, reached, pair)
        for of_target, pair in zip(sums, channels, strict=True)
    ]
    return found, term_sums, reached


def proved(policy: Policy, batch: RolloutBatch, rules: Rules | None) -> Rules:
    """Rules of an earlier call, if they are this model's, or new ones."""
    if rules is None:
        return prove_rules(policy, batch)
    rules.check(policy)
    return rules
