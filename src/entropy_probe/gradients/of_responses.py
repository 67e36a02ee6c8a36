"""Gradients response by response, or weighted over responses, from the same passes as unit gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from entropy_probe.common.progress import Progress, Silent
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.gradients.coefficients import Combinations, TargetSide, given_side
from entropy_probe.gradients.engine import proved
from entropy_probe.gradients.interface import Directions
from entropy_probe.gradients.passes import Passes
from entropy_probe.gradients.treatments import Rules
from entropy_probe.gradients.vectors.exchange import reached_anywhere
from entropy_probe.model.measured import Measured
from entropy_probe.model.policy import Policy
from entropy_probe.ranks.dealing import deal
from entropy_probe.targets.base import Target, TokenPair


def weighted_gradient(
    policy: Policy,
    batch: RolloutBatch,
    coefficients: Tensor | TokenPair,
    *,
    rules: Rules | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Σ_i a_i ∇S_i over all responses, or Σ_t (ω_t ∇log π(y_t) + β_t ∇H_t) over all their tokens.

    By parameter name, float64; of parameters that some response reaches.
    Of several ranks each does its share; each gets the sum, or of shards its rows of it.

    Args:
        policy: the model at θ.
        batch: the rollouts.
        coefficients: a, [N]; or ω and β, each one value a response [N] or one a response token [tokens].
        rules: of an earlier call on this very model; None proves them first.
        progress: told of every microbatch.
    """
    progress = progress if progress is not None else Silent()
    rules = proved(policy, batch, rules)
    sharding, shapes = policy.sharding, {name: p.shape for name, p in policy.trainable().items()}
    shares = deal(batch.positions, sharding.ranks.count)
    all_one_unit = [0] * len(batch.responses)
    side = given_side(batch, coefficients)
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
    update: Tensor | TokenPair,
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
        update: Y's coefficients, as :class:`~entropy_probe.gradients.coefficients.Sides` has them.
        directions: V and W.
        rules: of an earlier call on this very model; None proves them first.
        progress: told of every microbatch.
    """
    x, y = TargetSide(batch, target).of_rows(range(len(batch.responses)), measured), TokenPair.of(update)
    ones = TokenPair(torch.ones(len(batch.responses), dtype=torch.float64))
    of_x = slice(0, len(directions.of_x))
    of_y = slice(of_x.stop, of_x.stop + len(directions.of_y))
    every = [*directions.of_x, *directions.of_y]
    # Coefficients a response stand outside of dS_i · V_k, which is then all that is needed.
    outside = [pair.weighs_responses(batch) for pair in (x, y)]
    if all(outside):
        dots = _contracted(policy, batch, every, [ones], [slice(0, of_y.stop)], rules, progress)
    else:
        inside = [ones if stands else pair for pair, stands in zip((x, y), outside, strict=True)]
        dots = _contracted(policy, batch, every, inside, [of_x, of_y], rules, progress)
    found = [
        dots[:, part] * pair.log_probs.double()[:, None] if stands else dots[:, part]
        for pair, part, stands in zip((x, y), (of_x, of_y), outside, strict=True)
    ]
    return found[0], found[1]


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
    rules = proved(policy, batch, rules)
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
