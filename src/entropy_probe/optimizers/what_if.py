"""What-ifs: the first-order entropy change of another step, by arithmetic on the parts of this one.

The step is linear in its parts, and each part in the learning rate, so no model is asked again. v⁺ and the preconditioner are
held as they are in the step that was predicted: another clipping changes the parts' sizes, not their geometry. Everything in
nats. Source: docs/method.md, section 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from entropy_probe.optimizers.step_parts import StepPrediction
from entropy_probe.statistics.estimate import Estimate, NoEstimate


@dataclass(frozen=True)
class WhatIf:
    """One question. ``asked`` is the number that was asked about, if any.

    ``delta_h1`` is the answer for the preconditioned step, ``adamw`` that for the optimizer's own.
    """

    name: str
    asked: float | None
    delta_h1: Estimate | NoEstimate
    adamw: Estimate | NoEstimate


@dataclass(frozen=True)
class Fall:
    """The multiple of the learning rate at which the optimizer's own step would lower the entropy by ``nats``, to first order.

    The interval of ``multiple`` has the multiples at the ends of the step's own 95 % interval.
    """

    nats: float
    multiple: Estimate | NoEstimate


def another_learning_rate(step: StepPrediction, delta_h1: Estimate, rates: Sequence[float], asked: float) -> WhatIf:
    """Both steps are proportional to η, weight decay included; ``rates`` are the distinct ones of this step."""
    if len(rates) > 1:
        why_not = "parameter groups have learning rates of their own; set one learning rate, which replaces them all"
        return WhatIf("learning_rate", asked, NoEstimate(why_not), NoEstimate(why_not))
    if rates[0] == 0.0:
        why_not = "this step's learning rate is 0, of which nothing else is a multiple; set the learning rate"
        return WhatIf("learning_rate", asked, NoEstimate(why_not), NoEstimate(why_not))
    factor = asked / rates[0]
    return WhatIf("learning_rate", asked, delta_h1.scaled(factor), step.total.scaled(factor))


def another_clipping(step: StepPrediction, factor: float, asked_factor: float, asked: float) -> WhatIf:
    """The fresh gradient's part by another clipping factor; momentum and weight decay stay, and so does v⁺."""
    adamw = step.of(1.0, asked_factor / factor, 1.0)
    return WhatIf("max_grad_norm", asked, NoEstimate("δH₁ is of the gradient without clipping"), adamw)


def no_momentum(step: StepPrediction) -> WhatIf:
    """The step without what the moments carried over; the fresh gradient keeps its weight (1 − β₁) / (1 − β₁^{t+1})."""
    return WhatIf("no_momentum", None, NoEstimate("δH₁ holds no momentum"), step.of(0.0, 1.0, 1.0))


def without_negative_advantages(delta_h1: Estimate) -> WhatIf:
    """``delta_h1`` of the update from responses with advantages above zero alone."""
    why_not = "v⁺ and the clipping would be another gradient's"
    return WhatIf("without_negative_advantages", None, delta_h1, NoEstimate(why_not))


def learning_rate_for_fall(step: StepPrediction, nats: float) -> Fall:
    """``nats`` over the step's own fall."""
    total = step.total
    interval = total.ci95
    if interval is None:
        return Fall(nats, NoEstimate(total.why_not))
    if not step.deviations.any() and total.value == 0.0:
        why_not = "the optimizer's own step changes nothing to first order; is its learning rate 0?"
        return Fall(nats, NoEstimate(why_not))
    if not total.excludes_zero:
        return Fall(nats, NoEstimate("the optimizer's own step cannot be told from zero within the errors"))
    if total.value > 0:
        return Fall(nats, NoEstimate("the optimizer's own step raises the entropy to first order"))
    ends = (nats / -interval[0], nats / -interval[1])
    return Fall(
        nats, Estimate(nats / -total.value, None, ends, "a reciprocal has an interval, and no error of its own")
    )
