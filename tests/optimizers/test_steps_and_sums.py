"""The floor is the largest of its gaps; steps and sums are kept in float64 and rounded once."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import support
from entropy_probe import InputError, Settings, probe, state_of_optimizer
from entropy_probe.data.units import Mode, block_units, exact_units
from entropy_probe.gradients import Storage, Wanted, loss_gradient, reference, unit_gradients
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.model.input_limits import check_fits
from entropy_probe.model.policy import Policy
from entropy_probe.model.virtual_step import at_least_float32, virtual_step
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.realized.measure import EntropyMeasure, Predicted
from entropy_probe.realized.realize import realize
from entropy_probe.realized.steps import Step
from entropy_probe.targets.entropy import EntropyTarget


def test_the_norm_is_the_whole_steps() -> None:
    model = support.tiny_model()
    batch = support.random_batch(6, 4)
    policy = Policy(model)
    before = policy.measure(batch.responses, entropies=False)
    deltas = {name: torch.full_like(p, 1e-3) for name, p in model.named_parameters()}
    step, measure = Step("preconditioned", "virtual", deltas), EntropyMeasure(EntropyTarget())
    (found,) = realize(policy, batch, before, step, [Predicted(measure, -0.5)], floors=[0.25])
    assert (found.predicted, found.noise_floor) == (-0.5, 0.25)
    assert found.step_norm == pytest.approx(math.sqrt(sum(float((d**2).sum()) for d in deltas.values())), rel=1e-6)


def test_the_virtual_step_is_summed_in_float64_and_rounded_once() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    just_over_half = torch.full((1, 1), 2.0**-24 * (1 + 2.0**-27), dtype=torch.float64)
    with virtual_step(model, {"weight": just_over_half}):
        assert float(model.weight.detach()) == 1.0 + 2.0**-23


def test_narrow_buffers_are_widened_too_and_integers_are_left() -> None:
    model = nn.BatchNorm1d(2).to(torch.bfloat16)
    with at_least_float32(model):
        assert model.running_mean is not None
        assert model.num_batches_tracked is not None
        assert model.running_mean.dtype == model.weight.dtype == torch.float32
        assert model.num_batches_tracked.dtype == torch.int64
    assert model.running_mean.dtype == model.weight.dtype == torch.bfloat16


def test_blocks_change_the_units_and_neither_the_update_nor_what_is_realised() -> None:
    model = support.tiny_model(dtype=torch.float64)
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-4), model)
    batch = support.random_batch(7, 3)
    exact, blocks = (probe(model, adam, batch, s).report for s in (Settings(mode=Mode.EXACT), Settings(blocks=3)))
    assert blocks.first_order.bars_dot == pytest.approx(exact.first_order.bars_dot, rel=1e-9)
    for one, other in zip(exact.realized, blocks.realized, strict=True):
        assert other.delta_h == pytest.approx(one.delta_h, rel=1e-9)
        assert other.predicted == pytest.approx(one.predicted, rel=1e-9)
        assert other.step_norm == pytest.approx(one.step_norm, rel=1e-9)


@pytest.mark.parametrize("storage", list(Storage))
def test_products_over_chunks_of_parameters_are_the_products_over_all(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = support.tiny_model(dtype=torch.float64)
    batch = support.random_batch(4, 3)
    a = torch.tensor([r.reward - 0.5 for r in batch.responses], dtype=torch.float64)
    p = {name: torch.ones_like(q) for name, q in model.named_parameters()}

    def dots() -> Any:
        found = unit_gradients(
            Policy(model), batch, block_units(4, 3), Sides(a + 0.3, a), Geometry.fixed(p), wanted=Wanted(storage)
        )
        return found.total

    whole = dots()
    monkeypatch.setattr(reference, "CHUNK", 97)
    parts = dots()
    names = ["x_dot_sum", "y_dot_sum", "diagonal", "sum_dot"] + (["kernel"] if storage is Storage.STORED else [])
    for name in names:
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-9, err_msg=name)


class TwoBiases(nn.Module):
    """Autograd hands the very same tensor to ``left`` and to ``right``."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Parameter(torch.zeros(8, dtype=torch.float64)) for _ in range(2))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=(self.left + self.right).expand(*input_ids.shape, 8))


def test_a_gradient_that_two_parameters_share_is_summed_once_into_each() -> None:
    model = TwoBiases()
    batch = support.random_batch(3, 2, vocabulary=8)
    a = torch.arange(6, dtype=torch.float64)
    for name, gradient in loss_gradient(Policy(model, microbatch_size=1), batch.responses, a).items():
        whole = loss_gradient(Policy(model, microbatch_size=6), batch.responses, a)[name]
        torch.testing.assert_close(gradient, whole, msg=name)
    p = {name: torch.ones_like(q) for name, q in model.named_parameters()}
    one, all_ = (
        unit_gradients(Policy(model, microbatch_size=m), batch, exact_units(3), Sides(a, a), Geometry.fixed(p))
        for m in (1, 6)
    )
    np.testing.assert_allclose(one.total.kernel, all_.total.kernel, rtol=1e-12)


def test_a_prompt_past_the_vocabulary_is_refused_too() -> None:
    rows = support.random_rollouts(3, 2)
    spoiled = [dataclasses.replace(r, prompt_ids=(*r.prompt_ids, 99)) if r.prompt_id == "p1" else r for r in rows]
    from entropy_probe.data.rollouts import group_rollouts

    with pytest.raises(InputError, match=r"p1.*token id 99"):
        check_fits(group_rollouts(spoiled), 23, None)


def test_sums_of_gradients_are_kept_in_float64_whatever_the_weights() -> None:
    model = support.tiny_model(dtype=torch.float32)
    batch = support.random_batch(4, 3)
    a = torch.tensor([r.reward - 0.5 for r in batch.responses], dtype=torch.float64)
    p = {name: torch.ones_like(q) for name, q in model.named_parameters()}
    found = unit_gradients(Policy(model), batch, exact_units(4), Sides(a, a), Geometry.fixed(p))
    assert {y.dtype for y in found.ascent.values()} == {torch.float64}
    assert {g.dtype for g in loss_gradient(Policy(model), batch.responses, a).values()} == {torch.float64}
