"""Causes in the numbers of a loss's formula: clip, bounds, quantile, temperatures. The value that fits is searched for.

Such a number is a threshold on what the rows hold, or bends the weight of a ratio. The further it is from the trainer's, the
more tokens weigh otherwise, so that the error falls towards it from both sides: a search that halves what is left finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from entropy_probe.losses.corrections import Correction, CorrectionMode
from entropy_probe.losses.named import LossConstants, LossName
from entropy_probe.losses.rows import LossRows
from entropy_probe.losses.token_loss import log_ratio
from entropy_probe.pipeline.recorded_loss import FITTING
from entropy_probe.pipeline.update import SAME_POLICY, UpdateRule
from entropy_probe.replay_check.case import Cause, Replayed
from entropy_probe.replay_check.variants import Passes, Variant, of_constants, with_objective

ROUNDS = 14
"""Of halving, at most."""
GAIN = 0.9
"""Of the error without it, what a number must leave at its best first place to be looked at more closely."""
PARTS = 4
"""Into which a range is divided before its best place is looked at more closely."""
FOLD, FOLDS = 8.0, 8
"""How far a number without thresholds is looked for, up and down, and in how many steps to each side."""
SHARES = 64
"""Quantiles that are told apart at first."""


@dataclass(frozen=True)
class _Number:
    """A number of the loss.

    Attributes:
        column: its name.
        here: in the loss that was replayed; None for none.
        places: where it changes something, rising.
        rule: the loss with another value.
        how: what else that loss has, in words.
    """

    column: str
    here: float | None
    places: Sequence[float]
    rule: Callable[[float], UpdateRule]
    how: str = ""


@dataclass(frozen=True)
class _Found:
    """The best value of a number, what is left with it, and the cause that it is."""

    value: float
    error_net: float
    cause: Cause


def number_causes(case: Replayed, passes: Passes) -> Iterator[Cause]:
    """The value of each that fits best, where another one than the recorded changes the update."""
    yield from _clip(case, passes)
    rows = case.rule.seen(case.measured)
    for number in (*_thresholds(case.rule, rows), *_of_the_sampler(case.rule, rows), *_constants(case.rule)):
        found = _best(number, case, passes)
        if found is not None:
            yield found.cause


def _clip(case: Replayed, passes: Passes) -> Iterator[Cause]:
    """Its two ends in turn, each beside the best other one: a trainer's two may both be otherwise."""
    rule, best, note = case.rule, case.update.error_net, ""
    if not rule.loss.clips:
        return
    for end in ("epsilon_high", "epsilon_low", "epsilon_high"):
        number = _end(end, rule, case)
        found = None if number is None else _best(number, case, passes, note)
        if number is not None and found is not None and found.error_net < best:
            rule, best, note = number.rule(found.value), found.error_net, f", and {end} about {found.value:.4g}"
            yield found.cause


def _end(column: str, rule: UpdateRule, case: Replayed) -> _Number | None:
    constants, ratios = rule.loss.constants, _ratios(rule, rule.seen(case.measured))
    if column == "epsilon_high":
        values = ratios if rule.loss.name is LossName.CISPO else ratios[ratios > 1.0] - 1.0
        here = constants.epsilon_high
        return _Number(column, here, _between(values), lambda v: of_constants(rule, replace(constants, epsilon_high=v)))
    if rule.loss.name is LossName.CISPO:
        return None
    values, here = 1.0 - ratios[ratios < 1.0], constants.epsilon_low
    return _Number(column, here, _between(values), lambda v: of_constants(rule, replace(constants, epsilon_low=v)))


def _ratios(rule: UpdateRule, rows: LossRows) -> Tensor:
    """Those that the loss takes, at its tokens."""
    return log_ratio(rows.log_probs, rows, rule.loss.constants.level).exp()[rows.mask > 0]


def _best(number: _Number, case: Replayed, passes: Passes, note: str = "") -> _Found | None:
    """Between places a value is interpolated, so that a cap on ratios is found more closely than to a token."""
    found: dict[float, _Found] = {}
    places = number.places
    if len(places) < 2:
        return None

    def look(place: float) -> None:
        if place in found:
            return
        left = min(int(place), len(places) - 2)
        value = places[left] + (place - left) * (places[left + 1] - places[left])
        here = "none" if number.here is None else f"{number.here:g}"
        about = f"about {value:.4g}{number.how}"
        variant = Variant(
            number.column,
            f"the trainer's {number.column} was {about}, as near as these rows tell; here it is {here}{note}",
            f"Set {number.column} to the trainer's own, {about}{note}",
            number.rule(value),
        )
        for cause in passes.causes([variant]):
            found[place] = _Found(value, case.compared(cause.step).error_net, replace(cause, fitted=True))

    low, high = 0.0, len(places) - 1.0
    best: float | None = None
    for _ in range(ROUNDS):
        for part in range(PARTS + 1):
            look(low + (high - low) * part / PARTS)
        best = min(found, key=lambda place: found[place].error_net, default=None)
        if best is None or found[best].error_net <= case.tolerance:
            break
        if found[best].error_net > GAIN * case.update.error_net:
            return None
        width = (high - low) / PARTS
        low, high = max(low, best - width), min(high, best + width)
    return None if best is None else found[best]


def _thresholds(rule: UpdateRule, rows: LossRows) -> Iterator[_Number]:
    constants, objective = rule.loss.constants, rule.loss.objective
    if rule.loss.clips and rule.loss.name is not LossName.CISPO:
        ratios = _ratios(rule, rows)
        yield _Number(
            "delta",
            constants.delta,
            _between(ratios[ratios > 1.0]),
            lambda v: of_constants(rule, replace(constants, delta=v)),
        )
    yield _Number(
        "top_entropy_quantile",
        objective.top_entropy_quantile,
        [share / SHARES for share in range(1, SHARES + 1)],
        lambda v: with_objective(rule, replace(objective, top_entropy_quantile=v)),
    )


def _of_the_sampler(rule: UpdateRule, rows: LossRows) -> Iterator[_Number]:
    constants, objective = rule.loss.constants, rule.loss.objective
    before = rows.old if rows.sampler_log_probs is None else rows.sampler_log_probs
    drifts = rows.averaged(before - rows.log_probs)
    if float(drifts.abs().max()) > SAME_POLICY:
        yield _Number(
            "off_policy_mask_threshold",
            objective.off_policy_threshold,
            _between(drifts),
            lambda v: with_objective(rule, replace(objective, off_policy_threshold=v)),
        )
    if rows.sampler_log_probs is None:
        return
    gaps = (rows.old - rows.sampler_log_probs) * rows.mask
    if float(gaps.abs().max()) <= SAME_POLICY:
        return
    own, name = constants.correction, rule.loss.name
    known = tuple(CorrectionMode) if name is None else FITTING.get(name, tuple(CorrectionMode))
    for mode in known if own is None else (own.mode,):
        whole = mode in (CorrectionMode.SEQUENCE_MASK, CorrectionMode.SEQUENCE_TRUNCATE)
        places = _between(rows.summed(gaps).exp() if whole else gaps.exp()[rows.mask > 0])
        bounds = Correction(mode, None, None) if own is None else own
        ends = {
            "importance_sampling_clip_max": (bounds.high, partial(_upper, bounds)),
            "importance_sampling_clip_min": (bounds.low, partial(_lower, bounds)),
        }
        for column, (here, changed) in ends.items():
            how = f", by importance_sampling_mode {mode}" if own is None else ""
            yield _Number(column, here, places, partial(_corrected, rule, changed), how)


def _upper(bounds: Correction, value: float) -> Correction:
    return replace(bounds, high=value)


def _lower(bounds: Correction, value: float) -> Correction:
    return replace(bounds, low=value)


def _corrected(rule: UpdateRule, changed: Callable[[float], Correction], value: float) -> UpdateRule:
    return of_constants(rule, replace(rule.loss.constants, correction=changed(value)))


def _between(values: Tensor) -> list[float]:
    """Thresholds that part values otherwise, rising: below all, midway between neighbours, above all."""
    rising = torch.unique(values.detach()).tolist()
    if not rising:
        return []
    midway = [(a + b) / 2 for a, b in pairwise(rising)]
    margin = 1e-3 * (abs(rising[-1]) + 1e-6)
    return [rising[0] - margin, *midway, rising[-1] + margin]


def _constants(rule: UpdateRule) -> Iterator[_Number]:
    """Temperatures of SAPO, exponents of VESPO."""
    constants, name = rule.loss.constants, rule.loss.name
    found: dict[str, tuple[float, Callable[[float], LossConstants]]] = {}
    if name is LossName.SAPO:
        positive, negative = constants.sapo_temperatures
        found = {
            "sapo_temperature_pos": (positive, lambda v: replace(constants, sapo_temperatures=(v, negative))),
            "sapo_temperature_neg": (negative, lambda v: replace(constants, sapo_temperatures=(positive, v))),
        }
    elif name is LossName.VESPO:
        (k, power), (k_negative, power_negative) = constants.vespo_positive, constants.vespo_negative
        found = {
            "vespo_k_pos": (k, lambda v: replace(constants, vespo_positive=(v, power))),
            "vespo_lambda_pos": (power, lambda v: replace(constants, vespo_positive=(k, v))),
            "vespo_k_neg": (k_negative, lambda v: replace(constants, vespo_negative=(v, power_negative))),
            "vespo_lambda_neg": (power_negative, lambda v: replace(constants, vespo_negative=(k_negative, v))),
        }
    for column, (here, changed) in found.items():
        places = [here * FOLD ** (k / FOLDS) for k in range(-FOLDS, FOLDS + 1)]
        yield _Number(column, here, places, partial(_made, rule, changed))


def _made(rule: UpdateRule, changed: Callable[[float], LossConstants], value: float) -> UpdateRule:
    return of_constants(rule, changed(value))
