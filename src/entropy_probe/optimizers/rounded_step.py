"""The optimizer's own step as its weights are stored: see :mod:`~entropy_probe.optimizers.stored_precision` for the
rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from entropy_probe.common.arrays import FloatArray
from entropy_probe.errors import InputError
from entropy_probe.optimizers.adamw_step import adamw_delta
from entropy_probe.optimizers.rounding import Kept, RoundedStep, RoundingRule
from entropy_probe.optimizers.state import AdamState
from entropy_probe.optimizers.stored_precision import (
    NARROW_TYPES,
    Rounding,
    narrow_type,
    rounded_stochastically,
    rounded_to_nearest,
    stepped_in_type,
)
from entropy_probe.ranks.sharding import Sharding


def rounded_adamw(
    parameters: Mapping[str, Tensor],
    state: AdamState,
    ascent: Mapping[str, Tensor],
    unrounded: Mapping[str, Tensor],
    *,
    clip_factor: float,
    rule: RoundingRule,
    sharding: Sharding,
) -> RoundedStep | None:
    """The step of AdamW or Adam on the loss gradient −Ȳ, rounded where the optimizer holds weights in a narrow type.

    There the gradient is rounded to that type too, as torch keeps it. Every rank must call it.

    Args:
        parameters: what this rank holds of θ, by name, in whatever type it is loaded as.
        state: the optimizer's, moments in the type that it keeps them in.
        ascent: Ȳ by name.
        unrounded: Δθ of :func:`~entropy_probe.optimizers.adamw_step.adamw_deltas` from the same.
        clip_factor: of the gradient.
        rule: how weights are rounded.
        sharding: whose elements are whose.

    Returns:
        None where all weights are held in float32 or wider.

    Raises:
        InputError: the step leaves the range of the narrow type; on all ranks, whosever weight it is.
    """
    generator = rule.generator(sharding)
    groups = state.group_of()
    deltas = dict(unrounded)
    counts = np.zeros((len(NARROW_TYPES), 4))
    for name, theta in parameters.items():
        moments = state.moments.get(name)
        dtype = None if moments is None else narrow_type(theta, moments, groups[name])
        if moments is None or dtype is None:
            continue
        # Weights, those that move, those that would in float32, those that are lost.
        found = counts[NARROW_TYPES.index(dtype)]
        found[0] += theta.numel()
        if name not in unrounded:
            continue
        group, old = groups[name], theta.double()
        gradient = (-clip_factor * ascent[name]).to(theta.device, dtype)
        if rule.how is Rounding.NEAREST and not group.in_float32:
            new = stepped_in_type(theta.to(dtype), moments, group, gradient).double()
        else:
            new = old + adamw_delta(theta, moments, group, -gradient)
            match rule.how:
                case Rounding.NEAREST:
                    new = rounded_to_nearest(new, dtype)
                case Rounding.STOCHASTIC:
                    new = rounded_stochastically(new, dtype, generator)
                case unknown:
                    assert_never(unknown)
        deltas[name] = new - old
        found[1] += int((new != old).sum())
        found[2] += int(((old + unrounded[name]).float() != old.float()).sum())
        found[3] += int((~torch.isfinite(new.to(dtype))).sum())
    if sharding.sharded:
        counts = sharding.ranks.sum_numbers(counts)
    _refuse_lost(counts, state)
    weights, moved, moved_in_float32, _ = map(float, counts.sum(axis=0))
    if not weights:
        return None
    dtypes = tuple(dtype for dtype, found in zip(NARROW_TYPES, counts, strict=True) if found[0])
    return RoundedStep(deltas, Kept(rule.how, dtypes, int(weights), moved / weights, moved_in_float32 / weights))


def _refuse_lost(counts: FloatArray, state: AdamState) -> None:
    for dtype, found in zip(NARROW_TYPES, counts, strict=True):
        if not found[3]:
            continue
        name = str(dtype).removeprefix("torch.")
        least = min(group.eps for group in state.groups if group.names)
        vanishes = float(torch.tensor(least, dtype=dtype)) == 0.0
        raise InputError(
            f"the optimizer holds weights in {name} and no float32 copy of them; in that type the adamw step makes "
            f"{int(found[3])} of {int(found[0])} weights infinite or NaN"
            + (f" (Adam's ε of {least:g} is 0 in {name})" if vanishes else "")
            + "; train with float32 weights, or give a smaller learning rate"
            + (" or a larger ε" if vanishes else "")
        )
