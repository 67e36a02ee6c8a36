"""Unit gradients by the engine and by the reference, with the same coefficients, P and rates; and whether they are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.data.units import Units, exact_units
from entropy_probe.gradients import UnitGradients, engine, reference
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.targets.entropy import EntropyTarget

SCORE = EntropyTarget()
RELATIVE = 1e-11
"""Rounding of float64 sums in another order; a misplaced sequence is an error of order one."""


def coefficients(batch: RolloutBatch, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(batch.responses), generator=generator, dtype=torch.float64)


def both(
    model: nn.Module,
    batch: RolloutBatch,
    units: Units,
    size: int,
    c: torch.Tensor | EntropyTarget = SCORE,
    **more: Any,
) -> tuple[UnitGradients, UnitGradients]:
    policy = Policy(model, 0.8, microbatch_size=size)
    generator = torch.Generator().manual_seed(1)
    p = {n: torch.rand(q.shape, generator=generator, dtype=torch.float64) + 0.1 for n, q in policy.trainable().items()}
    geometry = Geometry.fixed(p, {name: 0.5 if "norm" in name else 1.0 for name in p})
    a = coefficients(batch)
    return (
        engine.unit_gradients(policy, batch, units, Sides(c, a), geometry, **more),
        reference.unit_gradients(policy, batch, units, Sides(c, a), geometry),
    )


def assert_same(found: UnitGradients, expected: UnitGradients, relative: float = RELATIVE) -> None:
    for group, dots in expected.dots.items():
        scale = float(np.abs(dots.kernel).max())
        for field in ("x_dot_sum", "y_dot_sum", "diagonal"):
            gap = np.abs(getattr(found.dots[group], field) - getattr(dots, field)).max()
            assert gap <= relative * scale * len(dots.sizes), field
        if found.dots[group].kernel is not None:
            assert np.abs(found.dots[group].kernel - dots.kernel).max() <= relative * scale
    whole = max(float(y.norm()) for y in expected.ascent.values())
    assert found.ascent.keys() == expected.ascent.keys()
    for name, y in expected.ascent.items():
        assert float((found.ascent[name] - y).norm()) <= relative * max(float(y.norm()), 1e-3 * whole), name
    assert found.untouched == expected.untouched
    assert found.cut == expected.cut
    assert torch.allclose(found.scores, expected.scores, rtol=1e-12, atol=1e-12)


def gradients(
    backend: Any, policy: Policy, batch: RolloutBatch, c: torch.Tensor | EntropyTarget = SCORE
) -> UnitGradients:
    generator = torch.Generator().manual_seed(1)
    p = {n: torch.rand(q.shape, generator=generator, dtype=torch.float64) + 0.1 for n, q in policy.trainable().items()}
    units = exact_units(len(batch.groups))
    found: UnitGradients = backend.unit_gradients(
        policy, batch, units, Sides(c, coefficients(batch)), Geometry.fixed(p)
    )
    return found
