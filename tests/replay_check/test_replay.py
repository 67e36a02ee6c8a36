"""Replay of real TRL steps: the computed update is the trainer's, and a planted fault is named."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from entropy_probe import ReplaySettings
from entropy_probe import replay as replay_step
from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.data.bundled_run import demo_folder
from entropy_probe.data.rollouts import Rollout, group_rollouts, read_rollouts, write_rollouts
from entropy_probe.errors import InputError
from entropy_probe.integrations.trl import RolloutRecorder
from entropy_probe.losses.advantages import AdvantageRule
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.optimizers.adamw_step import adamw_step
from entropy_probe.optimizers.state import AdamState
from entropy_probe.replay_check import case, gradient_causes
from entropy_probe.replay_check.sections import forwards
from entropy_probe.replay_check.settings import TOLERANCE
from entropy_probe.replay_check.suspicions import Findings
from entropy_probe.replay_check.update_comparison import recovered_gradient
from entropy_probe.report.replay_schema import ReplayReport
from spoiled import assert_refused
from support import fingerprint, make_checkpoint, run_command
from trl_training import make_trainer, tiny_model

CLIP = 0.5
"""Below every gradient norm of these runs, so that the trainer clips at each step."""


def train(folder: Path, **options: Any) -> Path:
    """Three steps of two micro-batches each, a checkpoint after each, and what each consumed."""
    settings = {
        "save_strategy": "steps", "save_steps": 1, "logging_strategy": "steps", "logging_steps": 1, "max_grad_norm": CLIP,
        "weight_decay": 0.1,
    } | options  # fmt: skip
    trainer = make_trainer(folder, **settings)
    trainer.add_callback(RolloutRecorder(trainer, folder / "rollouts"))
    trainer.train()
    return folder


def run(folder: Path, settings: ReplaySettings | None = None, **more: Any) -> ReplayReport:
    """The step from checkpoint 2 to 3."""
    base = folder / "base" if (folder / "base").is_dir() else None
    arguments = {
        "before": folder / "run" / "checkpoint-2",
        "after": folder / "run" / "checkpoint-3",
        "rollouts": folder / "rollouts" / "step-00003.jsonl",
        "base": base,
    } | more
    report = replay_step(settings=settings or ReplaySettings(), **arguments)
    report.to_dict()  # every number finite, every null with its reason
    return report


def assert_exact(report: ReplayReport) -> None:
    update, logged = report.update, report.logged
    assert report.matched
    assert update.error_net < 2e-5
    # Net of the floor without taking squares apart: the bound of storage is not exceeded by more than the same.
    assert update.relative_error < update.rounding_floor + 2e-5
    assert update.norm_ratio == pytest.approx(1.0, abs=1e-4)
    assert report.gradient.relative_error is not None
    assert report.gradient.relative_error < 2e-5
    assert logged.entropy_logged is not None
    assert logged.entropy == pytest.approx(logged.entropy_logged, rel=1e-5)
    assert logged.grad_norm == pytest.approx(logged.grad_norm_logged, rel=1e-5)
    assert logged.learning_rate == pytest.approx(logged.learning_rate_logged, rel=1e-12)
    assert report.suspicions == []


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("loss_type", "scale"), [("grpo", "group"), ("dr_grpo", "none"), ("dapo", "batch"), ("bnpo", "group")]
)
def test_the_replayed_update_is_the_trainers(tmp_path: Path, loss_type: str, scale: str, lora: bool) -> None:
    if lora:
        tiny_model().save_pretrained(tmp_path / "base")
    train(tmp_path, loss_type=loss_type, scale_rewards=scale, lora=lora)
    report = run(tmp_path)
    assert_exact(report)
    assert report.kind == ("lora" if lora else "full")
    assert report.config.length_weight == loss_type
    assert report.gradient.clip_factor < 1.0
    assert report.update.part_norms["weight_decay"] > 0.0
    assert report.warnings == []


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_bundled_pair_is_replayed(kind: str) -> None:
    folder = demo_folder()
    before, after, recorded = json.loads((folder / "demo.json").read_text())["pair"][kind]
    assert_exact(
        replay_step(folder / kind / f"checkpoint-{before}", folder / kind / f"checkpoint-{after}", folder / recorded)
    )


@pytest.fixture(scope="module")
def dapo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose advantages are divided by each group's standard deviation, on a schedule."""
    folder = tmp_path_factory.mktemp("dapo")
    return train(folder, loss_type="dapo", scale_rewards="group", lr_scheduler_type="linear", max_steps=4)


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose clip is never reached, so that a constant factor in the loss is seen, with answers of every length."""
    folder = tmp_path_factory.mktemp("loose")
    return train(
        folder, loss_type="dapo", scale_rewards="group", max_grad_norm=100.0, learning_rate=2e-3, rewards=[short_vowels]
    )


def short_vowels(completions: Sequence[str], **_: Any) -> list[float | None]:
    return [float(sum(c in "aeiou" for c in text)) - 0.3 * len(text) for text in completions]


def edited(folder: Path, tmp_path: Path, change: Callable[[list[Rollout]], list[Rollout]]) -> Path:
    path = tmp_path / "rollouts.jsonl"
    write_rollouts(change(read_rollouts(folder / "rollouts" / "step-00003.jsonl")), path)
    return path


def assert_suspected(report: ReplayReport, code: str, *words: str, at_least: float = 0.02) -> None:
    assert not report.matched
    assert report.update.relative_error > at_least
    assert report.suspicions, report.headline
    first = report.suspicions[0]
    assert first.code == code, report.suspicions
    for word in words:
        assert word in first.seen, first.seen
    assert first.error_net is None or first.error_net < 0.1 * report.update.error_net
    assert first.seen in report.headline


def test_a_schedules_own_rate_is_taken(dapo: Path) -> None:
    report = run(dapo)
    assert_exact(report)
    assert report.logged.learning_rate == pytest.approx(1e-2 * 2 / 4)
    extra = read_rollouts(dapo / "rollouts" / "step-00003.jsonl")[0].extra
    assert extra["learning_rate"] == report.logged.learning_rate
    assert (extra["num_generations"], extra["mixed_precision"], extra["max_grad_norm"]) == (4, "no", CLIP)


def test_a_step_of_mixed_precision_is_held_to_what_it_can_repeat(tmp_path: Path) -> None:
    train(tmp_path, loss_type="dapo", scale_rewards="group", bf16=True)
    for settings, autocast in ((ReplaySettings(), "bfloat16"), (ReplaySettings(dtype=torch.float64), None)):
        report = run(tmp_path, settings)
        assert report.matched
        assert report.config.autocast == autocast
        assert 1e-3 < report.update.error_net < 0.03
        assert [w.code for w in report.warnings] == ["mixed_precision"]
    assert_suspected(run(tmp_path, ReplaySettings(max_grad_norm=0.0)), "clipping")


def undivided(rows: list[Rollout]) -> list[Rollout]:
    groups: dict[Any, list[float]] = {}
    for row in rows:
        groups.setdefault(row.prompt_id, []).append(row.reward)
    return [replace(r, advantage=r.reward - sum(groups[r.prompt_id]) / len(groups[r.prompt_id])) for r in rows]


@pytest.mark.parametrize("moments_after", [True, False])
def test_advantages_without_their_standard_deviation_are_suspected(
    dapo: Path, tmp_path: Path, moments_after: bool
) -> None:
    more: dict[str, Any] = {"rollouts": edited(dapo, tmp_path, undivided)}
    if not moments_after:
        shutil.copytree(
            dapo / "run" / "checkpoint-3", tmp_path / "after", ignore=shutil.ignore_patterns("optimizer.pt")
        )
        more["after"] = tmp_path / "after"
    report = run(dapo, **more)
    assert_suspected(report, "advantage", "divided by the prompt's standard deviation")
    assert report.suspicions[0].advice.startswith("Set the advantage to grpo")
    assert (report.gradient.relative_error is None) is not moments_after


def test_a_division_by_the_batchs_deviation_is_suspected_before_the_factor_that_it_is(tmp_path: Path) -> None:
    train(tmp_path, loss_type="dapo", scale_rewards="batch", max_grad_norm=100.0)
    report = run(tmp_path, rollouts=edited(tmp_path, tmp_path, undivided))
    assert_suspected(report, "advantage", "standard deviation of the whole batch")
    assert [s.code for s in report.suspicions] == ["advantage", "gradient_scale"]


def test_a_constant_factor_between_two_losses_is_named_by_the_loss_and_by_its_size() -> None:
    """The bundled run: 6 tokens a response in Dr. GRPO's constant, 3.69 on average in dapo's."""
    folder = demo_folder() / "full"
    report = replay_step(
        folder / "checkpoint-20",
        folder / "checkpoint-21",
        folder / "rollouts" / "step-00021.jsonl",
        ReplaySettings(length_weight=LengthWeight.DAPO),
    )
    assert_suspected(report, "length_weight", "dr_grpo")
    assert [s.code for s in report.suspicions] == ["length_weight", "gradient_scale"]
    assert f"{1890 / 512 / 6:.4f}" in report.suspicions[1].seen


def test_a_missing_row_is_suspected(dapo: Path, tmp_path: Path) -> None:
    rows = read_rollouts(dapo / "rollouts" / "step-00003.jsonl")
    lost = max(range(len(rows)), key=lambda i: abs(rows[i].advantage or 0.0))
    report = run(dapo, rollouts=edited(dapo, tmp_path, lambda found: [*found[:lost], *found[lost + 1 :]]))
    assert_suspected(report, "missing_rows", "1 of 6 prompts have fewer than 4 responses", str(rows[lost].prompt_id))
    assert "incomplete_rollouts" in [w.code for w in report.warnings]


def test_missing_prompts_are_suspected_by_the_windows_tokens(dapo: Path, tmp_path: Path) -> None:
    first = read_rollouts(dapo / "rollouts" / "step-00003.jsonl")[0].prompt_id
    path = edited(dapo, tmp_path, lambda rows: [row for row in rows if row.prompt_id != first])
    assert_suspected(run(dapo, rollouts=path), "missing_rows", "the trainer's window had")


@pytest.mark.parametrize("told", [LengthWeight.GRPO, LengthWeight.DR_GRPO, LengthWeight.GUIDE])
def test_another_loss_is_suspected(loose: Path, told: LengthWeight) -> None:
    assert_exact(run(loose))
    report = run(loose, ReplaySettings(length_weight=told))
    assert_suspected(report, "length_weight", "dapo", told.value)


def test_both_at_once_are_suspected(loose: Path) -> None:
    report = run(loose, ReplaySettings(length_weight=LengthWeight.GRPO, advantage=AdvantageRule.RLOO))
    assert_suspected(report, "advantage_and_length_weight", "dapo")


@pytest.mark.parametrize(("told", "says"), [(0.0, "clipped its gradient"), (0.1, "clipped its gradient")])
def test_another_clip_is_suspected(dapo: Path, told: float, says: str) -> None:
    report = run(dapo, ReplaySettings(max_grad_norm=told))
    assert_suspected(report, "clipping", says, f"to {CLIP:.4g}")
    assert f"max_grad_norm to {CLIP:.4g}" in report.suspicions[0].advice


def test_a_clip_that_the_trainer_did_not_make_is_suspected(tmp_path: Path) -> None:
    train(tmp_path, max_grad_norm=0.0)
    assert_exact(run(tmp_path))
    assert_suspected(run(tmp_path, ReplaySettings(max_grad_norm=CLIP)), "clipping", "did not clip")


def test_one_rows_advantage_is_found(loose: Path, tmp_path: Path) -> None:
    """Its reward is another too, so that advantages computed from the rewards are not the trainer's either."""
    true: list[float] = []

    def change(rows: list[Rollout]) -> list[Rollout]:
        true.append(rows[7].advantage or 0.0)
        rows[7] = replace(rows[7], advantage=true[0] + 1.0, reward=rows[7].reward + 1.0)
        return rows

    report = run(loose, rollouts=edited(loose, tmp_path, change))
    assert_suspected(report, "advantage_of_a_row", "response 8 ", f"was {true[0]:.3g}")


def tampered(folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = tmp_path / "checkpoint-2"
    shutil.copytree(folder / "run" / "checkpoint-2", path)
    saved = torch.load(path / "optimizer.pt", weights_only=True)
    change(saved)
    torch.save(saved, path / "optimizer.pt")
    return path


def test_another_learning_rate_is_suspected(dapo: Path) -> None:
    report = run(dapo, ReplaySettings(learning_rate=1e-2))
    assert_suspected(report, "learning_rate", "was 0.005", "here it is 0.01")
    assert [w.code for w in report.warnings] == ["other_learning_rate"]
    assert_suspected(run(dapo, ReplaySettings(learning_rate=0.0)), "learning_rate", "was 0.005", "here it is 0")


def test_another_weight_decay_is_suspected(dapo: Path, tmp_path: Path) -> None:
    def forget(saved: dict[str, Any]) -> None:
        saved["param_groups"][0]["weight_decay"] = 0.0

    before = tampered(dapo, tmp_path, forget)
    report = run(dapo, before=before)
    assert_suspected(report, "weight_decay", "was 0.1 on the first parameter group", at_least=0.01)


def without_moments(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint-3"
    shutil.copytree(folder / "run" / "checkpoint-3", path, ignore=shutil.ignore_patterns("optimizer.pt"))
    return path


def made_after(folder: Path, tmp_path: Path, adam: AdamState, ascent: Mapping[str, torch.Tensor]) -> Path:
    """Checkpoint 3 as a step along ``ascent`` from that state would have left it, without moments."""
    theta = {name: p.detach() for name, p in load_checkpoint(folder / "run" / "checkpoint-2").model.named_parameters()}
    step = adamw_step(theta, adam, ascent, max_grad_norm=CLIP)
    after = without_moments(folder, tmp_path)
    moved = {name: (theta[name].double() + delta).float() for name, delta in step.deltas.items()}
    save_file(moved, after / "model.safetensors", metadata={"format": "pt"})
    return after


def test_an_optimizer_that_was_started_anew_is_suspected(dapo: Path, tmp_path: Path) -> None:
    """As a resumption that lost optimizer.pt leaves it: the step is Adam's first."""
    loaded = load_checkpoint(dapo / "run" / "checkpoint-2")
    theta = {name: p.detach() for name, p in loaded.model.named_parameters()}
    gradient = recovered_gradient(loaded.adam, load_checkpoint(dapo / "run" / "checkpoint-3").adam, theta)
    assert gradient is not None
    ascent = {name: -g for name, g in gradient.items()}
    after = made_after(dapo, tmp_path, AdamState(loaded.adam.groups, {}), ascent)
    assert_suspected(run(dapo, after=after), "adam_reset", "empty moments")


def test_the_first_rows_of_a_file_are_told_by_their_counts(tmp_path: Path) -> None:
    """No stand-in for what is missing: it would have 197 tokens, above Dr. GRPO's constant, and be refused."""
    folder = demo_folder() / "full"
    write_rollouts(read_rollouts(folder / "rollouts" / "step-00021.jsonl")[:300], tmp_path / "rows.jsonl")
    report = replay_step(folder / "checkpoint-20", folder / "checkpoint-21", tmp_path / "rows.jsonl")
    assert_suspected(report, "missing_rows", "1 of 38 prompts have fewer than 8 responses", "the rows hold 1")


@pytest.mark.long
@pytest.mark.parametrize("tolerance", [TOLERANCE, 1e-3])
def test_a_small_fault_that_momentum_hides_in_the_update_shows_in_the_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tolerance: float
) -> None:
    monkeypatch.setattr(case, "TOLERANCE", tolerance)
    folder = demo_folder() / "full"
    rows = read_rollouts(folder / "rollouts" / "step-00021.jsonl")
    rows[8] = replace(rows[8], advantage=(rows[8].advantage or 0.0) + 0.05, reward=rows[8].reward + 0.05)
    write_rollouts(rows, tmp_path / "rows.jsonl")
    report = replay_step(folder / "checkpoint-20", folder / "checkpoint-21", tmp_path / "rows.jsonl")
    assert 1e-4 < report.update.error_net < 1e-3
    assert_suspected(report, "advantage_of_a_row", "response 9 ", at_least=0.0)
    assert ("has a gradient" in report.headline) is (tolerance == 1e-3)


def coarse(folder: Path, tmp_path: Path) -> Path:
    """Checkpoint 3 with its weights rounded to bfloat16."""
    after = tmp_path / "checkpoint-3"
    shutil.copytree(folder / "run" / "checkpoint-3", after)
    weights = load_checkpoint(after).model.named_parameters()
    rounded = {name: p.detach().bfloat16() for name, p in weights}
    save_file(rounded, after / "model.safetensors", metadata={"format": "pt"})
    return after


def test_weights_of_16_bits_claim_nothing_and_the_gradient_speaks(dapo: Path, tmp_path: Path) -> None:
    after = coarse(dapo, tmp_path)
    report = run(dapo, after=after)
    assert report.update.rounding_expected > 0.01
    assert report.matched
    assert "gradient" in report.headline
    assert "too coarsely" in report.headline
    assert "0.0e+00" not in report.headline
    assert [w.code for w in report.warnings] == ["coarse_weights"]
    assert not run(dapo, after=after, rollouts=edited(dapo, tmp_path, undivided)).matched
    (after / "optimizer.pt").unlink()
    report = run(dapo, after=after)
    assert not report.matched
    assert report.suspicions == []
    assert report.headline.startswith("Nothing tells")


def test_a_rate_that_contradicts_the_log_is_not_fitted() -> None:
    folder = demo_folder() / "full"
    told = ReplaySettings(learning_rate=2e-3, length_weight=LengthWeight.GRPO)
    report = replay_step(
        folder / "checkpoint-20", folder / "checkpoint-21", folder / "rollouts" / "step-00021.jsonl", told
    )
    assert not report.matched
    rates = [s.seen for s in report.suspicions if s.code == "learning_rate"]
    assert all(f"was {report.logged.learning_rate_logged:.6g}, as its log says" in seen for seen in rates)
    assert rates
    assert all("explains part of it" in seen for seen in rates)


def test_off_policy_rows_without_the_trainers_log_probs_are_refused_and_surplus_rows_are_the_suspicion(
    dapo: Path, tmp_path: Path
) -> None:
    def stale(rows: list[Rollout]) -> list[Rollout]:
        return [replace(row, on_policy=False) for row in rows]

    def twice(rows: list[Rollout]) -> list[Rollout]:
        return [*rows, *rows[:2]]

    with pytest.raises(InputError, match=r"says on_policy false, .* and no old_logprobs"):
        run(dapo, rollouts=edited(dapo, tmp_path, stale))
    report = run(dapo, rollouts=edited(dapo, tmp_path, twice))
    assert_suspected(report, "surplus_rows", "given twice", "more than 4 responses")
    assert "incomplete_rollouts" not in [w.code for w in report.warnings]


def test_attention_dropout_of_the_config_is_warned_of(dapo: Path, tmp_path: Path) -> None:
    before = tmp_path / "checkpoint-2"
    shutil.copytree(dapo / "run" / "checkpoint-2", before)
    config = json.loads((before / "config.json").read_text())
    (before / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.25}))
    assert "dropout of up to 0.25" in next(w.seen for w in run(dapo, before=before).warnings if w.code == "dropout")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_grad_norm", 10**400),
        ("max_grad_norm", math.nan),
        ("max_grad_norm", -1.0),
        ("learning_rate", -1e-3),
        ("learning_rate", "fast"),
        ("num_processes", 0),
        ("num_processes", 1.5),
        ("num_generations", 10**400),
        ("num_generations", True),
    ],
)
def test_recorded_numbers_are_validated_when_they_are_read(
    dapo: Path, tmp_path: Path, name: str, value: object
) -> None:
    path = edited(dapo, tmp_path, lambda rows: [replace(row, extra={**row.extra, name: "PLACE"}) for row in rows])
    path.write_text(path.read_text().replace('"PLACE"', json.dumps(value)))
    checkpoints = [dapo / "run" / "checkpoint-2", dapo / "run" / "checkpoint-3"]
    assert_refused(run_command("replay", *checkpoints, "--rollouts", path), name)


def test_a_departure_from_the_log_is_warned_of_and_so_is_an_unknown_step(dapo: Path, tmp_path: Path) -> None:
    rows = edited(dapo, tmp_path, lambda found: [replace(row, temperature=1.3) for row in found])
    warned = {w.code: w for w in run(dapo, rollouts=rows).warnings}
    assert "temperature" in warned["other_entropy"].advice
    assert "other_gradient_norm" in warned
    before = tmp_path / "checkpoint-2"
    shutil.copytree(dapo / "run" / "checkpoint-2", before)
    state = json.loads((before / "trainer_state.json").read_text())
    (before / "trainer_state.json").write_text(json.dumps(state | {"global_step": True}))
    assert [w.code for w in run(dapo, before=before).warnings] == ["steps_unknown"]


def test_candidates_are_tried_once_and_the_recorded_loss_first(loose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[list[Any]] = []

    def look(found: Any, _: object) -> Findings:
        tried.append([average for average, _ in gradient_causes.other_averages(found)])
        tried.append([a for _, _, a in gradient_causes.other_advantages(found)])
        return Findings([], 0)

    monkeypatch.setattr(importlib.import_module("entropy_probe.replay_check.run"), "find_suspicions", look)
    run(loose, ReplaySettings(length_weight=LengthWeight.GRPO))
    rules, advantages = tried
    assert rules[0] is LengthWeight.DAPO
    assert LengthWeight.GUIDE not in rules
    assert all(not torch.allclose(a, b, rtol=1e-4) for i, a in enumerate(advantages) for b in advantages[:i])


def test_autocast_alone_says_nothing_of_the_trainer(dapo: Path) -> None:
    report = run(dapo, ReplaySettings(autocast=torch.bfloat16))
    assert not report.matched
    assert report.update.tolerance == TOLERANCE
    assert "mixed_precision" not in [w.code for w in report.warnings]


def test_micro_batches_that_several_processes_ran_together_are_one_forward_of_the_log() -> None:
    rows = [
        Rollout(f"p{i // 2}", (3,), (4,), 0.0, micro_batch=k, extra={"num_processes": 2})
        for i, k in enumerate((0, 0, 1, 1, 2, 2, 3, 3))
    ]
    assert forwards(group_rollouts(rows)) == [0, 0, 1, 1, 0, 0, 1, 1]


def test_another_count_of_adams_is_suspected_where_the_next_one_is_not_there_to_refuse_it(
    dapo: Path, tmp_path: Path
) -> None:
    def count(saved: dict[str, Any]) -> None:
        for entry in saved["state"].values():
            entry["step"] += 3

    before = tampered(dapo, tmp_path, count)
    report = run(dapo, before=before, after=without_moments(dapo, tmp_path))
    assert_suspected(report, "adam_step", "its step 3", "t = 5")
    with pytest.raises(InputError, match="Adam's t goes from 5 to 3"):
        run(dapo, before=before)


def test_rows_of_another_step_that_do_not_say_so_are_told_by_their_cosine(dapo: Path, tmp_path: Path) -> None:
    rows = [replace(row, step=None) for row in read_rollouts(dapo / "rollouts" / "step-00002.jsonl")]
    write_rollouts(rows, tmp_path / "rollouts.jsonl")
    report = run(dapo, rollouts=tmp_path / "rollouts.jsonl")
    assert not report.matched
    assert [s.code for s in report.suspicions] == ["other_rows"], report.suspicions


def test_the_command_writes_its_json_whole(dapo: Path, tmp_path: Path) -> None:
    checkpoints = [dapo / "run" / "checkpoint-2", dapo / "run" / "checkpoint-3"]
    rollouts = dapo / "rollouts" / "step-00003.jsonl"
    outcome = run_command("replay", *checkpoints, "--rollouts", rollouts, "--json", tmp_path / "replay.json")
    assert outcome.code == 0, outcome.err
    content = json.loads((tmp_path / "replay.json").read_text())
    assert content["headline"] in " ".join(outcome.out.split())
    assert content["schema"] == 1
    assert content["matched"] is True
    assert content["update"]["error_net"] < 2e-5
    assert content["update"]["parameters"][0]["name"] in outcome.out
    assert [path.name for path in tmp_path.iterdir()] == ["replay.json"]
    faulty = run_command("replay", *checkpoints, "--rollouts", rollouts, "--length-weight", "grpo")
    assert faulty.code == 0
    assert "suspicion: the trainer's loss weighs lengths as dapo" in " ".join(faulty.out.split())


BAD: dict[str, tuple[str, str, str, list[str], list[str]]] = {
    "twice": ("checkpoint-2", "checkpoint-2", "step-00003.jsonl", [], ["was given twice"]),
    "swapped": ("checkpoint-3", "checkpoint-2", "step-00003.jsonl", [], ["an earlier step", "first"]),
    "two-apart": ("checkpoint-1", "checkpoint-3", "step-00003.jsonl", [], ["2 steps lie between"]),
    "rows-of-another-step": ("checkpoint-2", "checkpoint-3", "step-00002.jsonl", [], ["step 2", "step-00003.jsonl"]),
    "no-folder": ("checkpoint-2", "checkpoint-9", "step-00003.jsonl", [], ["checkpoint-9 is not a folder"]),
    "no-rows": ("checkpoint-2", "checkpoint-3", "step-00009.jsonl", [], ["step-00009.jsonl"]),
    "half-precision": ("checkpoint-2", "checkpoint-3", "step-00003.jsonl", ["--dtype", "bfloat16"], ["bfloat16"]),
    "clip": ("checkpoint-2", "checkpoint-3", "step-00003.jsonl", ["--max-grad-norm", "-1"], ["max_grad_norm is -1"]),
    "clip-nan": ("checkpoint-2", "checkpoint-3", "step-00003.jsonl", ["--max-grad-norm", "nan"], ["max_grad_norm is nan"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_in_one_line(
    dapo: Path, tmp_path: Path, case: tuple[str, str, str, list[str], list[str]]
) -> None:
    before, after, rollouts, options, words = case
    state = fingerprint(dapo)
    outcome = run_command(
        "replay", dapo / "run" / before, dapo / "run" / after, "--rollouts", dapo / "rollouts" / rollouts,
        "--json", tmp_path / "replay.json", *options,
    )  # fmt: skip
    assert_refused(outcome, *words)
    assert fingerprint(dapo) == state
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_of_two_models_are_refused(dapo: Path, tmp_path: Path) -> None:
    rollouts = dapo / "rollouts" / "step-00003.jsonl"
    for change, word in (({"hidden_size": 8}, "trainable parameter"), ({"num_hidden_layers": 1}, "missing")):
        after = tmp_path / word.replace(" ", "-")
        config = tiny_model().config
        for name, value in change.items():
            setattr(config, name, value)
        LlamaForCausalLM(config).save_pretrained(after)
        shutil.copy(dapo / "run" / "checkpoint-3" / "trainer_state.json", after)
        outcome = run_command("replay", dapo / "run" / "checkpoint-2", after, "--rollouts", rollouts)
        assert_refused(outcome, word, "two checkpoints of one run")
    make_checkpoint(tmp_path / "gpt2", "gpt2")
    (tmp_path / "gpt2" / "trainer_state.json").unlink()
    outcome = run_command("replay", dapo / "run" / "checkpoint-2", tmp_path / "gpt2", "--rollouts", rollouts)
    assert_refused(outcome, "llama", "gpt2")


def test_weights_that_did_not_move_and_rows_that_name_no_loss_are_refused(dapo: Path, tmp_path: Path) -> None:
    before, still = dapo / "run" / "checkpoint-2", tmp_path / "checkpoint-3"
    shutil.copytree(before, still)
    (still / "trainer_state.json").unlink()
    (still / "optimizer.pt").unlink()
    with pytest.raises(InputError, match="moved nothing"):
        run(dapo, after=still)
    nameless = edited(dapo, tmp_path, lambda rows: [replace(row, loss_type=None) for row in rows])
    with pytest.raises(InputError, match="set the length weight"):
        run(dapo, rollouts=nameless)


def test_what_is_not_recorded_is_said(dapo: Path, tmp_path: Path) -> None:
    path = edited(dapo, tmp_path, lambda rows: [replace(row, extra={}) for row in rows])
    report = run(dapo, rollouts=path)
    assert report.gradient.max_grad_norm_from == "unknown"
    assert "clipping_unknown" in [w.code for w in report.warnings]
    assert_suspected(report, "clipping", f"to {CLIP:.4g}")
    assert_exact(run(dapo, ReplaySettings(max_grad_norm=CLIP), rollouts=path))


def test_a_log_that_averages_is_not_compared(tmp_path: Path) -> None:
    train(tmp_path, logging_steps=3)
    report = run(tmp_path)
    assert report.matched
    assert report.logged.entropy_logged is None
    assert "mean over steps 1 to 3" in report.logged.null_reasons["entropy_logged"]
    assert report.logged.grad_norm == pytest.approx(report.logged.grad_norm_logged, rel=1e-5)


def test_rows_that_were_padded_afterwards_are_refused(dapo: Path, tmp_path: Path) -> None:
    pad = json.loads((dapo / "run" / "checkpoint-2" / "config.json").read_text())["pad_token_id"]

    def padded(rows: list[Rollout]) -> list[Rollout]:
        longest = max(len(row.response_ids) for row in rows) + 1
        return [replace(r, response_ids=(*r.response_ids, *[pad] * (longest - len(r.response_ids)))) for r in rows]

    with pytest.raises(InputError, match=f"responses that end with padding, pad id {pad}"):
        run(dapo, rollouts=edited(dapo, tmp_path, padded))
