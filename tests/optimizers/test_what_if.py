"""What-ifs are what the probe itself says of the other step, where v⁺ is held."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import support
from entropy_probe import AdamState, Settings, probe
from entropy_probe.data.units import exact_units
from entropy_probe.gradients import reference
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.adam import Adam
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.optimizers.step_parts import StepPrediction
from entropy_probe.optimizers.what_if import (
    another_clipping,
    another_learning_rate,
    learning_rate_for_fall,
    no_momentum,
)
from entropy_probe.report import Report, WhatIfRow
from entropy_probe.statistics.estimate import Estimate
from entropy_probe.statistics.u_statistics import cross_statistics
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.entropy import EntropyTarget
from step_setting import coefficients, setting

MODEL, ADAM, _ = setting()
BATCH = support.random_batch(8, 3)
DEFAULTS = Settings()


def report(settings: Settings = DEFAULTS, adam: AdamState = ADAM) -> Report:
    return probe(MODEL, adam, BATCH, settings).report


def row(found: Report, name: str) -> WhatIfRow:
    return next(row for row in found.what_if.rows if row.name == name)


def test_another_learning_rate_is_the_probe_at_that_rate() -> None:
    asked = row(report(Settings(what_if_learning_rate=3e-4)), "learning_rate")
    there = report(Settings(learning_rate=3e-4))
    assert asked.asked == 3e-4
    assert asked.delta_h1 == pytest.approx(there.first_order.delta_h1, rel=1e-10, abs=0)
    assert asked.delta_h1_se == pytest.approx(there.first_order.delta_h1_se, rel=1e-10, abs=0)
    assert asked.adamw == pytest.approx(there.adamw.total, rel=1e-10, abs=0)
    assert asked.adamw_se == pytest.approx(there.adamw.se, rel=1e-10, abs=0)


def test_a_learning_rate_that_nothing_is_a_multiple_of_has_a_reason() -> None:
    groups = (replace(ADAM.groups[0], learning_rate=3e-4), *ADAM.groups[1:])
    apart = report(Settings(what_if_learning_rate=1e-3), AdamState(groups, ADAM.moments))
    assert "learning rates of their own" in row(apart, "learning_rate").null_reasons["adamw"]
    zero = report(Settings(what_if_learning_rate=1e-3), ADAM.with_learning_rate(0.0))
    assert "learning rate is 0" in row(zero, "learning_rate").null_reasons["delta_h1"]
    assert "changes nothing" in zero.adamw.sentence
    for found in (apart, zero):
        found.to_dict()


@pytest.mark.long
def test_another_clipping_is_the_probe_with_it_where_this_gradient_is_a_trace_of_v() -> None:
    slow = AdamState(tuple(replace(g, beta2=1.0 - 1e-9) for g in ADAM.groups), {
        name: replace(m, exp_avg_sq=m.exp_avg_sq * 1e-6, step=m.step) for name, m in ADAM.moments.items()
    })  # fmt: skip
    large = AdamState(slow.groups, {n: replace(m, exp_avg_sq=m.exp_avg_sq * 1e9) for n, m in slow.moments.items()})
    norm = report(adam=large).adamw.gradient_norm
    asked = row(report(Settings(what_if_max_grad_norm=0.25 * norm), large), "max_grad_norm")
    there = report(Settings(max_grad_norm=0.25 * norm), large)
    assert asked.adamw == pytest.approx(there.adamw.total, rel=1e-6, abs=0)
    assert asked.adamw_se == pytest.approx(there.adamw.se, rel=1e-6, abs=0)
    # And back again, from the clipped step to a wider limit.
    back = row(report(Settings(max_grad_norm=0.25 * norm, what_if_max_grad_norm=10 * norm), large), "max_grad_norm")
    assert back.adamw == pytest.approx(report(adam=large).adamw.total, rel=1e-6, abs=0)
    assert "without clipping" in asked.null_reasons["delta_h1"]


def test_no_momentum_is_the_probe_with_moments_of_zero() -> None:
    without = {name: replace(m, exp_avg=torch.zeros_like(m.exp_avg)) for name, m in ADAM.moments.items()}
    asked, there = row(report(), "no_momentum"), report(adam=AdamState(ADAM.groups, without))
    assert there.adamw.parts["momentum"].value == 0.0
    assert asked.adamw == pytest.approx(there.adamw.total, rel=1e-10, abs=0)
    assert asked.adamw_se == pytest.approx(there.adamw.se, rel=1e-10, abs=0)


@pytest.mark.parametrize("estimator", list(Estimator))
def test_without_negative_advantages_is_the_u_statistic_of_the_positive_ones(estimator: Estimator) -> None:
    asked = row(report(Settings(estimator=estimator, what_if_no_negatives=True)), "without_negative_advantages")
    a = coefficients(BATCH)
    assert bool((a < 0).any())

    def statistics(weights: torch.Tensor) -> object:
        dots = reference.unit_gradients(
            Policy(MODEL), BATCH, exact_units(8), Sides(EntropyTarget(estimator), weights), Geometry.of(Adam(ADAM))
        )
        return cross_statistics(dots.step_weighted)

    truth, all_of_them = statistics(torch.where(a > 0, a, 0.0)), statistics(a)
    assert asked.delta_h1 == pytest.approx(-truth.u_cross, rel=1e-9, abs=0)  # type: ignore[attr-defined]
    assert asked.delta_h1_se == pytest.approx(truth.se, rel=1e-9, abs=0)  # type: ignore[attr-defined]
    assert asked.delta_h1 != pytest.approx(-all_of_them.u_cross, rel=1e-2)  # type: ignore[attr-defined]


def test_without_any_negative_advantage_it_is_delta_h1_itself() -> None:
    rows = [replace(r, advantage=r.reward) for r in support.random_rollouts(8, 3)]
    from entropy_probe.data.rollouts import group_rollouts

    found = probe(MODEL, ADAM, group_rollouts(rows), Settings(what_if_no_negatives=True)).report
    asked = row(found, "without_negative_advantages")
    assert asked.delta_h1 == found.first_order.delta_h1
    assert asked.delta_h1_se == found.first_order.delta_h1_se


def prediction(values: tuple[float, float, float], noise: float) -> StepPrediction:
    deviations = noise * np.random.default_rng(0).normal(size=(20, 3))
    return StepPrediction(np.array(values), np.array(values), deviations - deviations.mean(0), 0.0, "")


def test_the_multiple_for_a_fall_is_that_at_which_the_step_falls_so_far() -> None:
    step = prediction((-0.03, -0.01, 0.001), 1e-4)
    found = learning_rate_for_fall(step, 0.1)
    multiple = found.multiple
    assert isinstance(multiple, Estimate)
    assert multiple.ci95 is not None
    assert multiple.value * step.total.value == pytest.approx(-0.1, rel=1e-12)
    assert multiple.ci95[0] < multiple.value < multiple.ci95[1]
    # Each end is where the step's own interval would end.
    assert step.total.se is not None
    widths = [abs(0.1 / end + step.total.value) for end in multiple.ci95]
    assert widths[0] == pytest.approx(widths[1], rel=1e-9, abs=0)
    assert widths[0] / step.total.se == pytest.approx(2.093, rel=1e-3)
    for values, noise, why in (
        ((0.03, 0.01, 0.0), 1e-4, "raises the entropy"),
        ((-0.03, 0.0, 0.0), 1.0, "cannot be told from zero"),
    ):
        assert why in learning_rate_for_fall(prediction(values, noise), 0.1).multiple.why_not


def test_the_arithmetic() -> None:
    step = prediction((-3.0, -1.0, 0.5), 0.1)
    assert another_clipping(step, 0.5, 0.25, 1.0).adamw == step.of(1.0, 0.5, 1.0)
    assert no_momentum(step).adamw == step.of(0.0, 1.0, 1.0)
    asked = another_learning_rate(step, Estimate(-2.0, 0.5, (-3.0, -1.5)), [1e-3], 2e-3)
    assert asked.delta_h1 == Estimate(-4.0, 1.0, (-6.0, -3.0))
    assert asked.adamw == step.total.scaled(2.0)


def test_a_report_keeps_the_questions_in_order() -> None:
    settings = Settings(
        what_if_no_negatives=True, what_if_learning_rate=1e-3, what_if_max_grad_norm=0.1, what_if_fall=0.05
    )
    names = [row.name for row in report(settings).what_if.rows]
    assert names == ["no_momentum", "without_negative_advantages", "learning_rate", "max_grad_norm"]
    assert report().what_if.fall is None
