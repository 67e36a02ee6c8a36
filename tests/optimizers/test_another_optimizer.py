"""Another elementwise optimizer is one class: a whole probe with plain gradient descent in Adam's place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import support
from entropy_probe import Settings, probe, state_of_optimizer
from entropy_probe.data.units import exact_units
from entropy_probe.gradients import reference
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.base import DotGroup, OptimizerState, PreconditionerTest
from entropy_probe.optimizers.clipping import clip_factor, gradient_norm
from entropy_probe.optimizers.geometry import Geometry, GivenMetric
from entropy_probe.pipeline.inputs import resolve_advantages, resolve_length_weights
from entropy_probe.ranks.sharding import WHOLE, Sharding
from entropy_probe.statistics.u_statistics import cross_statistics
from entropy_probe.targets.entropy import EntropyTarget

RATE = 3e-3
GROUP = DotGroup(0, RATE)
LIMIT = 0.05


@dataclass(frozen=True)
class OthersDescent:
    """η · clip · Ȳ_−u, with neither momentum nor weight decay."""

    ascent: Mapping[str, Tensor]
    clip_factor: float
    sizes: Sequence[int]
    count: int = 6

    def along(
        self, name: str, part: slice, x: Tensor, y: Tensor, units: Sequence[int], terms: Sequence[Tensor] = ()
    ) -> Tensor:
        own = torch.tensor([self.sizes[u] for u in units], dtype=x.dtype)[:, None]
        others = (sum(self.sizes) * self.ascent[name].flatten()[part].to(x) - y) / (sum(self.sizes) - own)
        gradient = RATE * self.clip_factor * (x * others).sum(1)
        nothing = torch.zeros_like(gradient)
        return torch.stack([nothing, gradient, nothing] * 2, dim=1).double()

    def response(self, name: str, part: slice) -> Tensor:
        return torch.full_like(self.ascent[name].flatten()[part], RATE * self.clip_factor, dtype=torch.float64)

    def term_responses(self, name: str, part: slice) -> Sequence[tuple[Tensor, Tensor]]:
        return []


@dataclass(frozen=True)
class Descent:
    """θ + η Ȳ: P is 1 everywhere."""

    shapes: Mapping[str, torch.Size]

    @property
    def group_rates(self) -> tuple[float, ...]:
        return (RATE,)

    @property
    def metric(self) -> GivenMetric:
        return GivenMetric({name: torch.ones(shape, dtype=torch.float64) for name, shape in self.shapes.items()})

    def dot_groups(self) -> Mapping[str, DotGroup]:
        return dict.fromkeys(self.shapes, GROUP)

    def validate(
        self, shapes: Mapping[str, torch.Size], *, seed: int = 0, sharding: Sharding = WHOLE
    ) -> PreconditionerTest:
        return PreconditionerTest(0.0, 0.0)

    def settings(self) -> object:
        return RATE

    def digest(self) -> bytes:
        return b""

    def had_gradient(self, name: str) -> bool:
        return False

    def gradient_factors(self, names: Collection[str]) -> dict[DotGroup, float] | None:
        return {GROUP: 1.0}

    def spread_factors(self, names: Collection[str], clip_factor: float) -> list[float]:
        return [clip_factor]

    def deltas(
        self,
        parameters: Mapping[str, Tensor],
        ascent: Mapping[str, Tensor],
        *,
        max_grad_norm: float | None = None,
        sharding: Sharding = WHOLE,
    ) -> dict[str, Tensor]:
        factor = clip_factor(gradient_norm(ascent, sharding), max_grad_norm)
        return {name: RATE * factor * y.double() for name, y in ascent.items()}

    def stored(self, *given: object, **more: object) -> None:
        return None

    def steps_of_others(
        self,
        parameters: Mapping[str, Tensor],
        ascent: Mapping[str, Tensor],
        clip_factor: float,
        sizes: Sequence[int],
        terms: Sequence[Mapping[str, Tensor]] = (),
    ) -> OthersDescent:
        return OthersDescent(ascent, clip_factor, sizes)


def test_a_probe_with_plain_gradient_descent_knows_nothing_of_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    batch = support.random_batch(8, 3)
    descent: OptimizerState = Descent({name: p.shape for name, p in model.named_parameters()})
    monkeypatch.setattr("entropy_probe.pipeline.run.Adam", lambda *_: descent)
    report = probe(model, adam, batch, Settings(max_grad_norm=LIMIT)).report

    y: Any = resolve_advantages(batch, None)[0] * resolve_length_weights(batch, LengthWeight.GUIDE)
    target = EntropyTarget(Settings().estimator, Settings().entropy)
    truth = reference.unit_gradients(Policy(model), batch, exact_units(8), Sides(target, y), Geometry.of(descent))
    u_cross = cross_statistics(truth.total).u_cross
    assert report.first_order.u_cross == pytest.approx(u_cross, rel=1e-9)
    assert report.first_order.delta_h1 == pytest.approx(-RATE * u_cross, rel=1e-9)
    assert report.first_order.learning_rate == RATE
    # Its own step is η Ȳ, clipped, and nothing else; so its parts, its U-statistic and the realised rows say the same.
    factor = clip_factor(gradient_norm(truth.ascent), LIMIT)
    assert factor < 1
    assert report.adamw.total == pytest.approx(-RATE * factor * u_cross, rel=1e-9)
    assert report.adamw.u_statistic == pytest.approx(report.adamw.total, rel=1e-9)
    assert (report.adamw.parts["momentum"].value, report.adamw.parts["weight_decay"].value) == (0.0, 0.0)
    preconditioned, own = report.realized[:2]
    assert own.predicted == pytest.approx(factor * preconditioned.predicted, rel=1e-9)
