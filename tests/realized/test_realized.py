"""The realised change: virtual step and clone, restored bit for bit; predictions that are the right linear term."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import support
from entropy_probe import Settings, probe, state_of_optimizer
from entropy_probe.model.policy import Policy
from entropy_probe.model.virtual_step import at_least_float32, virtual_step
from entropy_probe.realized.rounding import rounding_noise
from entropy_probe.statistics.importance_sampling import linear_term
from oracle import optimizer_step


def setting(learning_rate: float = 1e-4, **adam: Any) -> tuple[Any, Any, Any]:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    optimizer = support.trained_optimizer(model, learning_rate=learning_rate, **adam)
    return model, state_of_optimizer(optimizer, model), support.random_batch(6, 4)


def test_the_virtual_step_is_taken_back_bit_for_bit_and_into_the_same_memory() -> None:
    model = support.tiny_model("llama-tied")
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    deltas = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    with virtual_step(model, deltas, 0.5):
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), before[n][1] + 0.5 * deltas[n])
    for n, p in model.named_parameters():
        assert p.data_ptr() == before[n][0]
        assert torch.equal(p.detach(), before[n][1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_virtual_step_is_taken_back_after_an_exception(error: type[BaseException]) -> None:
    model = support.tiny_model("llama-tied")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error), virtual_step(model, {n: torch.ones_like(p) for n, p in model.named_parameters()}):
        raise error
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_step_for_another_model_is_refused_before_anything_moves() -> None:
    model = support.tiny_model("llama-tied")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="nonsense"), virtual_step(model, {"nonsense": torch.ones(1)}):
        pass
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tied_weights_stay_tied_under_the_virtual_step() -> None:
    model = support.tiny_model("llama-tied")
    with virtual_step(model, {n: torch.ones_like(p) for n, p in model.named_parameters()}):
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_linear_weights_are_the_derivative_of_the_estimator() -> None:
    from entropy_probe.statistics.importance_sampling import entropy_change

    rng = np.random.default_rng(0)
    sizes = [3, 2, 4]
    scores, direction = -rng.gamma(2.0, 1.0, size=9), rng.normal(size=9)

    def change(eps: float) -> float:
        return entropy_change(scores, scores + eps * direction, sizes).delta_h

    finite_difference = (change(1e-6) - change(-1e-6)) / 2e-6
    assert linear_term(scores, sizes).on_scores @ direction == pytest.approx(finite_difference, rel=1e-7)


@pytest.mark.parametrize("row", [0, 1], ids=["preconditioned", "adamw"])
def test_realised_minus_predicted_shrinks_as_the_square_of_the_step(row: int) -> None:
    # Weight decay and momentum scale with η too, so both rows' steps are proportional to it.
    gaps = []
    for rate in (4e-6, 2e-6):
        model, adam, batch = setting()
        realized = probe(model, adam, batch, Settings(learning_rate=rate)).report.realized[row]
        gaps.append(abs(realized.delta_h - realized.predicted))
        assert gaps[-1] > 20 * realized.noise_floor
    assert gaps[0] / gaps[1] == pytest.approx(4.0, rel=0.1)


def test_the_clone_takes_torchs_own_step_and_the_live_model_does_not_move() -> None:
    model, adam, batch = setting()
    before = copy.deepcopy(model.state_dict())
    ascent = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    deltas = optimizer_step(dict(model.named_parameters()), adam, ascent)

    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(support.hf_groups(reference), lr=1e-4)
    source = support.tiny_model("llama-tied", dtype=torch.float64)
    optimizer.load_state_dict(support.trained_optimizer(source, learning_rate=1e-4).state_dict())
    for n, p in reference.named_parameters():
        p.grad = -ascent[n]
    optimizer.step()
    for n, p in reference.named_parameters():
        torch.testing.assert_close(before[n] + deltas[n], p.detach(), rtol=0, atol=1e-15, msg=n)
    probe(model, adam, batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_state_that_the_clone_starts_from_is_not_touched() -> None:
    model, adam, batch = setting()
    before = {n: (m.step, m.exp_avg.clone(), m.exp_avg_sq.clone()) for n, m in adam.moments.items()}
    probe(model, adam, batch)
    for name, moments in adam.moments.items():
        assert moments.step == before[name][0]
        assert torch.equal(moments.exp_avg, before[name][1])
        assert torch.equal(moments.exp_avg_sq, before[name][2])


def test_coupled_weight_decay_is_stepped_by_adam() -> None:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.5)
    support.tiny_model("llama-tied")
    ids = torch.randint(3, support.VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    state = state_of_optimizer(optimizer, model)
    assert not state.groups[0].decoupled_weight_decay
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ascent = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    deltas = optimizer_step(dict(model.named_parameters()), state, ascent)
    for n, p in model.named_parameters():
        p.grad = -ascent[n]
    optimizer.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(before[n] + deltas[n], p.detach(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_amsgrad_and_maximize_ascend_the_entropy_objective_alike(amsgrad: bool, maximize: bool) -> None:
    model, adam, _ = setting(amsgrad=amsgrad)
    groups = tuple(
        type(g)(**{**{f: getattr(g, f) for f in g.__dataclass_fields__}, "maximize": maximize}) for g in adam.groups
    )
    ascent = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    momentless = {
        n: type(m)(m.step, torch.zeros_like(m.exp_avg), m.exp_avg_sq, m.max_exp_avg_sq) for n, m in adam.moments.items()
    }
    parameters = dict(model.named_parameters())
    one = optimizer_step(parameters, type(adam)(adam.groups, momentless), ascent)
    other = optimizer_step(parameters, type(adam)(groups, momentless), ascent)
    for n in one:
        torch.testing.assert_close(one[n], other[n], rtol=0, atol=1e-15)


def test_a_bfloat16_model_is_stepped_in_float32_and_is_bfloat16_again() -> None:
    model = support.tiny_model("llama-tied")
    optimizer = support.trained_optimizer(model, learning_rate=1e-5)
    adam = state_of_optimizer(optimizer, model)
    narrow = support.tiny_model("llama-tied")
    narrow.load_state_dict(model.state_dict())
    narrow = narrow.to(torch.bfloat16)
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in narrow.named_parameters()}
    batch = support.random_batch(6, 4)
    report = probe(narrow, adam, batch).report
    assert report.config.dtype == "bfloat16"
    for n, p in narrow.named_parameters():
        assert p.dtype == torch.bfloat16
        assert p.data_ptr() == before[n][0]
        assert torch.equal(p.detach(), before[n][1])
    row = report.realized[0]
    # A step of 1e-5 would vanish in bfloat16; in float32 it is there and follows its linear term.
    assert row.delta_h == pytest.approx(row.predicted, rel=0.05, abs=3 * row.noise_floor)
    assert row.delta_h != 0
    with torch.no_grad():
        vanished = [(p + 1e-5 * torch.ones_like(p) == p).double().mean() for p in narrow.parameters()]
    assert float(torch.stack(vanished).mean()) > 0.5


def test_float32_copies_are_taken_back_after_an_exception() -> None:
    model = support.tiny_model("llama-tied").to(torch.bfloat16)
    pointers = [p.data_ptr() for p in model.parameters()]
    with at_least_float32(model):
        assert all(p.dtype == torch.float32 for p in model.parameters())
    with pytest.raises(RuntimeError, match="planned"), at_least_float32(model):
        raise RuntimeError("planned")
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_autocast_changes_the_gradients_arithmetic_and_not_the_realised_one() -> None:
    model = support.tiny_model("llama-tied")
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-5), model)
    batch = support.random_batch(6, 4)
    plain, mixed = (probe(model, adam, batch, Settings(autocast=a)).report for a in (None, torch.bfloat16))
    assert mixed.first_order.u_cross != plain.first_order.u_cross
    scale = max(map(abs, plain.first_order.row_means))
    assert mixed.first_order.u_cross == pytest.approx(plain.first_order.u_cross, abs=0.1 * scale)
    # The same arithmetic, rows grouped otherwise; scores in bfloat16 would be off by 1e-3.
    assert mixed.realized[0].entropy_before == pytest.approx(plain.realized[0].entropy_before, rel=1e-6)


def test_an_autocast_that_the_caller_is_in_does_not_reach_the_probe() -> None:
    model = support.tiny_model("llama-tied")
    rows = support.random_rollouts(4, 3)
    plain = Policy(model).scores(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Policy(model).scores(rows), plain)
        with torch.no_grad():
            inside = Policy(model).forward_scores(rows)
    assert not torch.equal(inside.double(), plain)


def realised_in(dtype: torch.dtype, rate: float) -> Any:
    """The preconditioned row of one float32 model and its float32 Adam state, computed in ``dtype``."""
    model = support.tiny_model("llama-tied")
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=rate), model)
    return probe(model.to(dtype), adam, support.random_batch(6, 4)).report.realized[0]


@pytest.mark.parametrize("rate", [1e-5, 1e-6, 1e-7, 1e-8])
def test_the_noise_floor_is_the_size_of_the_rounding_error(rate: float) -> None:
    narrow, wide = realised_in(torch.float32, rate), realised_in(torch.float64, rate)
    error = abs(narrow.delta_h - wide.delta_h)
    assert error < 2 * narrow.noise_floor
    assert narrow.noise_floor < 1e-4
    assert 0 < wide.noise_floor < 1e-11


def test_a_change_below_the_floor_is_said() -> None:
    model = support.tiny_model("llama-tied")
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-11), model)
    assert "below_noise_floor" in {w.code for w in probe(model, adam, support.random_batch(6, 4)).report.warnings}


def test_without_the_random_rounding_float32_would_show_no_noise() -> None:
    """Planted: the same eight factors without it leave almost every weight where it was."""
    model = support.tiny_model("llama-tied")
    policy, batch = Policy(model), support.random_batch(6, 4)
    before = policy.scores(batch.responses)
    deltas = {n: torch.randn_like(p) * 1e-3 for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with virtual_step(model, {n: 1e-8 * d for n, d in deltas.items()}):
        hidden = (policy.scores(batch.responses) - before).abs().max()
    with virtual_step(
        model, {n: 1e-8 * d + rounding_noise(model.get_parameter(n), generator) for n, d in deltas.items()}
    ):
        shown = (policy.scores(batch.responses) - before).abs().max()
    assert shown > 1e-7
    assert hidden < 0.3 * shown


def test_random_rounding_moves_by_one_unit_with_the_variance_of_rounding_to_nearest() -> None:
    theta = torch.full((200_000,), 1.5)
    noise = rounding_noise(theta, torch.Generator().manual_seed(0))
    unit = 2.0**-23
    assert set(noise.unique().tolist()) == {-unit, 0.0, unit}
    assert float(noise.var()) == pytest.approx(unit**2 / 12, rel=0.03)


def test_accelerates_mixed_precision_does_not_reach_a_probe_in_float32() -> None:
    from accelerate import Accelerator

    model = support.tiny_model("llama-tied")
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-5), model)
    batch = support.random_batch(6, 4)
    plain = probe(model, adam, batch).report
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    with torch.no_grad():
        wrapped = prepared(input_ids=torch.tensor([[3, 4, 5]])).logits
    found = probe(prepared, adam, batch).report
    assert found.first_order.u_cross == plain.first_order.u_cross
    assert found.realized[0].delta_h == plain.realized[0].delta_h
    with torch.no_grad():  # and it is there again afterwards
        assert torch.equal(prepared(input_ids=torch.tensor([[3, 4, 5]])).logits, wrapped)


def test_an_adapter_narrower_than_its_base_is_realised_in_one_arithmetic() -> None:
    adapted = support.lora_model(support.tiny_model("llama-tied"))
    adam = state_of_optimizer(support.trained_optimizer(adapted, learning_rate=1e-5), adapted)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(torch.bfloat16)
    row = probe(adapted, adam, support.random_batch(6, 4)).report.realized[0]
    assert row.delta_h == pytest.approx(row.predicted, rel=0.05, abs=3 * row.noise_floor)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_optimizers_step_is_torchs_with_amsgrad_too(amsgrad: bool) -> None:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    optimizer = support.trained_optimizer(model, amsgrad=amsgrad, steps=4)
    if amsgrad:  # a maximum that is not v itself
        for state in optimizer.state.values():
            state["max_exp_avg_sq"].mul_(3.0)
    state = state_of_optimizer(optimizer, model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ascent = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    deltas = optimizer_step(dict(model.named_parameters()), state, ascent)
    for n, p in model.named_parameters():
        p.grad = -ascent[n]
    optimizer.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(before[n] + deltas[n], p.detach(), rtol=0, atol=1e-15)


def test_small_steps_keep_the_effective_sample_above_the_guides_threshold() -> None:
    model, adam, batch = setting()
    for row in probe(model, adam, batch, Settings(learning_rate=1e-5)).report.realized:
        assert row.ess_fraction > 0.3


def test_low_ess_is_said_with_its_figures() -> None:
    model, adam, _ = setting()
    batch = support.random_batch(8, 8)
    report = probe(model, adam, batch, Settings(learning_rate=0.2)).report
    assert report.realized[0].ess_fraction < 0.3
    (seen,) = [w.seen for w in report.warnings if w.code == "low_ess" and "preconditioned" in w.seen]
    assert f"{report.realized[0].ess:.1f} of 64" in seen


def test_a_learning_rate_of_zero_moves_nothing_and_says_so() -> None:
    model, adam, _ = setting()
    report = probe(model, adam, support.random_batch(8, 8), Settings(learning_rate=0.0)).report
    row = report.realized[0]
    assert report.first_order.delta_h1 == 0.0
    assert row.delta_h == pytest.approx(0.0, abs=1e-12)
    assert row.predicted == 0.0
    assert "below_noise_floor" not in {w.code for w in report.warnings}
    assert row.ess_fraction == pytest.approx(1.0)
    assert row.pareto_k is None
    assert "equal" in row.null_reasons["pareto_k"]
    assert report.first_order.u_cross != 0
    assert "learning_rate_zero" in {w.code for w in report.warnings}


def test_scores_of_the_policy_under_the_step_are_those_of_a_moved_clone() -> None:
    model, _, batch = setting()
    deltas = {n: 1e-3 * torch.randn_like(p) for n, p in model.named_parameters()}
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for n, p in clone.named_parameters():
            p += deltas[n]
    with virtual_step(model, deltas):
        under = Policy(model).scores(batch.responses)
    torch.testing.assert_close(under, Policy(clone).scores(batch.responses), rtol=0, atol=1e-12)


def test_a_forward_bound_to_the_live_model_does_not_hide_the_optimizers_step() -> None:
    """Trainers patch ``model.forward``; a deep copy would then compute with the original's weights and show no change."""
    model, adam, batch = setting(learning_rate=1e-3)
    plain = probe(model, adam, batch).report.realized[1]
    original = model.forward
    model.forward = lambda **inputs: original(**inputs)  # bound to this very object, as a trainer's patch is
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert torch.equal(Policy(copied).scores(batch.responses), Policy(model).scores(batch.responses))  # the trap
    patched = probe(model, adam, batch).report.realized[1]
    assert patched.delta_h == plain.delta_h != 0
