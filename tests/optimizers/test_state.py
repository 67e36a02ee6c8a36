"""Settings of each parameter group count, and errors clustered by prompt equal their loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from entropy_probe import AdamState, state_of_optimizer
from entropy_probe.optimizers.state import AdamGroup, group_from_settings
from entropy_probe.statistics.importance_sampling import entropy_change, entropy_estimate
from oracle import optimizer_step
from support import adam_state


def test_a_groups_settings_are_read_and_what_older_torch_does_not_write_is_adamws() -> None:
    needed = {"lr": 1e-3, "betas": (0.8, 0.99), "eps": 1e-6}
    assert group_from_settings(needed, ["a"]) == AdamGroup(("a",), 1e-3, 0.8, 0.99, 1e-6, 0.0, False, False, True)
    more = {"weight_decay": 0.1, "amsgrad": True, "maximize": True, "decoupled_weight_decay": False}
    assert group_from_settings(needed | more, ["a"]) == AdamGroup(("a",), 1e-3, 0.8, 0.99, 1e-6, 0.1, True, True, False)


def test_learning_rates_are_the_distinct_ones_of_groups_that_hold_parameters() -> None:
    (group,) = adam_state()[0].groups
    groups = (replace(group, names=(), learning_rate=9.0), group, replace(group, learning_rate=0.5), group)
    assert AdamState(groups, {}).learning_rates == (group.learning_rate, 0.5)


def test_groups_of_different_settings_step_as_torchs_own_and_their_maxima_stay() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(200, generator=generator)

    model = nn.ParameterDict({"a": nn.Parameter(draw(0.3)), "b": nn.Parameter(draw())})
    optimizer = torch.optim.AdamW(
        [
            {"params": [model["a"]], "lr": 0.3, "betas": (0.5, 0.9), "eps": 1e-2, "amsgrad": True},
            {"params": [model["b"]], "lr": 1e-3, "weight_decay": 0.2, "maximize": True, "amsgrad": True},
        ]
    )
    for scale in (10.0, 0.1):
        for p in model.parameters():
            p.grad = draw(scale)
        optimizer.step()
    state = state_of_optimizer(optimizer, model)
    before = {n: p.detach().clone() for n, p in model.items()}
    maxima = {n: m.max_exp_avg_sq.clone() for n, m in state.moments.items() if m.max_exp_avg_sq is not None}
    ascent = {"a": draw(5.0), "b": draw(5.0)}
    deltas = optimizer_step(dict(model.items()), state, ascent)
    for name, maximum in maxima.items():
        assert torch.equal(state.moments[name].max_exp_avg_sq, maximum), name
    model["a"].grad, model["b"].grad = -ascent["a"], ascent["b"]
    optimizer.step()
    for name, p in model.items():
        assert torch.equal((before[name].double() + deltas[name]).float(), p.detach()), name
    assert any(not torch.equal(state.moments[name].max_exp_avg_sq, maximum) for name, maximum in maxima.items())


def test_the_clustered_errors_equal_their_loops_over_prompts() -> None:
    rng = np.random.default_rng(2)
    sizes = [3, 1, 2]
    scores, after = -rng.gamma(2.0, 1.0, size=6), -rng.gamma(2.0, 1.0, size=6)
    base = [1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 6, 1 / 6]
    found = entropy_change(scores, after, sizes)
    weights, now, then = found.weights.weights, found.entropy_before, found.entropy_after
    squares = squares_now = 0.0
    for prompt in ([0, 1, 2], [3], [4, 5]):
        squares += sum(weights[i] * (-after[i] - then) - base[i] * (-scores[i] - now) for i in prompt) ** 2
        squares_now += sum(base[i] * (-scores[i] - now) for i in prompt) ** 2
    assert found.se == pytest.approx((3 / 2 * squares) ** 0.5, rel=1e-12)
    assert entropy_estimate(-scores, sizes)[1] == pytest.approx((3 / 2 * squares_now) ** 0.5, rel=1e-12)
