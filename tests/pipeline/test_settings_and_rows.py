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
from entropy_probe import (
    AdamState,
    InputError,
    RolloutBatch,
    Settings,
    group_rollouts,
    probe,
    probe_checkpoint,
    replay,
    state_of_optimizer,
    write_rollouts,
)
from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.common.files import replacing
from entropy_probe.data.units import Mode
from entropy_probe.losses.advantages import AdvantageRule
from entropy_probe.losses.length_weights import LengthWeight, length_weights
from entropy_probe.model.policy import Policy
from entropy_probe.pipeline.inputs import resolve_advantages, resolve_length_weights
from entropy_probe.targets.choices import Estimator
from spoiled import Place
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
    module, seen = importlib.import_module("entropy_probe.realized.rows"), []
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


def test_paths_of_a_probe_and_of_a_replay_may_be_text(place: Place) -> None:
    checkpoint, rollouts = str(place.checkpoint), str(place.rollouts)
    assert load_checkpoint(checkpoint).folder.kind == "full"
    found = probe_checkpoint(checkpoint, rollouts, None, evaluation_rollouts=rollouts_of_others(place))
    expected = probe_checkpoint(place.checkpoint, place.rollouts, evaluation_rollouts=Path(rollouts_of_others(place)))
    assert found.report.first_order == expected.report.first_order
    assert found.report.config == expected.report.config
    with pytest.raises(InputError, match="was given twice"):
        replay(checkpoint, checkpoint, rollouts)


def rollouts_of_others(place: Place) -> str:
    write_rollouts(random_rollouts(4, 1, seed=9), place.root / "others.jsonl")
    return str(place.root / "others.jsonl")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"checkpoint": None}, "checkpoint is None; expected a path"),
        ({"rollouts": 3}, "rollouts is 3; expected a path"),
        ({"evaluation_rollouts": 3}, "evaluation_rollouts is 3; expected a path"),
        ({"base": 3}, "base is 3; expected a path"),
        ({"settings": {"seed": 1}}, r"settings is .*expected Settings\("),
        ({"device": None}, "device None: .* expected auto, cpu or cuda"),
    ],
)
def test_a_probe_of_a_checkpoint_refuses_arguments_of_another_type(
    given: dict[str, Any], message: str, place: Place
) -> None:
    taken: dict[str, Any] = {"checkpoint": place.checkpoint, "rollouts": place.rollouts}
    with pytest.raises(InputError, match=message):
        probe_checkpoint(**(taken | given))


@pytest.mark.parametrize("name", ["before", "after", "rollouts", "base", "settings", "device"])
def test_a_replay_refuses_arguments_of_another_type(name: str, place: Place) -> None:
    taken: dict[str, Any] = {"before": place.checkpoint, "after": place.checkpoint, "rollouts": place.rollouts}
    with pytest.raises(InputError, match=f"^{name}.* 1.5[;:].* expected "):
        replay(**(taken | {name: 1.5}))


def test_a_live_probe_groups_rows_and_takes_none_for_the_default_settings() -> None:
    model = support.tiny_model(dtype=torch.float64)
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    rows, others = random_rollouts(4, 2), random_rollouts(3, 1, seed=9)
    found = probe(model, adam, rows, None, evaluation=others).report
    expected = probe(model, adam, group_rollouts(rows), evaluation=group_rollouts(others, least_responses=1)).report
    assert found.first_order == expected.first_order
    assert found.two_batches == expected.two_batches is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": 3}, "the rollouts are a int"),
        ({"evaluation": [{}]}, "the evaluation rollouts: row 0 has no prompt_id"),
        ({"settings": {"seed": 1}}, r"settings is .*expected Settings\("),
    ],
)
def test_a_live_probe_refuses_arguments_of_another_type(given: dict[str, Any], message: str) -> None:
    model = support.tiny_model()
    optimizer = support.trained_optimizer(model)
    taken: dict[str, Any] = {
        "model": model,
        "adam": state_of_optimizer(optimizer, model),
        "batch": random_rollouts(2, 2),
    }
    with pytest.raises(InputError, match=message):
        probe(**(taken | given))
    with pytest.raises(InputError, match=r"give state_of_optimizer\(optimizer, model\)"):
        probe(**(taken | {"adam": optimizer}))
