"""The pure step in parts is the step that torch.optim takes, plain, foreach and fused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import example as given_too
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from entropy_probe import AdamState, state_of_optimizer
from entropy_probe.optimizers.adam import Adam
from entropy_probe.optimizers.adamw_step import adamw_step
from entropy_probe.optimizers.clipping import clip_factor
from entropy_probe.optimizers.geometry import Geometry
from oracle import optimizer_step, parts_with_v_at_t

TOLERANCE = 1e-12
"""Of the largest element of Δθ, beside the last digit of θ and θ⁺, below which their difference shows nothing."""

KINDS = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@dataclass(frozen=True)
class Case:
    """A state after some steps, the next gradient, and what torch makes of the two."""

    theta: dict[str, Tensor]
    state: AdamState
    ascent: dict[str, Tensor]
    max_grad_norm: float | None
    moved: dict[str, Tensor]
    norm: float


def case(
    kind: str = "plain",
    *,
    seed: int = 0,
    steps: int = 3,
    max_grad_norm: float | None = None,
    decoupled: bool = True,
    groups: tuple[dict[str, Any], dict[str, Any]] = ({}, {}),
) -> Case:
    """Two groups with settings of their own; ``c`` gets no gradient at the last step, ``b`` none at the first."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(7, generator=generator, dtype=torch.float64)

    model = nn.ParameterDict({name: nn.Parameter(draw()) for name in "abc"})
    optimizer_class = torch.optim.AdamW if decoupled else torch.optim.Adam
    defaults = {"lr": 0.3, **KINDS[kind]}
    optimizer = optimizer_class(
        [{"params": [model["a"], model["c"]], **groups[0]}, {"params": [model["b"]], **groups[1]}], **defaults
    )
    for step in range(steps):
        for name, p in model.items():
            p.grad = None if name == "b" and step == 0 else draw(10.0 ** (1 - step))
        optimizer.step()
    state = state_of_optimizer(optimizer, model)
    # torch's own step goes on with these very tensors.
    moments = {
        name: replace(
            m,
            exp_avg=m.exp_avg.clone(),
            exp_avg_sq=m.exp_avg_sq.clone(),
            max_exp_avg_sq=None if m.max_exp_avg_sq is None else m.max_exp_avg_sq.clone(),
        )
        for name, m in state.moments.items()
    }
    theta = {name: p.detach().clone() for name, p in model.items()}
    ascent = {name: draw() for name in "ab"}
    signs = {"a": groups[0].get("maximize", False), "b": groups[1].get("maximize", False)}
    model["c"].grad = None
    for name, y in ascent.items():
        model[name].grad = y.clone() if signs[name] else -y
    norm = float(nn.utils.clip_grad_norm_(list(model.values()), float("inf")))
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(list(model.values()), max_grad_norm)
    optimizer.step()
    moved = {name: p.detach() - theta[name] for name, p in model.items()}
    return Case(theta, AdamState(state.groups, moments), ascent, max_grad_norm, moved, norm)


def gap(found: dict[str, Tensor], moved: dict[str, Tensor], theta: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest element of its parameter's Δθ; names that are absent stay.

    ``moved`` is θ⁺ − θ, each of which torch has rounded: half of a last digit of either is taken off. Where an earlier step
    divided a large momentum by a small √v (β₂ = 0), θ is 1e5 times the step, and that is 1e-11 of it.
    """
    worst = 0.0
    for name, truth in moved.items():
        difference = (found[name] if name in found else torch.zeros_like(truth)) - truth
        last_digits = torch.finfo(torch.float64).eps / 2 * (theta[name].abs() + (theta[name] + truth).abs())
        beyond = (difference.abs() - last_digits).clamp(min=0.0)
        worst = max(worst, float(beyond.max()) / max(float(truth.abs().max()), 1e-300))
    return worst


def step_of(case: Case, **more: Any) -> Any:
    return adamw_step(case.theta, case.state, case.ascent, max_grad_norm=case.max_grad_norm, **more)


GROUP = st.fixed_dictionaries(
    {
        "lr": st.floats(0.05, 1.0),
        "betas": st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.9, 0.999])),
        "eps": st.sampled_from([1e-8, 1e-3, 1.0]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.5]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
    }
)


FAR_FROM_ZERO = {"lr": 1.0, "betas": (0.5, 0.0), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
"""θ of 5e4 at the last step, whose Δθ is 0.5."""


@pytest.mark.parametrize("kind", KINDS)
@given_too(seed=6, steps=6, max_grad_norm=None, decoupled=False, groups=(FAR_FROM_ZERO, FAR_FROM_ZERO))
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    steps=st.integers(0, 6),
    max_grad_norm=st.sampled_from([None, 0.1, 1.0, 1e3]),
    decoupled=st.booleans(),
    groups=st.tuples(GROUP, GROUP),
)
def test_the_sum_of_the_parts_is_torchs_step(kind: str, **drawn: Any) -> None:
    example = case(kind, **drawn)
    found = step_of(example)
    assert gap(found.deltas, example.moved, example.theta) < TOLERANCE
    assert found.gradient_norm == pytest.approx(example.norm, rel=1e-14)
    assert set(found.momentum) == set(found.gradient) == set(found.weight_decay) == {"a", "b"}


def at_t(example: Case) -> dict[str, Tensor]:
    moments = {name: replace(m, step=m.step - 1) for name, m in example.state.moments.items()}
    return step_of(replace(example, state=AdamState(example.state.groups, moments))).deltas


def v_at_t(example: Case) -> dict[str, Tensor]:
    parts = parts_with_v_at_t(example.theta, example.state, example.ascent, step_of(example).clip_factor)
    return {name: sum(part[name] for part in parts) for name in example.ascent}  # type: ignore[misc]


def clipped_after_the_moments(example: Case) -> dict[str, Tensor]:
    found = step_of(replace(example, max_grad_norm=None))
    factor = step_of(example).clip_factor
    return {n: factor * (found.momentum[n] + found.gradient[n]) + found.weight_decay[n] for n in found.gradient}


def other_weight_decay(example: Case) -> dict[str, Tensor]:
    groups = tuple(replace(g, decoupled_weight_decay=not g.decoupled_weight_decay) for g in example.state.groups)
    return step_of(replace(example, state=AdamState(groups, example.state.moments))).deltas


def clipped_group_by_group(example: Case) -> dict[str, Tensor]:
    return {
        name: delta
        for name in example.ascent
        for delta in step_of(replace(example, ascent={name: example.ascent[name]})).deltas.values()
    }


PLANTED: list[Callable[[Case], dict[str, Tensor]]] = [
    at_t, v_at_t, clipped_after_the_moments, other_weight_decay, clipped_group_by_group,
]  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "coupled"])
def test_planted_bugs_are_not_torchs_step(planted: Callable[[Case], dict[str, Tensor]], decoupled: bool) -> None:
    example = case(max_grad_norm=0.5, decoupled=decoupled, groups=({"weight_decay": 0.1}, {"weight_decay": 0.1}))
    assert gap(step_of(example).deltas, example.moved, example.theta) < TOLERANCE
    assert gap(planted(example), example.moved, example.theta) > 1e-3


def test_each_part_is_what_the_step_loses_without_its_cause() -> None:
    """Neither enters v⁺, so the rest of the step stays."""
    example = case(groups=({"weight_decay": 0.1}, {"weight_decay": 0.0}))
    found = step_of(example)
    without = {n: replace(m, exp_avg=torch.zeros_like(m.exp_avg)) for n, m in example.state.moments.items()}
    momentless = step_of(replace(example, state=AdamState(example.state.groups, without)))
    undecayed = step_of(
        replace(
            example,
            state=AdamState(tuple(replace(g, weight_decay=0.0) for g in example.state.groups), example.state.moments),
        )
    )
    for name in "ab":
        torch.testing.assert_close(
            found.deltas[name] - momentless.deltas[name], found.momentum[name], rtol=1e-9, atol=0
        )
        torch.testing.assert_close(
            found.deltas[name] - undecayed.deltas[name], found.weight_decay[name], rtol=1e-9, atol=1e-15
        )
        assert not momentless.momentum[name].any()
    assert not found.weight_decay["b"].any()


def test_beta1_zero_and_step_zero_carry_no_momentum() -> None:
    betas = {"betas": (0.0, 0.99)}
    assert not any(part.any() for part in step_of(case(groups=(betas, betas))).momentum.values())
    first = case(steps=0)
    assert not first.state.moments
    found = step_of(first)
    assert not any(part.any() for part in found.momentum.values())


def test_with_v_at_t_the_gradient_part_is_its_factor_of_the_preconditioned_step() -> None:
    example = case(max_grad_norm=0.5)
    factor = clip_factor(example.norm, example.max_grad_norm)
    _, gradient, _ = parts_with_v_at_t(example.theta, example.state, example.ascent, factor)
    groups = example.state.group_of()
    step = Geometry.of(Adam(example.state)).step(example.ascent)
    for name, delta in gradient.items():
        beta1, t = groups[name].beta1, example.state.moments[name].step
        share = (1 - beta1) / (1 - beta1 ** (t + 1)) * factor
        torch.testing.assert_close(delta, share * step[name], rtol=1e-12, atol=0)


def test_the_pure_step_and_the_clones_agree_and_neither_touches_what_it_is_given() -> None:
    example = case(groups=({"amsgrad": True, "weight_decay": 0.1}, {"maximize": True}))
    before = [
        t.clone()
        for m in example.state.moments.values()
        for t in (m.exp_avg, m.exp_avg_sq, m.max_exp_avg_sq)
        if t is not None
    ]
    found = step_of(example).deltas
    clones = optimizer_step({name: nn.Parameter(p) for name, p in example.theta.items()}, example.state, example.ascent)
    assert gap(found, clones, example.theta) < TOLERANCE
    after = [
        t for m in example.state.moments.values() for t in (m.exp_avg, m.exp_avg_sq, m.max_exp_avg_sq) if t is not None
    ]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_norm_that_is_not_above_zero_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="max_grad_norm"):
        step_of(replace(case(), max_grad_norm=value))
