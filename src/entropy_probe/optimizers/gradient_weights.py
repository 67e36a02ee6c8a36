"""The weight of a fresh gradient in Adam's step, at this step and over the steps to come."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from entropy_probe.optimizers.state import AdamState


def gradient_factors(state: AdamState, names: Collection[str]) -> dict[float, float] | None:
    """(1 − β₁) / (1 − β₁^{t+1}), the share of the fresh gradient in the step, by learning rate, of parameters with a gradient.

    None where parameters of one learning rate differ in it: their dots are not told apart.
    """
    found: dict[float, float] = {}
    for name, group in state.group_of().items():
        if name not in names:
            continue
        factor = (1.0 - group.beta1) / (1.0 - group.beta1 ** (state.moments[name].step + 1))
        if not math.isclose(found.setdefault(group.learning_rate, factor), factor, rel_tol=1e-9):
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


def gradient_weights(state: AdamState, names: Collection[str], clip_factor: float) -> dict[float, float] | None:
    """By learning rate η, the weight η (1 − β₁) / (1 − β₁^{t+1}) · clip of P Ȳ in the step with v at t; None as above."""
    factors = gradient_factors(state, names)
    return None if factors is None else {rate: rate * factor * clip_factor for rate, factor in factors.items()}
