"""What a probe takes from the rows, what from the settings, and what its report says of them."""

from __future__ import annotations

import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import support
from entropy_probe import AdamState, InputError, RolloutBatch, Settings, group_rollouts, probe, state_of_optimizer
from entropy_probe.files import replacing
from entropy_probe.inputs import resolve_advantages, resolve_length_weights
from entropy_probe.policy import Policy
from entropy_probe.scores import AdvantageRule, Estimator, LengthWeight, length_weights
from entropy_probe.units import Mode
from support import random_rollouts


def window(**columns: Any) -> RolloutBatch:
    rows = random_rollouts(3, 2, **columns)
    return group_rollouts(dataclasses.replace(r, micro_batch=i % 2) for i, r in enumerate(rows))


def test_length_weights_take_the_settings_constant_first_and_the_windows_from_the_rows() -> None:
    batch = window(max_completion_length=50, window_tokens=99.0)
    lengths = [len(r.response_ids) for r in batch.responses]

    def found(rule: LengthWeight, constant: int | None = None, of: RolloutBatch = batch) -> list[float]:
        return resolve_length_weights(of, rule, constant).tolist()

    assert found(LengthWeight.DR_GRPO) == pytest.approx([1 / (2 * 50)] * 6)
    assert found(LengthWeight.DR_GRPO, 80) == pytest.approx([1 / (2 * 80)] * 6)
    assert found(LengthWeight.DAPO) == pytest.approx([3 / 99] * 6)
    assert found(LengthWeight.DAPO, of=window()) == pytest.approx([3 / sum(lengths)] * 6)
    sums = [sum(lengths[0::2]), sum(lengths[1::2])]
    assert sums[0] != sums[1]
    assert found(LengthWeight.BNPO) == pytest.approx([3 / (2 * sums[i % 2]) for i in range(6)])
    guide = length_weights(lengths, [2, 2, 2], LengthWeight.GUIDE).tolist()
    assert found(LengthWeight.GUIDE) == pytest.approx(guide)


def test_advantages_are_the_rows_own_unless_a_rule_is_asked_for() -> None:
    rows = [dataclasses.replace(r, reward=float(i * i)) for i, r in enumerate(random_rollouts(2, 2))]
    given = [dataclasses.replace(r, advantage=10.0 + i) for i, r in enumerate(rows)]

    def found(batch: list[Any], rule: AdvantageRule | None) -> tuple[list[float], AdvantageRule]:
        advantages, used = resolve_advantages(group_rollouts(batch), rule)
        assert advantages.dtype == torch.float64
        return advantages.tolist(), used

    assert found(rows, None) == ([-0.5, 0.5, -2.5, 2.5], AdvantageRule.DR_GRPO)
    assert found(given, None) == ([10.0, 11.0, 12.0, 13.0], AdvantageRule.GIVEN)
    assert found(given, AdvantageRule.GIVEN) == ([10.0, 11.0, 12.0, 13.0], AdvantageRule.GIVEN)
    assert found(given, AdvantageRule.RLOO) == ([-1.0, 1.0, -5.0, 5.0], AdvantageRule.RLOO)
    with pytest.raises(InputError, match="no advantage column"):
        found(rows, AdvantageRule.GIVEN)


def test_the_umask_is_put_back_after_a_write(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("x")
        assert os.umask(0o027) == 0o027
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def live(**settings: Any) -> Any:
    model = support.tiny_model(dtype=settings.pop("dtype", torch.float64))
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-4), model)
    return probe(model, adam, support.random_batch(5, 3), Settings(**settings)).report


def test_mode_and_length_weight_of_the_settings_are_those_of_the_probe() -> None:
    assert live(mode=Mode.BLOCK, memory_bytes=1e9).units.mode == "block"
    assert live(mode=Mode.EXACT, memory_bytes=1e9).units.mode == "exact"
    one, two = (live(length_weight=LengthWeight.DR_GRPO, max_completion_length=n).first_order for n in (20, 40))
    assert one.u_cross == pytest.approx(2 * two.u_cross, rel=1e-10)
    assert one.row_x == pytest.approx([2 * x for x in two.row_x], rel=1e-10)


def test_the_linear_term_is_taken_in_the_arithmetic_of_the_realised_change(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = importlib.import_module("entropy_probe.realized_rows"), []
    original = module.response_dots

    def spy(policy: Any, *arguments: Any, **named: Any) -> Any:
        seen.append(policy.autocast)
        return original(policy, *arguments, **named)

    monkeypatch.setattr(module, "response_dots", spy)
    live(dtype=torch.float32, autocast=torch.bfloat16)
    assert seen == [None]


def test_small_print_of_the_report() -> None:
    model = support.tiny_model(dtype=torch.float64)
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-4), model)
    name = next(iter(adam.moments))
    mixed = AdamState(adam.groups, {**adam.moments, name: dataclasses.replace(adam.moments[name], step=9)})
    batch = support.random_batch(5, 3)
    report = probe(model, mixed, batch).report
    assert report.checkpoint.adam_step == [3, 9]
    assert (
        f"{100 * abs(report.first_order.delta_h1) / report.entropy.per_response:.2g} %" in report.first_order.sentence
    )
    assert 0 < report.first_order.self_test_residual < 1e-9
    still = probe(model, adam, batch, Settings(learning_rate=0.0)).report.first_order
    assert str(still.delta_h1) == "0.0"
    assert "-0.0" not in str(still.delta_h1_ci95)


def test_no_forward_holds_more_responses_than_the_microbatch_size() -> None:
    model = support.tiny_model()
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True)
    probe(model, adam, support.random_batch(3, 5), Settings(microbatch_size=2))
    assert max(rows) == 2


def test_the_temperature_of_the_rows_is_the_policys() -> None:
    model = support.tiny_model(dtype=torch.float64)
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-4), model)
    batch = support.random_batch(4, 3, temperature=0.6)
    scores = Policy(model, 0.6).scores(batch.responses)
    report = probe(model, adam, batch, Settings(estimator=Estimator.SCORE)).report
    assert report.entropy.per_response == pytest.approx(-float(scores.mean()), rel=1e-9)
    assert report.realized[1].entropy_before == pytest.approx(-float(scores.mean()), rel=1e-9)
    assert abs(float(Policy(model).scores(batch.responses).mean()) - float(scores.mean())) > 0.1
