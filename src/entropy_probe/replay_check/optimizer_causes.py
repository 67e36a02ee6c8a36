"""Causes in the optimizer: clipping, learning rate, weight decay, Adam's state. No pass over the batch: Ȳ stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from entropy_probe.optimizers.adamw_step import adamw_step
from entropy_probe.optimizers.state import AdamGroup, AdamState
from entropy_probe.pipeline.recorded import recorded_rates
from entropy_probe.replay_check.case import Cause, Replayed
from entropy_probe.replay_check.update_comparison import fitted_factor

USUAL_MAX_GRAD_NORM = 1.0
"""The Trainer's default."""

SAME_FACTOR = 1e-3
SAME_NORM = 0.01
"""Relative differences up to which a factor counts as the one that was tried already, and a norm as the logged one."""


def optimizer_causes(case: Replayed) -> Iterator[Cause]:
    """All of them, each with the factor or setting that fits the real update best."""
    yield from _clipping(case)
    yield from _learning_rate(case)
    yield from _weight_decay(case)
    step = None if case.number is None else case.number - 1
    counts = {moments.step for moments in case.adam.moments.values()}
    if step is not None and counts != {step}:
        moments = {name: replace(m, step=step) for name, m in case.adam.moments.items()}
        yield Cause(
            "adam_step",
            f"the trainer's Adam counted this as its step {step + 1}; optimizer.pt says t = {sorted(counts)[0]}",
            "Look for an optimizer.pt of another checkpoint, or one that a script rewrote",
            case.stepped(case.ascent, AdamState(case.adam.groups, moments)),
        )
    yield Cause(
        "adam_reset",
        "the trainer's Adam started this step with empty moments, as after a resumption without optimizer.pt",
        "Resume with the optimizer's state, or replay a later step",
        case.stepped(case.ascent, AdamState(case.adam.groups, {})),
    )


def _clipping(case: Replayed) -> Iterator[Cause]:
    norm, used = case.step.gradient_norm, case.step.clip_factor
    # Of the gradient before clipping.
    factor = None if case.gradients is None else case.gradients.scale * used
    if used < 1.0:
        yield Cause(
            "clipping",
            f"the trainer did not clip its gradient of norm {norm:.4g}; here it was clipped at {case.max_grad_norm:g}",
            "Set max_grad_norm to 0 if that is meant, or look for the clip that the trainer lost",
            adamw_step(case.before, case.adam, case.ascent),
        )
    if factor is None and norm > USUAL_MAX_GRAD_NORM and case.max_grad_norm != USUAL_MAX_GRAD_NORM:
        factor = USUAL_MAX_GRAD_NORM / norm
    if factor is None or factor <= 0.0 or min(abs(factor / f - 1.0) for f in (1.0, used)) < SAME_FACTOR:
        return
    step = adamw_step(case.before, case.adam, {name: factor * y for name, y in case.ascent.items()})
    logged = case.logged_norm
    if factor < 1.0 and (logged is None or abs(logged / norm - 1.0) < SAME_NORM):
        here = "without clipping" if used == 1.0 else f"after a clip at {case.max_grad_norm:g}"
        yield Cause(
            "clipping",
            f"the trainer clipped its gradient of norm {norm:.4g} to {factor * norm:.4g}; here it is {used * norm:.4g}, {here}",
            f"Set max_grad_norm to {factor * norm:.4g} if the trainer clips there",
            step,
            fitted=True,
        )
        return
    yield Cause(
        "gradient_scale",
        f"the trainer's gradient is {factor:.6g} times the one recomputed"
        + ("" if logged is None else f" (its log says a norm of {logged:.4g}, here it is {norm:.4g})"),
        "Look for a factor in its loss: accumulation steps, processes, or a length weight that differs by a constant",
        step,
        fitted=True,
    )


def _learning_rate(case: Replayed) -> Iterator[Cause]:
    scale = 1.0
    deltas = case.step.deltas
    if all(group.learning_rate == 0.0 for group in case.adam.groups):
        deltas = case.stepped(case.ascent, case.adam.with_learning_rate(scale)).deltas
    else:
        scale = next(group.learning_rate for group in case.adam.groups if group.learning_rate > 0.0)
    stored = ", ".join(f"{rate:.6g}" for rate in case.adam.learning_rates)
    logged = None if case.number is None else case.log.logged("learning_rate", case.number)
    known = {"recorder": next(iter(recorded_rates(case.batch)), None), "log": logged}
    for source, rate in known.items():
        if rate is not None and rate > 0.0 and abs(rate / scale - 1.0) > SAME_FACTOR:
            yield Cause(
                "learning_rate",
                f"the trainer's learning rate was {rate:.6g}, as its {source} says; here it is {stored}",
                f"Set the learning rate to {rate:.6g}, or look for the scheduler that was resumed otherwise",
                case.stepped(case.ascent, _with_rate(case.adam, rate / scale, scale)),
            )
    factor = fitted_factor(deltas, case.moved)
    # A rate that fits and contradicts what the trainer wrote down stands for another cause.
    if factor is None or factor <= 0.0 or any(rate is not None for rate in known.values()):
        return
    yield Cause(
        "learning_rate",
        f"the trainer's learning rate was {factor * scale:.6g}; here it is {stored}",
        f"Set the learning rate to {factor * scale:.6g}, or look for the scheduler that was resumed otherwise",
        case.stepped(case.ascent, _with_rate(case.adam, factor, scale)),
        fitted=True,
    )


def _with_rate(adam: AdamState, factor: float, scale: float) -> AdamState:
    """Every group's rate times a factor; a rate of zero counts as ``scale``."""
    groups = tuple(replace(group, learning_rate=factor * (group.learning_rate or scale)) for group in adam.groups)
    return AdamState(groups, adam.moments)


def _weight_decay(case: Replayed) -> Iterator[Cause]:
    """λ by least squares over the group that the Trainer lets decay, its first, and over all parameters."""
    groups = [group for group in case.adam.groups if group.names]
    if not all(group.decoupled_weight_decay for group in groups):
        return
    moved, deltas = case.moved, case.step.deltas
    # (One non-empty group is both.)
    for decayed in (groups[:1], groups)[: len(groups)]:
        names = {name for group in decayed for name in group.names if name in deltas}
        rates = {name: group.learning_rate for group in decayed for name in group.names}
        basis = {name: -rates[name] * case.before[name].double() for name in names}
        more = fitted_factor(basis, {name: moved[name] - deltas[name] for name in names})
        if more is None:
            continue
        meant = tuple(_decaying(group, more) if group in decayed else group for group in case.adam.groups)
        if any(group.weight_decay < 0.0 for group in meant):
            continue
        yield Cause(
            "weight_decay",
            f"the trainer's weight decay was {decayed[0].weight_decay + more:.4g} on "
            f"{'every parameter' if len(decayed) == len(groups) else 'the first parameter group'}; "
            f"optimizer.pt says {decayed[0].weight_decay:g}",
            "Look for a weight_decay that was changed between the checkpoints, or decay applied apart from the optimizer",
            case.stepped(case.ascent, AdamState(meant, case.adam.moments)),
            fitted=True,
        )


def _decaying(group: AdamGroup, more: float) -> AdamGroup:
    return replace(group, weight_decay=group.weight_decay + more)
