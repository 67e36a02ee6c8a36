"""P is the preconditioner that torch's own step uses, and the validator names every defect."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from entropy_probe import AdamState, InputError, state_of_optimizer
from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.common.arrays import FloatArray
from entropy_probe.optimizers import validation
from entropy_probe.optimizers.preconditioner import ZeroV, preconditioner
from entropy_probe.optimizers.state import AdamMoments
from entropy_probe.optimizers.validation import normal_chunk, validate_preconditioner
from entropy_probe.ranks.collectives import Ranks
from entropy_probe.ranks.sharding import Sharding, row_spans
from support import (
    adam_state,
    hf_groups,
    save_checkpoint,
    tiny_model,
)


def _with(value: float) -> torch.Tensor:
    moment = torch.ones(2, 3, dtype=torch.float64)
    moment[1, 2] = value
    return moment


DEFECTS: dict[str, tuple[dict[str, Any], str]] = {
    "nan-v": ({"exp_avg_sq": _with(float("nan"))}, "exp_avg_sq holds NaN"),
    "inf-v": ({"exp_avg_sq": _with(float("inf"))}, "exp_avg_sq holds an infinite value"),
    "negative-v": ({"exp_avg_sq": _with(-1e-300)}, "exp_avg_sq holds a negative value"),
    "nan-m": ({"exp_avg": _with(float("nan"))}, "exp_avg holds NaN"),
    "inf-m": ({"exp_avg": _with(float("-inf"))}, "exp_avg holds an infinite value"),
    "nan-maximum": ({"max_exp_avg_sq": _with(float("nan"))}, "max_exp_avg_sq holds NaN"),
    "negative-maximum": ({"max_exp_avg_sq": _with(-1.0)}, "max_exp_avg_sq holds a negative value"),
    "mis-shaped-v": ({"exp_avg_sq": torch.ones(3, 2)}, "exp_avg_sq has shape"),
    "mis-shaped-m": ({"exp_avg": torch.ones(6)}, "exp_avg has shape"),
    "step-0": ({"step": 0}, "step is 0"),
    "step-negative": ({"step": -2}, "step is -2"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_the_validator_names_the_parameter_and_its_defect(name: str) -> None:
    changed, what = DEFECTS[name]
    with pytest.raises(InputError, match=f"parameter b.weight: .*{what}"):
        validate_preconditioner(*adam_state(**changed))


def test_the_validator_names_a_parameter_without_state_or_group_and_a_zero_v_without_eps() -> None:
    state, shapes = adam_state()
    validate_preconditioner(state, shapes)
    without = {name: moments for name, moments in state.moments.items() if name != "c.weight"}
    with pytest.raises(InputError, match=r"parameter c.weight: no Adam state"):
        validate_preconditioner(AdamState(state.groups, without), shapes)
    with pytest.raises(InputError, match=r"parameter d.weight: no Adam state"):
        validate_preconditioner(state, shapes | {"d.weight": torch.Size([2, 3])})
    zero, _ = adam_state(exp_avg_sq=torch.zeros(2, 3, dtype=torch.float64))
    validate_preconditioner(zero, shapes)
    (group,) = zero.groups
    with pytest.raises(InputError, match=r"parameter b.weight: .*v holds zeros"):
        validate_preconditioner(AdamState((replace(group, eps=0.0),), zero.moments), shapes)


def test_the_validators_dots_are_those_of_its_vectors_and_leave_the_random_state_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(validation, "CHUNK", 4)  # two chunks of 4 and 2 a parameter
    state, shapes = adam_state()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    test = validate_preconditioner(state, shapes, seed=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[union-attr]
    plain = weighted = 0.0
    for number, name in enumerate(shapes):
        left, right = (
            np.concatenate(
                [
                    np.random.Generator(np.random.Philox(key=[3, number], counter=[0, 0, vector, k])).standard_normal(n)
                    for k, n in enumerate((4, 2))
                ]
            )
            for vector in (0, 1)
        )
        p = 1.0 / (state.moments[name].exp_avg_sq.div(1 - 0.999).sqrt() + 1e-8).flatten().numpy()
        plain += float((left * right).sum())
        weighted += float((left * right * p).sum())
    assert test.plain_dot == pytest.approx(plain, rel=1e-12)
    assert test.preconditioned_dot == pytest.approx(weighted, rel=1e-12)


def test_no_two_chunks_of_the_test_vectors_are_alike_and_seeds_of_any_size_do() -> None:
    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2**63 - 1, 0, 0, 0)]
    drawn = [normal_chunk(*place, 50).tolist() for place in places]
    assert len({number for chunk in drawn for number in chunk}) == 50 * len(places)
    assert normal_chunk(*places[0], 20).tolist() == drawn[0][:20]


class OneOf(Ranks):
    """A rank whose sums are its own part."""

    def sum_numbers(self, values: FloatArray) -> FloatArray:
        return values


def test_ranks_draw_only_the_chunks_of_their_rows_and_sum_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "CHUNK", 4)
    state, _ = adam_state()
    shapes = {"a.weight": torch.Size([7, 3]), "b.weight": torch.Size([1, 2])}  # the last ranks of "b" have no row
    generator = torch.Generator().manual_seed(0)
    moments = {n: AdamMoments(2, *torch.rand(2, *s, generator=generator)) for n, s in shapes.items()}
    whole = validate_preconditioner(AdamState(state.groups, moments), shapes, seed=5)
    drawn: list[tuple[int, ...]] = []

    def noted(*place: int) -> torch.Tensor:
        drawn.append(place)
        return normal_chunk(*place)

    monkeypatch.setattr(validation, "normal_chunk", noted)
    spans, parts = row_spans(shapes, 3), []
    for rank in range(3):
        own = {
            n: replace(m, exp_avg=m.exp_avg.chunk(3)[rank], exp_avg_sq=m.exp_avg_sq.chunk(3)[rank])
            if rank < len(m.exp_avg.chunk(3))
            else replace(m, exp_avg=m.exp_avg[:0], exp_avg_sq=m.exp_avg_sq[:0])
            for n, m in moments.items()
        }
        sharding = Sharding(OneOf(rank, 3), spans, sharded=True)
        parts.append(validate_preconditioner(AdamState(state.groups, own), shapes, seed=5, sharding=sharding))
        first, last = spans["a.weight"][rank].start, spans["a.weight"][rank].stop - 1
        overlapped = {(0, chunk) for chunk in range(first // 4, last // 4 + 1)} | ({(1, 0)} if rank == 0 else set())
        assert {(number, chunk) for _, number, _, chunk, _ in drawn} == overlapped
        drawn.clear()
    for dot in ("plain_dot", "preconditioned_dot"):
        assert sum(getattr(part, dot) for part in parts) == pytest.approx(getattr(whole, dot), rel=1e-12)


def step_by_torch(
    lr: float, beta2: float, eps: float, steps: int, amsgrad: bool, scales: list[float], seed: int
) -> tuple[AdamState, torch.Tensor, torch.Tensor]:
    """The state after torch's last step, that step's gradient, and what the step changed."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(4, 3, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.0, beta2), eps=eps, weight_decay=0.0, amsgrad=amsgrad
    )
    for step in range(steps):
        model.weight.data.zero_()
        model.weight.grad = scales[step % len(scales)] * torch.randn(3, 4, generator=generator, dtype=torch.float64)
        optimizer.step()
    assert model.weight.grad is not None
    return state_of_optimizer(optimizer, model), model.weight.grad, model.weight.detach()


HYPERPARAMETERS = {
    "lr": st.floats(1e-7, 1.0),
    "beta2": st.floats(0.0, 0.9999),
    "eps": st.sampled_from([1e-12, 1e-8, 1e-3]),
    "steps": st.integers(1, 12),
    "amsgrad": st.booleans(),
    "scales": st.lists(st.sampled_from([1e-6, 1e-2, 1.0, 100.0]), min_size=1, max_size=4),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(**HYPERPARAMETERS)
@example(lr=1e-3, beta2=0.999, eps=1e-8, steps=3, amsgrad=True, scales=[100.0, 1.0, 1e-2], seed=0)
def test_torchs_own_step_without_momentum_is_minus_lr_p_g(
    lr: float, beta2: float, eps: float, steps: int, amsgrad: bool, scales: list[float], seed: int
) -> None:
    state, gradient, change = step_by_torch(lr, beta2, eps, steps, amsgrad, scales, seed)
    p = preconditioner(state.moments["weight"], state.groups[0])
    torch.testing.assert_close(change, -lr * p * gradient, rtol=1e-12, atol=1e-12 * lr)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    beta2=st.floats(0.9, 0.9999),
    steps=st.integers(1, 12),
    amsgrad=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_planted_a_preconditioner_without_bias_correction_is_not_torchs(
    beta2: float, steps: int, amsgrad: bool, seed: int
) -> None:
    state, gradient, change = step_by_torch(1e-3, beta2, 1e-8, steps, amsgrad, [1.0], seed)
    moments = state.moments["weight"]
    v = moments.exp_avg_sq if moments.max_exp_avg_sq is None else moments.max_exp_avg_sq
    planted = 1.0 / (v.sqrt() + 1e-8)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(change, -1e-3 * planted * gradient, rtol=1e-12, atol=1e-15)


def test_amsgrads_maximum_takes_vs_place_and_survives_the_file(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(hf_groups(model), lr=1e-3, amsgrad=True)
    for scale in (10.0, 0.1):
        for p in model.parameters():
            p.grad = scale * torch.randn_like(p)
        optimizer.step()
    found = load_checkpoint(save_checkpoint(model, optimizer, tmp_path)).adam
    for name, moments in found.moments.items():
        maximum = moments.max_exp_avg_sq
        assert maximum is not None
        assert bool((maximum >= moments.exp_avg_sq).all())
        group = found.group_of()[name]
        p = preconditioner(moments, group)
        by_hand = 1.0 / ((maximum.double() / (1 - 0.999**2)).sqrt() + 1e-8)
        torch.testing.assert_close(p, by_hand, rtol=1e-13, atol=0.0)
        without = preconditioner(AdamMoments(moments.step, moments.exp_avg, moments.exp_avg_sq), group)
        assert not torch.allclose(p, without, rtol=1e-4)


def test_p_is_one_over_root_v_hat_plus_eps_with_eps_outside_the_root() -> None:
    state, _ = adam_state(step=7, exp_avg_sq=torch.tensor([[4e-6, 1.0, 0.0], [9.0, 1e-16, 25.0]], dtype=torch.float64))
    group = replace(state.groups[0], beta2=0.99, eps=1e-4)
    p = preconditioner(state.moments["b.weight"], group, ZeroV.GUIDE)
    correction = 1 - 0.99**7
    for found, v in zip(p.flatten().tolist(), [4e-6, 1.0, 0.0, 9.0, 1e-16, 25.0], strict=True):
        assert found == pytest.approx(1.0 / ((v / correction) ** 0.5 + 1e-4), rel=1e-13)
    with pytest.raises(ValueError, match="0 steps"):
        preconditioner(adam_state(step=0)[0].moments["b.weight"], state.groups[0])


def test_a_live_optimizer_is_mapped_by_identity_whatever_its_order() -> None:
    model = tiny_model("gpt2")
    names = {id(p): name for name, p in model.named_parameters()}
    shuffled = sorted(model.parameters(), key=lambda p: hash(names[id(p)][::-1]))
    optimizer = torch.optim.AdamW([{"params": shuffled[:5], "lr": 0.1}, {"params": shuffled[5:]}], lr=1e-3)
    for number, p in enumerate(shuffled):
        p.grad = torch.full_like(p, float(number + 1))
    optimizer.step()
    state = state_of_optimizer(optimizer, model)
    for number, p in enumerate(shuffled):
        assert float(state.moments[names[id(p)]].exp_avg.mean()) == pytest.approx(0.1 * (number + 1), rel=1e-5)
    assert state.groups[0].names == tuple(names[id(p)] for p in shuffled[:5])
    with pytest.raises(InputError, match="does not have"):
        state_of_optimizer(torch.optim.AdamW([nn.Parameter(torch.ones(2))]), model)
