"""The realised entropy change: take the step, score the same responses again, compare with the linear prediction.

Each step (:mod:`~entropy_probe.optimizers.geometry` and :mod:`~entropy_probe.optimizers.adamw_step` make them)
is realised beside its own prediction. The numerical floor says below which size a ΔH is rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.model.measured import Measured
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.clipping import gradient_norm
from entropy_probe.realized.changes import RealizedChange
from entropy_probe.realized.measure import Predicted
from entropy_probe.realized.scoring import measure_after
from entropy_probe.realized.steps import SAME, Step


def realize(
    policy: Policy,
    batch: RolloutBatch,
    before: Measured,
    step: Step,
    predictions: Sequence[Predicted],
    *,
    floors: Sequence[float],
    batch_name: str = SAME,
) -> list[RealizedChange]:
    """Take the step virtually on the live model, which is itself again afterwards, bit for bit, and score its responses.

    A step that an optimizer took on clones is rounded to the clones' very values.

    Args:
        policy: the model at θ, weights in float32 or better.
        batch: the rollouts whose tokens are scored again.
        before: their scores and entropies at θ by this very policy.
        step: Δθ.
        predictions: what to measure, each with its linear term.
        floors: the numerical floor of each.
        batch_name: whether these are the responses that the step was made from.

    Raises:
        InputError: the step is so large that a log-probability is not finite after it.
    """
    entropies = any(p.measure.target.needs_token_entropies for p in predictions)
    after = measure_after(policy, batch, step, entropies=entropies)
    norm = gradient_norm(step.deltas, policy.sharding)
    return [
        RealizedChange(
            step.name,
            step.method,
            batch_name,
            p.measure,
            p.measure.change(batch, before, after),
            p.linear,
            floor,
            norm,
            kept=step.kept,
            by_decision=p.measure.by_decision(batch),
        )
        for p, floor in zip(predictions, floors, strict=True)
    ]
