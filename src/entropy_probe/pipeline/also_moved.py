"""Which targets beside the entropy a probe differentiates: those of its list that differ among responses and that fit.

Each takes a vector a unit more. Unasked, they must leave units and storage as they would be without them, and take no backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from entropy_probe.common.arrays import FloatArray
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.errors import some_of
from entropy_probe.gradients import Plan, Storage, UnitGradients
from entropy_probe.gradients.capture.modules import Treatment
from entropy_probe.gradients.treatments import Rules
from entropy_probe.report import TargetSection
from entropy_probe.statistics.intervals import IntervalMethod
from entropy_probe.statistics.u_statistics import cross_statistics
from entropy_probe.targets.base import Sample
from entropy_probe.targets.of_responses import TargetOfResponses
from entropy_probe.targets.registry import ALSO_MOVED

LEAST_WEIGHT, MOST_WEIGHT = 1e-30, 1e30
"""Between which coefficients leave float32 vectors room for gradients."""


@dataclass(frozen=True)
class AlsoMoved:
    """The targets that get vectors, and by name why the others do not."""

    given: tuple[TargetOfResponses, ...]
    reasons: Mapping[str, str]

    def withheld(self, why: str) -> AlsoMoved:
        """None of them given, for this reason."""
        return AlsoMoved((), {**self.reasons, **{target.name: why for target in self.given}})


def plan_targets(batch: RolloutBatch, plan_for: Callable[[int], Plan], *, asked: bool) -> tuple[Plan, AlsoMoved]:
    """The plan of the units' vectors, and the targets that it has room for.

    Args:
        batch: the rollouts.
        plan_for: the plan with so many vectors a unit.
        asked: whether targets are to have room even if fewer vectors fit then, or none.
    """
    sample = Sample.of(batch)
    known = tuple(target for target in ALSO_MOVED if not (target.needs_rewards and sample.rewards is None))
    differing = tuple(target for target in known if bool((target.weights(sample) != 0).any()))
    said = {target.name: target.name.replace("_", " ") for target in ALSO_MOVED}
    same = {
        target.name: f"the responses to each prompt are alike in {said[target.name]}, so there is nothing to learn from"
        for target in known
        if target not in differing
    }
    same |= {target.name: "rows have no reward" for target in ALSO_MOVED if target not in known}
    for target in differing:
        largest = float(target.weights(sample).abs().max())
        if not LEAST_WEIGHT <= largest <= MOST_WEIGHT:
            same[target.name] = (
                f"its coefficients are as large as {largest:.1e}, which float32 vectors do not hold; scale it"
            )
    differing = tuple(target for target in differing if target.name not in same)
    plan, with_targets = plan_for(2), plan_for(2 + len(differing))
    if asked:
        return with_targets, AlsoMoved(differing, same)
    if plan.storage is Storage.STREAMED:
        why = "vectors are streamed; set targets to true for these too"
    elif (plan.units, plan.storage) != (with_targets.units, with_targets.storage):
        why = (
            "their vectors do not fit beside the entropy's; give more memory, or set targets to true and units become fewer or "
            "are streamed"
        )
    else:
        return with_targets, AlsoMoved(differing, same)
    return plan, AlsoMoved((), {target.name: why for target in differing} | same)


def without_dear_ones(
    plan: Plan, also: AlsoMoved, rules: Rules, plan_for: Callable[[int], Plan], *, backward: bool
) -> tuple[Plan, AlsoMoved]:
    """Without the targets that nobody asked for, where they would take backwards.

    That is one for all of them where neither X nor Y is weighted by the response (``backward``), and one for each where no rule
    serves some parameters.
    """
    slow = [name for name, how in rules.treatments.items() if how is Treatment.FALLBACK]
    if not also.given:
        return plan, also
    if slow:
        why = f"parameters without a rule ({some_of(slow)}) take a backward a target"
    elif backward:
        why = "the loss weighs tokens, and so does the estimator of the entropy: they take a backward of their own"
    else:
        return plan, also
    return plan_for(2), also.withheld(f"{why}; set targets to true for these too")


def target_sections(
    also: AlsoMoved, gradients: UnitGradients, interval: IntervalMethod | None, weights: FloatArray | None
) -> list[TargetSection]:
    """The report's list of targets, in the order of :data:`~entropy_probe.targets.registry.ALSO_MOVED`.

    Args:
        also: which were differentiated.
        gradients: theirs.
        interval: how intervals are made.
        weights: of units, as :func:`~entropy_probe.statistics.u_statistics.cross_statistics` takes them.
    """
    given = {target.name for target in also.given}
    return [
        TargetSection.of(
            target.name,
            cross_statistics(gradients.step_weighted_of(target.name), interval, weights)
            if target.name in given
            else also.reasons[target.name],
        )
        for target in ALSO_MOVED
    ]
