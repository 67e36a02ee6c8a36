"""Dots are kept by parameter group: groups alike share one, groups at one rate with other betas do not, and sums stay."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import support
from entropy_probe import AdamState, Settings, probe, state_of_optimizer
from entropy_probe.data.units import exact_units
from entropy_probe.gradients import Storage, Wanted, engine, reference
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.adam import Adam
from entropy_probe.optimizers.base import DotGroup
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.optimizers.gradient_weights import dot_groups, gradient_factors
from entropy_probe.optimizers.state import AdamGroup, AdamMoments
from entropy_probe.targets.entropy import EntropyTarget


@functools.cache
def setting() -> tuple[Any, AdamState]:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    return model, state_of_optimizer(support.trained_optimizer(model, steps=5, learning_rate=1e-4), model)


def split(state: AdamState, *changes: dict[str, float]) -> AdamState:
    """A state whose parameters stand in as many groups as there are changes, each group with its change."""
    names = list(state.moments)
    groups = [
        replace(state.groups[0], names=tuple(names[number :: len(changes)]), **change)  # type: ignore[arg-type]
        for number, change in enumerate(changes)
    ]
    return AdamState(tuple(groups), state.moments)


def group_of(name: str, **more: Any) -> AdamGroup:
    return replace(AdamGroup((name,), 1e-3, 0.9, 0.999, 1e-8, 0.0, False, False, True), **more)


def test_groups_alike_in_rate_beta1_and_step_share_one_dot_group() -> None:
    moments = {name: AdamMoments(7, torch.zeros(1), torch.ones(1)) for name in "abcde"}
    moments["d"] = replace(moments["d"], step=8)
    groups = (
        group_of("a", weight_decay=0.1),
        group_of("b", beta2=0.9),
        group_of("c", beta1=0.5),
        group_of("d"),
        group_of("e", learning_rate=2e-3),
    )
    found = dot_groups(AdamState(groups, moments))
    assert found["a"] == found["b"] == DotGroup(0, 1e-3)
    assert [found[name].index for name in "cde"] == [2, 3, 4]
    # A group whose parameters are at steps of their own is by itself, so that another's factor stays known.
    mixed = AdamState((group_of("a"), replace(group_of("b"), names=("b", "d"))), moments)
    assert dot_groups(mixed) == {"a": DotGroup(0, 1e-3), "b": DotGroup(1, 1e-3), "d": DotGroup(1, 1e-3)}
    assert gradient_factors(mixed, ["a", "b", "d"]) is None
    assert gradient_factors(mixed, ["a", "d"]) == pytest.approx(
        {DotGroup(0, 1e-3): 0.1 / (1 - 0.9**8), DotGroup(1, 1e-3): 0.1 / (1 - 0.9**9)}
    )


@pytest.mark.parametrize("backend", [engine, reference])
@pytest.mark.parametrize("storage", list(Storage))
def test_dots_of_groups_add_up_to_those_of_all_parameters(backend: Any, storage: Storage) -> None:
    model, state = setting()
    batch = support.random_batch(5, 3)
    a = torch.randn(len(batch.responses), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def found(of: AdamState) -> Any:
        return backend.unit_gradients(
            Policy(model),
            batch,
            exact_units(5),
            Sides(EntropyTarget(), a),
            Geometry.of(Adam(of)),
            wanted=Wanted(storage),
        )

    one, three = found(split(state, {})), found(split(state, {"beta1": 0.5}, {"beta1": 0.8}, {}))
    assert [len(gradients.dots) for gradients in (one, three)] == [1, 3]
    assert [group.index for group in three.dots] == [0, 1, 2]
    for field in ("x_dot_sum", "y_dot_sum", "diagonal", "sum_dot"):
        for weighted in ("total", "step_weighted"):
            expected = getattr(getattr(one, weighted), field)
            scale = float(np.abs(expected).max())
            np.testing.assert_allclose(getattr(getattr(three, weighted), field), expected, rtol=0, atol=1e-12 * scale)


def test_groups_of_one_rate_and_other_betas_have_a_u_statistic_each_by_its_own_factor() -> None:
    model, state = setting()
    batch = support.random_batch(8, 3)
    alike, apart = (
        probe(model, adam, batch, Settings(noise=False)).report
        for adam in (split(state, {}, {}), split(state, {"beta1": 0.5}, {}))
    )
    assert apart.first_order.learning_rate == 1e-4
    assert apart.first_order.delta_h1 == pytest.approx(alike.first_order.delta_h1, rel=1e-11)
    assert apart.adamw.gradient_factor == pytest.approx([0.5 / (1 - 0.5**6), 0.1 / (1 - 0.9**6)])
    assert apart.adamw.u_statistic == pytest.approx(apart.adamw.parts["gradient"].v_at_t, rel=1e-9)
    assert apart.adamw.u_statistic != pytest.approx(alike.adamw.u_statistic, rel=1e-2)
    assert apart.adamw.u_statistic_se is not None


def test_a_group_that_no_gradient_reaches_does_not_hide_the_others_u_statistic() -> None:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    state = state_of_optimizer(support.trained_optimizer(model, steps=5, learning_rate=1e-4), model)
    batch = support.random_batch(8, 3)
    expected = probe(model, state, batch, Settings(noise=False)).report
    model.spare = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    never = AdamMoments(5, torch.zeros(3), torch.zeros(3))
    more = AdamState((*state.groups, group_of("spare", learning_rate=5.0)), {**state.moments, "spare": never})
    found = probe(model, more, batch, Settings(noise=False)).report
    assert found.adamw.u_statistic == pytest.approx(expected.adamw.u_statistic, rel=1e-12)
    assert found.adamw.gradient_factor == expected.adamw.gradient_factor
