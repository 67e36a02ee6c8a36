"""What must not change the numbers: padding, order of prompts and responses, interleaving, microbatches, kernels, wrappers."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch

import oracle
import support
from entropy_probe import Settings, probe, state_of_optimizer
from entropy_probe.data.rollouts import Rollout, group_rollouts
from entropy_probe.data.units import Mode, block_units, exact_units
from entropy_probe.gradients import Storage, Wanted, unit_gradients
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.model.padding import pad_right
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.adam import Adam
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.statistics.u_statistics import cross_statistics
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.score import score_coefficients


@pytest.fixture(scope="module")
def setting() -> tuple[Any, Any]:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    return model, state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-4), model)


def numbers(setting: tuple[Any, Any], rows: list[Rollout], **settings: Any) -> list[float]:
    """Everything that must stay, in an order of its own."""
    model, adam = setting
    report = probe(model, adam, group_rollouts(rows), Settings(**settings)).report
    first = report.first_order
    by_prompt = sorted(zip(map(str, first.unit_ids), first.row_means, first.row_x, first.row_y, strict=True))
    return [
        first.u_cross, first.delta_h1, first.bars_dot, first.diag_sum, first.se_plugin, first.se_jackknife,
        first.se_this_step, *first.delta_h1_ci95, report.entropy.per_response, report.entropy.se,
        *itertools.chain(*(values for _, *values in by_prompt)),
        *itertools.chain(*((r.delta_h, r.se, r.predicted, r.ess) for r in report.realized)),
    ]  # fmt: skip


def close(a: list[float], b: list[float]) -> None:
    assert a == pytest.approx(b, rel=1e-9, abs=1e-12)


def test_permuted_prompts_and_responses_and_interleaved_rows_change_nothing(setting: tuple[Any, Any]) -> None:
    rows = support.random_rollouts(5, 3)
    base = numbers(setting, rows)
    shuffled = rows.copy()
    random.Random(0).shuffle(shuffled)
    assert [r.prompt_id for r in shuffled] != [r.prompt_id for r in rows]
    close(numbers(setting, shuffled), base)
    close(numbers(setting, rows[::-1]), base)


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_the_microbatch_size_changes_nothing(setting: tuple[Any, Any], size: int) -> None:
    rows = support.random_rollouts(5, 3)
    close(numbers(setting, rows, microbatch_size=size), numbers(setting, rows, microbatch_size=3))


def test_padding_changes_nothing(setting: tuple[Any, Any]) -> None:
    model, _ = setting
    rows = support.random_rollouts(4, 3)
    together = Policy(model, microbatch_size=12).scores(rows)
    alone = torch.cat([Policy(model).scores([row]) for row in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    batch = pad_right(rows, torch.device("cpu"))
    assert bool((batch.attention_mask.diff(dim=1) <= 0).all())  # ones, then zeros


def test_left_padding_would_not_be_the_same_for_learned_positions() -> None:
    """Planted: the same row shifted right behind masked pads has other scores in a model of absolute positions."""
    model = support.tiny_model("gpt2", dtype=torch.float64)
    row = support.random_rollouts(2, 2)[0]
    truth = float(Policy(model).scores([row])[0])
    ids = torch.tensor([[0, 0, *row.prompt_ids, *row.response_ids]])
    mask = torch.tensor([[0, 0] + [1] * (ids.shape[1] - 2)])
    model.eval()
    with torch.no_grad():
        log_probs = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits[0], dim=-1)
    start = 2 + len(row.prompt_ids)
    shifted = sum(float(log_probs[start + t - 1, token]) for t, token in enumerate(row.response_ids))
    assert abs(shifted - truth) > 1e-3


def test_unequal_group_sizes_equal_the_slow_truth(setting: tuple[Any, Any]) -> None:
    model, adam = setting
    sizes = [2, 5, 3, 4]
    batch = support.random_batch(4, sizes)
    report = probe(model, adam, batch, Settings(estimator=Estimator.SCORE)).report
    alone = oracle.one_at_a_time(model, batch)
    xs, ys = oracle.prompt_vectors(alone, batch)
    p = (
        torch.cat([oracle_p.flatten() for oracle_p in (adam_p for adam_p in _preconditioners(model, adam))]).numpy()
        ** 0.5
    )
    u_cross, r, _ = oracle.double_loop(xs * p, ys * p)
    assert report.first_order.u_cross == pytest.approx(u_cross, rel=1e-9)
    assert report.first_order.row_means == pytest.approx(r, rel=1e-8)
    means = [part.mean() for part in torch.tensor(alone.scores).split(sizes)]
    assert report.entropy.per_response == pytest.approx(-float(sum(means)) / 4, rel=1e-12)
    delta = 1e-4 * p**2 * ys.mean(axis=0)
    change, ess = oracle.snis_change(alone.scores, oracle.scores_alone(oracle.moved(model, delta), batch), sizes)
    assert report.realized[0].delta_h == pytest.approx(change, abs=1e-9)
    assert report.realized[0].ess == pytest.approx(ess, rel=1e-9)


def _preconditioners(model: Any, adam: Any) -> list[torch.Tensor]:
    from entropy_probe.optimizers.preconditioner import Preconditioners

    p = Preconditioners(adam)
    return [p[name] for name, _ in model.named_parameters()]


def test_block_units_equal_the_double_loop_over_blocks(setting: tuple[Any, Any]) -> None:
    model, adam = setting
    batch = support.random_batch(7, 3)
    first = probe(model, adam, batch, Settings(mode=Mode.BLOCK, blocks=3, estimator=Estimator.SCORE)).report.first_order
    xs, ys = oracle.prompt_vectors(oracle.one_at_a_time(model, batch), batch)
    p = torch.cat([q.flatten() for q in _preconditioners(model, adam)]).numpy() ** 0.5
    u_cross, r, _ = oracle.double_loop(xs * p, ys * p, [3, 2, 2])
    assert first.u_cross == pytest.approx(u_cross, rel=1e-9)
    assert first.row_means == pytest.approx(r, rel=1e-8)


@pytest.mark.parametrize("units", [exact_units(6), block_units(6, 4)], ids=["exact", "block"])
def test_streamed_and_stored_agree(setting: tuple[Any, Any], units: Any) -> None:
    model, adam = setting
    batch = support.random_batch(6, 3)
    policy = Policy(model, microbatch_size=4)
    c = score_coefficients(policy.scores(batch.responses), batch.group_sizes)
    a = torch.tensor([r.reward for r in batch.responses], dtype=torch.float64)
    geometry = Geometry.of(Adam(adam))
    stored, streamed = (
        unit_gradients(policy, batch, units, Sides(c, a), geometry, wanted=Wanted(storage)) for storage in Storage
    )
    one, two = cross_statistics(stored.total), cross_statistics(streamed.total)
    assert streamed.total.kernel is None
    for name in ("u_cross", "bars_dot", "diag_sum", "se_plugin", "se_jackknife"):
        assert getattr(two, name) == pytest.approx(getattr(one, name), rel=1e-10), name
    assert two.row_x == pytest.approx(one.row_x, rel=1e-9)
    assert two.row_y == pytest.approx(one.row_y, rel=1e-9)
    assert max(one.self_test_residual, two.self_test_residual) < 1e-12
    for name, value in stored.ascent.items():
        torch.testing.assert_close(streamed.ascent[name], value)


def test_gradients_reach_parameters_on_both_sides(setting: tuple[Any, Any]) -> None:
    model, adam = setting
    batch = support.random_batch(4, 3)
    policy = Policy(model)
    c = score_coefficients(policy.scores(batch.responses), batch.group_sizes)
    a = torch.tensor([r.reward for r in batch.responses], dtype=torch.float64)
    geometry = Geometry.of(Adam(adam))
    found = unit_gradients(policy, batch, exact_units(4), Sides(c, a), geometry)
    assert found.untouched == ()
    assert set(found.ascent) == set(policy.trainable())
    kernel = found.total.kernel
    assert kernel is not None
    assert abs(kernel).min() > 0
    # Coefficients of zero on one side give a kernel of zeros: each side is really used.
    for x, y in ((c * 0, a), (c, a * 0)):
        empty = unit_gradients(policy, batch, exact_units(4), Sides(x, y), geometry).total.kernel
        assert empty is not None
        assert not empty.any()


def test_a_zero_advantage_group_gives_exactly_zero(setting: tuple[Any, Any]) -> None:
    rows = [dataclasses.replace(r, reward=1.0) if r.prompt_id == "p2" else r for r in support.random_rollouts(5, 3)]
    model, adam = setting
    result = probe(model, adam, group_rollouts(rows))
    assert result.kernel is not None
    assert not result.kernel[:, 2].any()
    assert result.report.first_order.row_y[2] == 0.0
    assert result.report.first_order.row_x[2] != 0.0


def test_two_prompts_give_a_number_without_error_bars(setting: tuple[Any, Any]) -> None:
    model, adam = setting
    report = probe(model, adam, support.random_batch(2, 2)).report
    assert report.first_order.u_cross != 0
    assert report.first_order.se_plugin is None
    assert report.first_order.delta_h1_ci95 is None
    assert {"se_plugin", "se_jackknife", "delta_h1_ci95", "delta_h1_se"} <= set(report.first_order.null_reasons)
    assert report.realized[0].se > 0
    assert "few_units" in {w.code for w in report.warnings}


def test_a_ddp_wrapped_model_is_probed_as_the_model_inside(setting: tuple[Any, Any], tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model, adam = setting
    batch = support.random_batch(3, 2)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapper = DistributedDataParallel(model)
        wrapped = probe(wrapper, adam, batch).report
        names = {id(p): n for n, p in model.named_parameters()}
        live = state_of_optimizer(torch.optim.AdamW(wrapper.parameters()), wrapper)
        assert set(live.groups[0].names) == set(names.values())
    finally:
        dist.destroy_process_group()
    assert wrapped.first_order.u_cross == pytest.approx(probe(model, adam, batch).report.first_order.u_cross, rel=1e-12)


def test_an_unused_parameter_is_named_and_counts_as_zero(setting: tuple[Any, Any]) -> None:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    batch = support.random_batch(4, 3)
    plain = probe(model, adam, batch).report
    model.register_parameter("spare", torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))
    group = dataclasses.replace(adam.groups[0], names=(*adam.groups[0].names, "spare"))
    moments = {**adam.moments, "spare": dataclasses.replace(next(iter(adam.moments.values())))}
    moments["spare"] = dataclasses.replace(
        moments["spare"], exp_avg=torch.zeros(3), exp_avg_sq=torch.zeros(3), max_exp_avg_sq=None
    )
    found = probe(model, dataclasses.replace(adam, groups=(group, *adam.groups[1:]), moments=moments), batch).report
    assert found.first_order.u_cross == pytest.approx(plain.first_order.u_cross, rel=1e-12)
    evidence = {w.code: w.seen for w in found.warnings}
    assert "spare" in evidence["untouched_parameters"]


def test_auto_is_exact_while_it_fits_then_blocks_then_streamed() -> None:
    per_unit = 2 * 1000 * 4
    everything = support.plan()
    assert (everything.units.mode, everything.storage, len(everything.units.ranges)) == (Mode.EXACT, Storage.STORED, 40)
    some = support.plan(memory_bytes=2 * 20.5 * per_unit)
    assert (some.units.mode, some.storage, len(some.units.ranges)) == (Mode.BLOCK, Storage.STORED, 20)
    few = support.plan(memory_bytes=2 * 15.5 * per_unit)
    assert (few.units.mode, few.storage, len(few.units.ranges)) == (Mode.EXACT, Storage.STREAMED, 40)
    assert all(p.reason for p in (everything, some, few))


def test_block_sizes_differ_by_at_most_one_and_larger_come_first() -> None:
    for prompts, blocks in itertools.product(range(2, 30), range(2, 30)):
        if blocks <= prompts:
            units = block_units(prompts, blocks)
            assert [n for r in units.ranges for n in r] == list(range(prompts))
            assert list(units.sizes) == sorted(units.sizes, reverse=True)
            assert max(units.sizes) - min(units.sizes) <= 1


def test_memory_that_forces_streaming_gives_the_same_estimate(setting: tuple[Any, Any]) -> None:
    model, adam = setting
    batch = support.random_batch(5, 3)
    free, tight = (probe(model, adam, batch, Settings(memory_bytes=m)) for m in (1e9, 1e3))
    assert tight.report.units.storage == "streamed"
    assert tight.kernel is None
    assert tight.report.first_order.u_cross == pytest.approx(free.report.first_order.u_cross, rel=1e-10)
    assert tight.report.first_order.se_this_step is None
    assert "streaming" in tight.report.first_order.null_reasons["se_this_step"]


def test_a_wholly_frozen_model_is_refused() -> None:
    model = support.tiny_model("llama-tied")
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        probe(model, adam, support.random_batch(3, 2))


def test_a_model_whose_only_trainable_parameter_is_out_of_reach_is_refused() -> None:
    model = support.tiny_model("llama-tied")
    model.requires_grad_(False)
    model.register_parameter("spare", torch.nn.Parameter(torch.ones(3)))
    optimizer = torch.optim.AdamW([model.spare])
    model.spare.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(ValueError, match="no trainable parameter receives a gradient"):
        probe(model, state_of_optimizer(optimizer, model), support.random_batch(3, 2))


def test_a_parameter_frozen_since_its_state_was_taken_stays() -> None:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    model.model.norm.weight.requires_grad_(False)
    report = probe(model, adam, support.random_batch(4, 3)).report
    assert report.realized[1].delta_h != 0
    assert report.checkpoint.frozen_parameters == model.model.norm.weight.numel()
