"""The weight of a fresh gradient in Adam's step, at this step and over the steps to come.

With v held at t, step t + 1 of a parameter is η P times (1 − β₁) / (1 − β₁^{t+1}) of its fresh gradient, and step t + 1 + k
holds (1 − β₁) β₁^k / (1 − β₁^{t+1+k}) of it. Source: docs/method.md, section 6.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from entropy_probe.optimizers.base import DotGroup
from entropy_probe.optimizers.state import AdamState


def dot_groups(state: AdamState) -> dict[str, DotGroup]:
    """The dot group of every parameter, by name, in the order of the optimizer's groups.

    Groups that agree in η, β₁ and t share one. A group whose parameters are at steps of their own shares with none.
    """
    found: dict[str, DotGroup] = {}
    first: dict[tuple[float, float, int], DotGroup] = {}
    for index, group in enumerate(state.groups):
        own = DotGroup(index, group.learning_rate)
        steps = {state.moments[name].step for name in group.names if name in state.moments}
        if len(steps) == 1:
            own = first.setdefault((group.learning_rate, group.beta1, steps.pop()), own)
        found |= dict.fromkeys(group.names, own)
    return found


def gradient_factors(state: AdamState, names: Collection[str]) -> dict[DotGroup, float] | None:
    """(1 − β₁) / (1 − β₁^{t+1}), the share of the fresh gradient in the step, by dot group, of parameters with a gradient.

    None where parameters of one group differ in it, since they are at steps of their own: their dots are not told apart.
    """
    found: dict[DotGroup, float] = {}
    groups = state.group_of()
    for name, own in dot_groups(state).items():
        if name not in names:
            continue
        beta1 = groups[name].beta1
        factor = (1.0 - beta1) / (1.0 - beta1 ** (state.moments[name].step + 1))
        if not math.isclose(found.setdefault(own, factor), factor, rel_tol=1e-9):
            return None
    return found


def spread_factors(state: AdamState, names: Collection[str], clip_factor: float) -> list[float]:
    """clip · Σ_k (1 − β₁) β₁^k / (1 − β₁^{t+1+k}) over k ≥ 0, the distinct ones of parameters with a gradient.

    At step t + k the optimizer gives this batch's gradient the weight of term k. So the preconditioned step η P Ȳ, times this,
    is what the batch does in all, over the steps to come, as long as P and the policy hold still.
    """
    groups = state.group_of()
    ages = dict.fromkeys((group.beta1, state.moments[name].step) for name, group in groups.items() if name in names)
    return [clip_factor * _sum_of_weights(beta1, step) for beta1, step in ages]


def _sum_of_weights(beta1: float, step: int) -> float:
    """Σ_{k≥0} (1 − β) β^k / (1 − β^{t+1+k}), to a relative 1e-12.

    Each term is a geometric series in β^{t+1+k}; summed over k first, they are Σ_{j≥0} β^{j(t+1)} (1 − β) / (1 − β^{j+1}),
    which needs few terms late in a run. What is left after J of them is at most
    β^{J(t+1)} / (1 − β^{t+1}) · (1 − β) / (1 − β^{J+1}).
    """
    ratio = beta1 ** (step + 1)
    total, first, chunk = 0.0, 0, 4096
    while True:
        j = np.arange(first, first + chunk, dtype=np.float64)
        total += float((ratio**j * (1.0 - beta1) / (1.0 - beta1 ** (j + 1.0))).sum())
        first += chunk
        rest = ratio**first / (1.0 - ratio) * (1.0 - beta1) / (1.0 - beta1 ** (first + 1))
        if rest <= 1e-12 * total:
            return total
        chunk = min(2 * chunk, 1 << 20)
