"""Where the guide contradicts its own derivation: its literal text fails, what we do passes (docs/method.md, section 9)."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

import enumerable
import oracle
import support
from entropy_probe import Settings, probe, state_of_optimizer
from entropy_probe.data.groups import leave_one_out_mean
from entropy_probe.losses.surrogate import probe_loss
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.adam import Adam
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.statistics.u_statistics import cross_statistics
from entropy_probe.statistics.unit_dots import UnitDots
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.score import score_coefficients
from enumerable import EnumerablePolicy
from oracle import optimizer_step

SIZES = [3, 3]


def scores_with_graph() -> tuple[torch.Tensor, list[torch.nn.Parameter]]:
    policy = EnumerablePolicy(contexts=2, tokens=3, seed=1)
    chosen = [enumerable.response_scores(policy, n, 3)[[0, 4, 9]] for n in range(2)]
    return torch.cat(chosen), list(policy.parameters())


def flat(value: torch.Tensor, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)])


def test_row_1_an_undetached_coefficient_doubles_x_and_ours_does_not() -> None:
    scores, parameters = scores_with_graph()
    each = [flat(score, parameters) for score in scores]
    by_hand = sum(c * g for c, g in zip(score_coefficients(scores, SIZES), each, strict=True))
    literal = flat(((scores - leave_one_out_mean(scores, SIZES)) * scores / 3).sum(), parameters)
    ours = flat(probe_loss(scores, score_coefficients(scores, SIZES)), parameters)
    torch.testing.assert_close(literal, 2 * by_hand, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours, by_hand, rtol=1e-12, atol=1e-13)


def test_row_1_s_itself_is_not_detached() -> None:
    scores, parameters = scores_with_graph()
    assert flat(probe_loss(scores, score_coefficients(scores, SIZES)), parameters).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="does not require grad"):
        flat(probe_loss(scores.detach(), score_coefficients(scores, SIZES)), parameters)


def test_row_2_p_half_on_both_sides_is_the_step_that_adam_takes() -> None:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    optimizer = support.trained_optimizer(model)
    batch = support.random_batch(4, 3)
    result = probe(model, state_of_optimizer(optimizer, model), batch, Settings(estimator=Estimator.SCORE))
    xs, ys = oracle.prompt_vectors(oracle.one_at_a_time(model, batch), batch)
    p = oracle.flat_preconditioner(model, optimizer)
    # What the update of prompts m ≠ n does to n: X_n · (P Y_m), with P applied once, as the optimizer does.
    one_side = np.mean([x @ (p * y) for n, x in enumerate(xs) for m, y in enumerate(ys) if n != m])
    both_sides = np.mean([(p * x) @ (p * y) for n, x in enumerate(xs) for m, y in enumerate(ys) if n != m])
    assert result.report.first_order.u_cross == pytest.approx(one_side, rel=1e-9)
    assert abs(both_sides / one_side - 1) > 1.0  # the literal text: P on both sides, X P² Y


def test_row_2_the_diagonal_lives_in_the_same_geometry_as_the_bars() -> None:
    rng = np.random.default_rng(0)
    xs, ys, p = rng.normal(size=(6, 9)), rng.normal(size=(6, 9)), rng.uniform(0.5, 30, size=9)
    bars = (p * xs.mean(0)) @ (p * ys.mean(0))
    literal = 6 / 5 * bars - sum(x @ (p * y) for x, y in zip(xs, ys, strict=True)) / 30
    truth, _, _ = oracle.double_loop(xs * np.sqrt(p), ys * np.sqrt(p))
    kernel = (xs * np.sqrt(p)) @ (ys * np.sqrt(p)).T
    assert cross_statistics(UnitDots.from_kernel(kernel, [1] * 6)).u_cross == pytest.approx(truth)
    assert abs(literal - truth) > abs(truth)


def test_row_3_the_guides_standard_error_is_the_spread_of_r() -> None:
    rng = np.random.default_rng(1)
    units, draws, dim = 128, 400, 5
    mean = np.ones(dim)
    found = []
    for _ in range(draws):
        xs, ys = mean + rng.normal(size=(units, dim)), mean + rng.normal(size=(units, dim))
        found.append(cross_statistics(UnitDots.from_kernel(xs @ ys.T, [1] * units)))
    spread = np.std([f.u_cross for f in found])
    assert np.mean([f.se_plugin for f in found]) == pytest.approx(spread, rel=0.1)
    assert np.mean([f.se_jackknife for f in found]) == pytest.approx(spread, rel=0.1)
    assert np.mean([f.se_plugin_guide for f in found]) > 4 * spread
    four = cross_statistics(UnitDots.from_kernel(xs[:4] @ ys[:4].T, [1] * 4))
    assert four.se_plugin == pytest.approx(four.se_plugin_guide)  # equal only at U = 4


def test_row_4_scalars_a_rank_do_not_hold_the_product_of_sums() -> None:
    rng = np.random.default_rng(2)
    ranks = [(rng.normal(size=(4, 3)), rng.normal(size=(4, 3))) for _ in range(2)]
    of_sums = sum(x.sum(0) for x, _ in ranks) @ sum(y.sum(0) for _, y in ranks)
    sums_of_scalars = sum(x.sum(0) @ y.sum(0) for x, y in ranks)
    kernel = np.concatenate([x for x, _ in ranks]) @ np.concatenate([y for _, y in ranks]).T
    dots = UnitDots.from_kernel(kernel, [1] * 8)
    assert dots.sum_dot == pytest.approx(of_sums)
    assert abs(sums_of_scalars - of_sums) > 1e-3


def test_row_5_the_adamw_step_is_not_the_preconditioned_one_and_each_has_its_own_prediction() -> None:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    optimizer = support.trained_optimizer(model, steps=5, learning_rate=1e-5)
    report = probe(model, state_of_optimizer(optimizer, model), support.random_batch(6, 4)).report
    preconditioned, adamw, *by_score = report.realized
    assert abs(preconditioned.predicted - adamw.predicted) > 0.2 * abs(preconditioned.predicted)
    for row in (preconditioned, adamw, *by_score):
        assert row.delta_h == pytest.approx(row.predicted, rel=0.02)


@pytest.mark.parametrize("steps", [1, 5, 37])
def test_row_5_with_beta1_zero_no_decay_and_the_renewed_state_the_two_steps_are_one(steps: int) -> None:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    optimizer = support.trained_optimizer(model, steps=steps, betas=(0.0, 0.95), eps=1e-6)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    state = state_of_optimizer(optimizer, model)
    batch = support.random_batch(4, 3)
    scores = Policy(model).scores(batch.responses)
    loss = probe_loss(Policy(model).forward_scores(batch.responses), score_coefficients(scores, batch.group_sizes))
    parameters = {n: q for n, q in model.named_parameters() if q.requires_grad}
    ascent = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    moved = optimizer_step(parameters, state, ascent)

    # P from the state after the step: torch's own update of v with the fresh gradient.
    for name, parameter in parameters.items():
        parameter.grad = -ascent[name]
    reference = copy.deepcopy(optimizer.state_dict())
    before = {n: q.detach().clone() for n, q in parameters.items()}
    optimizer.step()
    renewed = state_of_optimizer(optimizer, model)
    ours = Geometry.of(Adam(renewed)).step(ascent)
    for name in parameters:
        torch.testing.assert_close(ours[name], moved[name], rtol=1e-10, atol=1e-15)
        torch.testing.assert_close(parameters[name].detach() - before[name], moved[name], rtol=1e-12, atol=1e-15)

    # Planted bug: no bias correction.
    optimizer.load_state_dict(reference)
    name = next(iter(parameters))
    v = renewed.moments[name].exp_avg_sq
    wrong = 1e-3 / (v.sqrt() + 1e-6) * ascent[name]
    assert (wrong - moved[name]).abs().max() > 1e-2 * moved[name].abs().max()


def test_row_6_elements_without_v_make_the_literal_delta_h1_noise_and_ours_leaves_them_out() -> None:
    """Untied embeddings of which training met a few tokens; two halves of the prompts are two answers to one question."""
    model = support.tiny_model("llama-untied", dtype=torch.float64)
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-5, vocabulary=10), model)
    batch = support.random_batch(12, 4)
    seen = batch.of_prompts(range(12))
    literal, ours = (probe(model, adam, seen, Settings(zero_v=zero_v)).report for zero_v in ("guide", "leave-out"))
    # The literal text: all but a thousandth of δH₁ is of elements that no step has touched, and no step of Adam's is like it.
    assert literal.first_order.zero_v.delta_h1_added == pytest.approx(literal.first_order.delta_h1, rel=1e-3)
    gradient = literal.adamw.parts["gradient"].value
    assert abs(literal.first_order.delta_h1) > 1e3 * abs(gradient)
    assert abs(ours.first_order.delta_h1) < 1e2 * abs(gradient)
    assert ours.first_order.zero_v.elements == literal.first_order.zero_v.elements > 0
    # The realised step too: the literal one throws the policy away.
    assert literal.realized[0].ess_fraction < 0.5
    assert ours.realized[0].ess_fraction > 0.99


def test_row_7_blocks_follow_prompts_and_not_microbatches() -> None:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    batch = support.random_batch(7, 3)
    from entropy_probe import Settings

    reports = [probe(model, adam, batch, Settings(blocks=3, microbatch_size=m)).report for m in (1, 4, 50)]
    assert reports[0].units.sizes == [3, 2, 2]
    assert reports[0].first_order.unit_ids == [["p0", "p1", "p2"], ["p3", "p4"], ["p5", "p6"]]
    for other in reports[1:]:
        assert other.first_order.u_cross == pytest.approx(reports[0].first_order.u_cross, rel=1e-10)


def test_row_8_dropout_is_inactive_and_the_training_flag_comes_back() -> None:
    model = support.tiny_model("gpt2")
    model.train()
    batch = support.random_batch(3, 2)
    policy = Policy(model)
    first, second = policy.scores(batch.responses), policy.scores(batch.responses)
    assert torch.equal(first, second)
    assert all(module.training for module in model.modules())
    # The guide's literal text: forwards under model.train().
    with torch.no_grad():
        noisy = [policy.forward_scores(batch.responses) for _ in range(2)]
    assert (noisy[0] - noisy[1]).abs().max() > 1e-3
    assert math.isfinite(float(first.sum()))
