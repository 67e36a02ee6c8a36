"""What the rows say of the trainer is the default of a probe and of a replay; settings override it; no guess is silent."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import support
from entropy_probe import (
    InputError,
    ReplaySettings,
    RolloutBatch,
    Settings,
    group_rollouts,
    probe,
    probe_checkpoint,
    replay,
    state_of_optimizer,
    write_rollouts,
)
from entropy_probe.common.source import Source
from entropy_probe.data.bundled_run import demo_folder
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.losses.named import NAMED
from entropy_probe.optimizers.state import AdamGroup, AdamState
from entropy_probe.pipeline.recorded import trainers_step
from entropy_probe.report import Report
from support import run_command


def rows(loss_type: str | None = None, **extra: Any) -> list[Any]:
    return [
        dataclasses.replace(row, loss_type=loss_type, max_completion_length=9, extra=extra)
        for row in support.random_rollouts(5, 3)
    ]


def batch(loss_type: str | None = None, **extra: Any) -> RolloutBatch:
    return group_rollouts(rows(loss_type, **extra))


def resolved(found: RolloutBatch, **settings: Any) -> Any:
    """By the settings of a probe, and by those of a replay, which must agree wherever a loss is named."""
    probed = trainers_step(found, Settings(**settings), assumed=LengthWeight.GUIDE)
    if found.responses[0].loss_type is not None or "length_weight" in settings:
        assert probed == trainers_step(found, ReplaySettings(**settings), assumed=None)
    return probed


@pytest.mark.parametrize("loss", NAMED)
def test_the_rows_loss_type_is_the_length_weight(loss: str) -> None:
    found = resolved(batch(loss))
    assert (found.length_weight, found.loss.source) == (NAMED[loss].average, Source.RECORDED)
    told = resolved(batch(loss), length_weight=LengthWeight.GUIDE)
    assert (told.length_weight, told.loss.source) == (LengthWeight.GUIDE, Source.GIVEN)


def test_an_unknown_loss_is_refused_by_name_unless_a_length_weight_is_set() -> None:
    for settings in (Settings(), ReplaySettings()):
        with pytest.raises(InputError) as refused:
            trainers_step(batch("nash"), settings, assumed=LengthWeight.GUIDE)
        assert "loss_type is 'nash'; known are bnpo, cispo, dapo, dppo, dr_grpo, gmpo, grpo" in str(refused.value)
    assert resolved(batch("nash"), length_weight="grpo").length_weight is LengthWeight.GRPO


def live(found: RolloutBatch, **settings: Any) -> Report:
    model = support.tiny_model()
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-4), model)
    return probe(model, adam, found, Settings(noise=False, **settings)).report


def codes(report: Report) -> set[str]:
    return {warning.code for warning in report.warnings}


def test_without_a_loss_a_probe_assumes_the_guides_weight_and_says_so_and_a_replay_refuses() -> None:
    assumed, told, dapo = live(batch()), live(batch(), length_weight="guide"), live(batch("dapo"))
    assert assumed.config.length_weight == "guide"
    assert assumed.first_order.u_cross == told.first_order.u_cross != dapo.first_order.u_cross
    (warning,) = (w for w in assumed.warnings if w.code == "length_weight_assumed")
    assert "guide is taken" in warning.seen
    assert "dapo" in warning.advice
    assert not {"length_weight_assumed", "other_loss"} & (codes(told) | codes(dapo))
    assert "other_loss" in codes(live(batch("dapo"), length_weight="guide"))
    with pytest.raises(InputError, match="name no loss_type; set the length weight"):
        trainers_step(batch(), ReplaySettings(), assumed=None)


def test_drgrpos_constant_beside_a_recorded_loss_without_one_is_refused() -> None:
    with pytest.raises(InputError, match="length weight dapo does not use it"):
        live(batch("dapo"), max_completion_length=12)
    longer = live(batch("dr_grpo"), max_completion_length=18).first_order.u_cross
    assert live(batch("dr_grpo")).first_order.u_cross == pytest.approx(2 * longer, rel=1e-5)


@pytest.mark.parametrize(
    ("recorded", "given", "dtype", "expected"),
    [
        ("bf16", None, "float32", torch.bfloat16),
        ("fp16", None, "float32", torch.float16),
        ("no", None, "float32", None),
        (None, None, "float32", None),
        ("bf16", None, "float64", None),
        ("bf16", None, "bfloat16", None),
        ("bf16", "off", "float32", None),
        ("bf16", "float16", "float32", torch.float16),
        ("no", "bfloat16", "float32", torch.bfloat16),
        ("fp8", "off", "float32", None),
        ("fp8", None, "float64", None),
    ],
)
def test_mixed_precision_is_as_recorded_over_float32_weights_alone(
    recorded: str | None, given: str | None, dtype: str, expected: torch.dtype | None
) -> None:
    found = trainers_step(
        batch("dapo", mixed_precision=recorded),
        Settings(autocast=given, dtype=dtype),
        assumed=None,  # type: ignore[arg-type]
    )
    assert found.autocast is expected
    assert found.mixed is (recorded not in (None, "no"))


@pytest.mark.parametrize("unknown", ["fp8", "bfloat16", 16, True, ["bf16"]])
def test_an_unknown_mixed_precision_is_refused_by_name(unknown: object) -> None:
    with pytest.raises(InputError, match=r"mixed_precision is .*; known are no, bf16, fp16; set autocast"):
        resolved(batch("dapo", mixed_precision=unknown))


def test_recorded_mixed_precision_is_that_of_the_gradients_and_can_be_switched_off() -> None:
    plain, mixed = live(batch("dapo")), live(batch("dapo", mixed_precision="bf16"))
    off = live(batch("dapo", mixed_precision="bf16"), autocast="off")
    asked = live(batch("dapo"), autocast="bfloat16")
    assert mixed.first_order.u_cross == asked.first_order.u_cross != plain.first_order.u_cross
    assert off.first_order.u_cross == plain.first_order.u_cross
    assert [r.config.autocast for r in (plain, mixed, off, asked)] == [None, "bfloat16", "off", "bfloat16"]


def group(rate: float, *names: str) -> AdamGroup:
    return AdamGroup(names, rate, 0.9, 0.999, 1e-8, 0.0, False, False, True)


def rates(stored: list[tuple[float, str]], recorded: object = None, **settings: Any) -> list[float]:
    state = AdamState(tuple(group(rate, *names) for rate, names in stored), {})
    extra = {} if recorded is None else {"learning_rate": recorded}
    return [g.learning_rate for g in resolved(batch("dapo", **extra), **settings).of(state).groups]


ALIKE, APART = [(1e-3, "a"), (1e-3, "b")], [(1e-3, "a"), (4e-3, "b"), (5.0, "")]


def test_the_recorded_learning_rate_is_the_first_groups_and_scales_all() -> None:
    assert rates(ALIKE) == [1e-3, 1e-3]
    assert rates(ALIKE, 2e-4) == [2e-4, 2e-4]
    assert rates([(0.0, "a"), (0.0, "b")], 2e-4) == [2e-4, 2e-4]
    assert rates(APART, 1e-3 * (1 + 1e-12)) == [1e-3, 4e-3, 5.0]
    assert rates(APART, 5e-4) == pytest.approx([5e-4, 2e-3, 2.5])
    assert rates(APART, 0.0) == [0.0, 0.0, 0.0]
    assert rates([(5.0, ""), *ALIKE], 1e-3) == [5.0, 1e-3, 1e-3]
    assert rates([(5.0, ""), *ALIKE], 2e-3)[1:] == [2e-3, 2e-3]
    assert rates(APART, [2e-3, 3e-3]) == [2e-3, 3e-3, 5.0]
    assert rates(APART, 5e-4, learning_rate=7e-3) == [7e-3, 7e-3, 7e-3]
    assert rates(APART, "nonsense", learning_rate=0.0) == [0.0, 0.0, 0.0]
    with pytest.raises(InputError, match=r"the optimizer holds 0 there and 0\.004 in another.* set the learning rate"):
        rates([(0.0, "a"), (4e-3, "b")], 5e-4)
    with pytest.raises(InputError, match="3 learning rates, the optimizer has 2 parameter groups"):
        rates(APART, [1e-3, 2e-3, 3e-3])


@pytest.mark.parametrize("name", ["max_grad_norm", "learning_rate"])
def test_a_recorded_number_that_cannot_be_meant_is_refused_by_name(name: str) -> None:
    for value in (-1.0, float("nan"), float("inf"), 10**400, 10**5000, "1", True, {"a": 1}, []):
        with pytest.raises(
            InputError, match=f"^prompt_id 'p0': the rows say {name} is .*; expected a finite number, 0 or above$"
        ):
            resolved(batch("dapo", **{name: value}))
        given = resolved(batch("dapo", **{name: value}), **{name: 0.5})
        assert (given.max_grad_norm, given.learning_rates) in ((0.5, ()), (None, (0.5,)))


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [("max_grad_norm", 1.0, 0.5), ("learning_rate", 1e-3, [1e-3, 2e-3]), ("mixed_precision", "no", "bf16")],
)
def test_rows_that_disagree_are_refused_by_name_and_equal_numbers_of_other_types_do_not(
    name: str, one: object, other: object
) -> None:
    for last in (other, None):
        mixed = rows("dapo", **{name: one})
        mixed[-1] = dataclasses.replace(mixed[-1], extra={} if last is None else {name: last})
        with pytest.raises(InputError, match=f"the rows disagree about {name} \\("):
            resolved(group_rollouts(mixed))
    alike = rows("dapo", max_grad_norm=1, learning_rate=[0.5, 1])
    alike[-1] = dataclasses.replace(alike[-1], extra={"max_grad_norm": np.float32(1.0), "learning_rate": (0.5, 1.0)})
    assert resolved(group_rollouts(alike)).learning_rates == (0.5, 1.0)


def test_a_live_optimizers_own_rate_is_kept_and_the_rest_is_as_recorded() -> None:
    report = live(batch("dapo", learning_rate=3e-3, max_grad_norm=1e-3))
    assert report.first_order.learning_rate == 1e-4
    assert report.checkpoint.stored_learning_rates == [1e-4]
    assert (report.adamw.max_grad_norm, report.adamw.max_grad_norm_source) == (1e-3, "recorded")
    told = live(batch("dapo", learning_rate=3e-3), learning_rate=2e-3)
    assert (told.first_order.learning_rate, told.checkpoint.stored_learning_rates) == (2e-3, [1e-4])
    assert not {"learning_rate_recorded"} & (codes(report) | codes(told))


def test_a_checkpoint_is_probed_at_the_recorded_rate_and_its_config_gives_the_same_numbers(tmp_path: Path) -> None:
    checkpoint = support.make_checkpoint(tmp_path / "checkpoint", learning_rate=1e-4)
    recorded, bare = tmp_path / "recorded.jsonl", tmp_path / "bare.jsonl"
    write_rollouts(rows("dapo", learning_rate=2e-4, max_grad_norm=1e-2, mixed_precision="bf16"), recorded)
    write_rollouts(rows(), bare)
    found = probe_checkpoint(checkpoint, recorded, Settings(noise=False)).report
    (warning,) = (w for w in found.warnings if w.code == "learning_rate_recorded")
    assert "0.0002 for this step, the optimizer's state holds 0.0001" in warning.seen
    assert (found.first_order.learning_rate, found.checkpoint.stored_learning_rates) == (2e-4, [1e-4])
    config = found.config
    again = Settings(
        noise=False,
        length_weight=config.length_weight,  # type: ignore[arg-type]
        max_grad_norm=config.max_grad_norm,
        autocast=config.autocast,  # type: ignore[arg-type]
        learning_rate=2e-4,
    )
    told = probe_checkpoint(checkpoint, bare, again).report
    assert told.first_order == found.first_order
    assert told.adamw == dataclasses.replace(found.adamw, max_grad_norm_source="given")
    plain = probe_checkpoint(checkpoint, bare, Settings(noise=False)).report
    assert plain.first_order.learning_rate == 1e-4
    assert plain.config.max_grad_norm is None
    assert "learning_rate_recorded" not in codes(plain) | codes(told)


def test_the_command_reads_the_trainer_from_the_rows_and_its_options_override_them(tmp_path: Path) -> None:
    folder = demo_folder() / "full"
    checkpoint, recorded = folder / "checkpoint-20", folder / "rollouts" / "step-00021.jsonl"
    (tmp_path / "rows.jsonl").write_text("".join(recorded.read_text().splitlines(keepends=True)[:64]))
    command = ["run", checkpoint, "--rollouts", tmp_path / "rows.jsonl", "--no-noise", "--device", "cpu"]
    taken = run_command(*command)
    assert taken.code == 0, taken.err
    assert "length weight dr_grpo" in taken.out
    assert "clipped at 1" in taken.out
    told = run_command(*command, "--length-weight", "dapo", "--max-grad-norm", "0", "--autocast", "off")
    assert told.code == 0, told.err
    assert "length weight dapo" in told.out
    assert "the rollouts come from loss_type dr_grpo" in told.out
    assert "not clipped" in told.out
    refused = run_command(*command, "--autocast", "bf16")
    assert refused.code == 2


def test_a_replay_takes_the_recorded_rate_and_says_where_the_stored_one_differs(tmp_path: Path) -> None:
    folder = demo_folder() / "full"
    recorded = folder / "rollouts" / "step-00021.jsonl"
    path = tmp_path / "rows.jsonl"
    stored = replay(folder / "checkpoint-20", folder / "checkpoint-21", recorded)
    assert isinstance(stored.logged.learning_rate, float)
    other = 2 * stored.logged.learning_rate
    lines = [line.replace('{"prompt_id"', f'{{"learning_rate": {other!r}, "prompt_id"', 1) for line in recorded.open()]
    path.write_text("".join(lines))
    found = replay(folder / "checkpoint-20", folder / "checkpoint-21", path)
    assert found.logged.learning_rate == other
    assert stored.matched
    assert not found.matched
    assert "learning_rate_recorded" in {w.code for w in found.warnings}
    assert found.suspicions[0].code == "learning_rate"
