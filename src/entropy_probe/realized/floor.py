"""The numerical floor: below which size a realised change is rounding.

Weights are rounded at random (:func:`~entropy_probe.realized.rounding.rounding_noise`), R times, and k responses of k different
prompts scored again. With D_ri what response i's part of ΔH changes by in rounding r,

    σ²_shared = mean_r mean_{i≠j} D_ri D_rj        σ²_own = mean_ri D² − σ²_shared
    floor = 1.78 √( max(0, σ²_shared) + max(0, σ²_own) / N )

for a mean over N responses: what all responses share does not average out, and what each has by itself does. It is a property
of θ and of the arithmetic, so that one measurement serves all steps. Source: docs/method.md, section 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from entropy_probe.common.arrays import FloatArray
from entropy_probe.common.progress import Progress
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.model.measured import Measured
from entropy_probe.model.policy import Policy
from entropy_probe.model.virtual_step import virtual_step
from entropy_probe.realized.measure import EntropyMeasure
from entropy_probe.realized.rounding import rounding_generator, rounding_noise

MOST_PROMPTS, MOST_ROUNDINGS = 16, 4
SHARE_OF_A_FORWARD = 0.3
"""Of the responses, over all roundings, that are scored again: a tenth of a training step."""
MULTIPLE = 1.78
"""Of the standard deviation, at which a change counts as rounding."""


def noise_floors(
    policy: Policy, batch: RolloutBatch, before: Measured, measures: Sequence[EntropyMeasure], progress: Progress
) -> list[float]:
    """The floor of every measure's ΔH over the batch, in its nats.

    Args:
        policy: the model at θ, weights in float32 or better.
        batch: the rollouts that ΔH is taken over.
        before: their scores, log-probs and entropies at θ by this very policy.
        measures: which entropies are compared.
        progress: told of every rounding.
    """
    prompts = min(MOST_PROMPTS, len(batch.groups))
    rows = [batch.first_row[n * len(batch.groups) // prompts] for n in range(prompts)]
    count = len(batch.responses)
    roundings = min(MOST_ROUNDINGS, max(1, int(SHARE_OF_A_FORWARD * count / prompts)))
    entropies = any(measure.target.needs_token_entropies for measure in measures)
    generator = rounding_generator(policy.sharding)
    responses = [batch.responses[row] for row in rows]
    changes: list[list[FloatArray]] = [[] for _ in measures]
    for _ in progress.track(range(roundings), "numerical floor", roundings):
        noise = {name: rounding_noise(theta, generator) for name, theta in policy.held().items()}
        with virtual_step(policy.model, noise):
            found = policy.measure(responses, entropies=entropies)
        after = _in_place_of(before, found, rows, batch)
        for of_measure, measure in zip(changes, measures, strict=True):
            of_measure.append(measure.parts(batch, before, after)[rows])
    return [floor_of(np.stack(of_measure), count) for of_measure in changes]


def floor_of(changes: FloatArray, count: int) -> float:
    """The floor of a mean over ``count`` responses, from D, [R, k]."""
    responses = changes.shape[1]
    squares = float((changes**2).mean())
    if responses < 2:
        return MULTIPLE * float(np.sqrt(squares))
    pairs = (changes.sum(1) ** 2 - (changes**2).sum(1)) / (responses * (responses - 1))
    shared = float(pairs.mean())
    return MULTIPLE * float(np.sqrt(max(0.0, shared) + max(0.0, squares - shared) / count))


def _in_place_of(before: Measured, found: Measured, rows: Sequence[int], batch: RolloutBatch) -> Measured:
    """``before`` with what was found of these rows."""
    scores = before.scores.clone()
    scores[list(rows)] = found.scores
    of_tokens: list[Tensor | None] = []
    for values, new in ((before.entropies, found.entropies), (before.log_probs, found.log_probs)):
        if values is None or new is None:
            of_tokens.append(None)
            continue
        changed, start = values.clone(), 0
        for row in rows:
            tokens = slice(batch.first_token[row], batch.first_token[row + 1])
            changed[tokens] = new[start : start + tokens.stop - tokens.start]
            start += tokens.stop - tokens.start
        of_tokens.append(changed)
    return Measured(scores, *of_tokens)
