"""Which live optimizers are Adam: torch's own, in whatever wraps them, and no subclass that steps otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from entropy_probe import InputError, state_of_optimizer
from support import assert_same_moments, tiny_model, trained_optimizer


def test_accelerates_wrapper_is_looked_into_and_schedulers_change_nothing() -> None:
    model = tiny_model()
    optimizer = trained_optimizer(model)
    expected = state_of_optimizer(optimizer, model)
    accelerator = Accelerator(cpu=True)
    prepared: Any = accelerator.prepare_optimizer(optimizer)
    assert type(prepared) is not type(optimizer)
    twice: Any = accelerator.prepare_optimizer(optimizer)
    twice.optimizer = prepared
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for given in (optimizer, prepared, twice):
        found = state_of_optimizer(given, model)
        assert_same_moments(found, expected)
        assert [group.names for group in found.groups] == [group.names for group in expected.groups]
    prepared.optimizer = None
    with pytest.raises(InputError, match="AcceleratedOptimizer without an optimizer inside"):
        state_of_optimizer(prepared, model)


class Renamed(torch.optim.AdamW):
    """Adam by another name."""


class Cautious(torch.optim.AdamW):
    """A step of its own, of the same state."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class MoreCautious(Cautious):
    """Which it has from its parent."""


@pytest.mark.parametrize("build", [torch.optim.Adam, torch.optim.AdamW, Renamed])
def test_a_subclass_that_steps_as_adam_does_is_adam(build: Callable[..., torch.optim.Optimizer]) -> None:
    model = tiny_model()
    assert state_of_optimizer(build(model.parameters(), lr=1e-3), model).groups[0].learning_rate == 1e-3


@pytest.mark.parametrize("build", [Cautious, MoreCautious])
def test_a_subclass_with_a_step_of_its_own_is_refused_by_name(build: Callable[..., torch.optim.Optimizer]) -> None:
    model = tiny_model()
    wrapped: Any = Accelerator(cpu=True).prepare_optimizer(build(model.parameters(), lr=1e-3))
    with pytest.raises(
        InputError, match=rf"{build.__name__}, a subclass of Adam with a step of its own \(.*Cautious\.step\)"
    ):  # type: ignore[attr-defined]
        state_of_optimizer(wrapped, model)


def test_another_optimizer_in_the_wrapper_is_refused_by_its_own_name() -> None:
    model = tiny_model()
    wrapped: Any = Accelerator(cpu=True).prepare_optimizer(torch.optim.NAdam(model.parameters()))
    with pytest.raises(InputError, match="the optimizer is NAdam"):
        state_of_optimizer(wrapped, model)


class Muon(torch.optim.SGD):
    """By name: torch has its own from 2.9 on, and others have theirs."""


class Muon8bit(Muon):
    """One of another name."""


@pytest.mark.parametrize("build", [Muon, Muon8bit])
def test_an_optimizer_of_whole_matrices_is_refused_by_name_with_the_reason(build: type[Muon]) -> None:
    model = tiny_model()
    why = rf"the optimizer is {build.__name__}, whose step multiplies whole matrices.*; the probe needs"
    with pytest.raises(InputError, match=why):
        state_of_optimizer(build(model.parameters(), lr=0.1), model)
