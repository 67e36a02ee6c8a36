"""X of one batch against Y of another: every prompt of one with every prompt of the other."""

from __future__ import annotations

from torch import Tensor

from entropy_probe.common.progress import Progress, Silent
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.gradients.coefficients import Coefficients, TargetSide, given_side
from entropy_probe.gradients.engine import proved
from entropy_probe.gradients.passes import Passes
from entropy_probe.gradients.products import (
    cross_kernel,
)
from entropy_probe.gradients.treatments import Rules
from entropy_probe.gradients.vectors.exchange import exchanged
from entropy_probe.gradients.vectors.sharded_vectors import ShardedVectors
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.ranks.dealing import deal
from entropy_probe.targets.base import Target, TokenPair


def cross_gradients(
    policy: Policy,
    evaluation: RolloutBatch,
    update: RolloutBatch,
    target: Target,
    coefficients: Tensor | TokenPair,
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
        coefficients: Y's, of the update batch, as :class:`~entropy_probe.gradients.coefficients.Sides` has them.
        geometry: P and η, and the type of stored vectors.
        rules: of an earlier call on this very model; None proves them first.
        progress: told of every microbatch.
    """
    progress = progress if progress is not None else Silent()
    rules = proved(policy, evaluation, rules)
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
        (update, given_side(update, coefficients), counts[0], shares[1]),
    ]
    both = [
        Passes(
            policy,
            batch,
            [first + n for n, size in enumerate(batch.group_sizes) for _ in range(size)],
            of_side,
            treatments,
            rules.unproven,
            share,
        )
        for batch, of_side, first, share in sides
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
