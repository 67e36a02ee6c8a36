"""Replay of real TRL steps of other losses than a weight a response: each is the trainer's, and a planted fault is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")

from entropy_probe import ReplaySettings
from entropy_probe import replay as replay_step
from entropy_probe.data.rollouts import Rollout, read_rollouts, write_rollouts
from entropy_probe.errors import InputError
from entropy_probe.report.replay_schema import ReplayReport
from support import run_command
from trl_training import checkpointed_run
from trl_vllm import AsVLLM

TWO_ITERATIONS = {"num_iterations": 2, "learning_rate": 3e-2, "max_steps": 4}
"""The second step of each pair takes its ratios to the policy before the first."""
OFF_POLICY, ON_POLICY = 4, 3
"""Steps of such a run; the others have three."""


def as_vllm(trainer: Any) -> list[Any]:
    settings = {"mode": "token_truncate", "clip_min": None, "clip_max": 1.2, "correction": True}
    return [AsVLLM(trainer, **{f"vllm_importance_sampling_{name}": value for name, value in settings.items()})]


RUNS: dict[str, dict[str, Any]] = {
    "kl": {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
    "kl-corrected": {"loss_type": "dapo", "beta": 0.3, "lora": True},
    "bonus": {"loss_type": "bnpo", "entropy_coef": 0.05},
    "quantile": {"loss_type": "dapo", "top_entropy_quantile": 0.4},
    "dapo": {"loss_type": "dapo", "per_device_train_batch_size": 6, "gradient_accumulation_steps": 4},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1, **TWO_ITERATIONS},
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-3,
        "epsilon_high": 4e-3,
        **TWO_ITERATIONS,
    },
    "two-iterations": {"loss_type": "dapo", "epsilon": 0.05, "epsilon_high": 0.08, **TWO_ITERATIONS},
    "truncated": {"loss_type": "dapo", "mask_truncated_completions": True, "max_completion_length": 20},
    "truncated-grpo": {"loss_type": "grpo", "mask_truncated_completions": True, "max_completion_length": 20},
    "vllm": {"loss_type": "grpo", "further": as_vllm},
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 2.0, **TWO_ITERATIONS},
    "two-steps": {"loss_type": "dapo", "steps_per_generation": 4, "per_device_train_batch_size": 6, "max_steps": 4},
}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run by its name, made when it is first asked for."""
    made: dict[str, Path] = {}

    def made_once(name: str) -> Path:
        if name not in made:
            made[name] = checkpointed_run(tmp_path_factory.mktemp(name), **RUNS[name])
        return made[name]

    return made_once


def run(folder: Path, step: int, settings: ReplaySettings | None = None, rollouts: Path | None = None) -> ReplayReport:
    report = replay_step(
        folder / "run" / f"checkpoint-{step - 1}",
        folder / "run" / f"checkpoint-{step}",
        rollouts or recorded(folder, step),
        settings,
        base=folder / "base" if (folder / "base").is_dir() else None,
    )
    report.to_dict()  # every number finite, every null with its reason
    return report


def recorded(folder: Path, step: int) -> Path:
    return folder / "rollouts" / f"step-{step:05d}.jsonl"


def planted(folder: Path, step: int, tmp_path: Path, change: Callable[[Rollout], Rollout]) -> ReplayReport:
    """A replay of rows that say something else than the trainer did."""
    write_rollouts([change(row) for row in read_rollouts(recorded(folder, step))], tmp_path / "rollouts.jsonl")
    return run(folder, step, rollouts=tmp_path / "rollouts.jsonl")


@pytest.mark.parametrize("name", RUNS)
def test_the_replayed_update_is_the_trainers(run_of: Callable[[str], Path], name: str) -> None:
    steps = (ON_POLICY, OFF_POLICY) if RUNS[name].get("max_steps") else (2, 3)
    for step in steps:
        report = run(run_of(name), step)
        logged = report.logged
        assert report.matched
        assert report.update.error_net < 2e-5
        assert report.gradient.relative_error is not None
        assert report.gradient.relative_error < 2e-5
        assert logged.entropy_logged is not None
        assert logged.entropy == pytest.approx(logged.entropy_logged, rel=1e-5)
        assert logged.grad_norm == pytest.approx(logged.grad_norm_logged, rel=1e-5)
        assert report.suspicions == []
        # The second step on a generation is no sign of a wrong file, nor is a part of one.
        assert report.warnings == []


def column(**changed: Any) -> Callable[[Rollout], Rollout]:
    """A change of the columns of the loss; None drops one."""

    def change(row: Rollout) -> Rollout:
        extra = {**row.extra, **changed}
        return replace(row, extra={name: value for name, value in extra.items() if changed.get(name, 0) is not None})

    return change


def of_row(**changed: Any) -> Callable[[Rollout], Rollout]:
    return lambda row: replace(row, **changed)


def shifted(row: Rollout) -> Rollout:
    assert row.old_logprobs is not None
    return replace(row, old_logprobs=tuple(value - 0.3 for value in row.old_logprobs), logprobs=None)


def without_last(row: Rollout) -> Rollout:
    return replace(row, loss_mask=(1,) * (len(row.response_ids) - 1) + (0,))


def half(row: Rollout) -> Rollout:
    return replace(row, token_weight=(0.5,) + (1.0,) * (len(row.response_ids) - 1))


def first_mini_batch(row: Rollout) -> Rollout:
    return replace(row, mini_batch=row.micro_batch)


PLANTED: dict[str, tuple[str, Callable[[Rollout], Rollout], str, str]] = {
    "beta": ("kl", column(beta=0.2), "beta", "of beta 0.3; here it is 0.2"),
    "beta-dropped": ("kl", column(beta=None), "beta", "of beta 0.3, by k3, not times"),
    "beta-dropped-lora": ("kl-corrected", column(beta=None), "beta", "of beta 0.3, by k3, times"),
    "beta-added": ("truncated", lambda row: with_reference(row), "beta", "had no KL term; here beta is 0.3"),
    "kl-k1": ("kl", column(kl_estimator="k1"), "kl_estimator", "by k3; here it is by k1"),
    "kl-k2": ("kl", column(kl_estimator="k2"), "kl_estimator", "by k3; here it is by k2"),
    "kl-bias": ("kl", column(use_bias_correction_kl=True), "use_bias_correction_kl", "not multiplied"),
    "bonus": ("bonus", column(entropy_coef=0.02), "entropy_coef", "of entropy_coef 0.05; here it is 0.02"),
    "bonus-dropped": ("bonus", column(entropy_coef=None), "entropy_coef", "of entropy_coef 0.05, averaged over micro"),
    "bonus-added": ("dapo", column(entropy_coef=0.05), "entropy_coef", "had no entropy bonus"),
    "quantile": ("quantile", column(top_entropy_quantile=0.7), "top_entropy_quantile", "about 0.4"),
    "quantile-dropped": ("quantile", column(top_entropy_quantile=None), "top_entropy_quantile", "about 0.4"),
    "quantile-added": ("dapo", column(top_entropy_quantile=0.5), "top_entropy_quantile", "of every entropy"),
    "mask-dropped": ("truncated", of_row(loss_mask=None), "truncated", "leaves truncated responses out"),
    "mask-dropped-grpo": ("truncated-grpo", of_row(loss_mask=None), "truncated", "leaves truncated responses out"),
    "mask-added": ("dapo", without_last, "loss_mask", "of every response token"),
    "token-weight": ("dapo", half, "token_weight", "no weights of tokens"),
    "mini-batch": ("dapo", first_mini_batch, "mini_batch", "consumed all rows"),
    "loss-type": ("kl", of_row(loss_type="dapo"), "length_weight", "as grpo; here it is dapo"),
    "cispo-cap": ("cispo", column(epsilon_high=3.0), "epsilon_high", "about 1.1, as near as these rows tell; here it is 3"),
    "cispo-as-dapo": ("cispo", of_row(loss_type="dapo"), "loss_type", "was cispo; here it is dapo"),
    "dapo-as-cispo": ("two-iterations", of_row(loss_type="cispo"), "loss_type", "the clip of PPO, as grpo; here it is cispo"),
    "gspo-as-token": ("gspo", column(importance_sampling_level=None), "importance_sampling_level", "of whole responses"),
    "token-as-gspo": (
        "two-iterations", column(importance_sampling_level="sequence"), "importance_sampling_level", "of each token",
    ),
    "epsilon": ("two-iterations", column(epsilon_low=0.2, epsilon_high=0.2), "epsilon_low", "here it is 0.2, and epsilon_high"),
    "epsilon-high": ("two-iterations", column(epsilon_high=0.2), "epsilon_high", "here it is 0.2"),
    "delta": ("two-iterations", column(delta=1.01), "delta", "had no bound delta; here it is 1.01"),
    "old-dropped": ("two-iterations", of_row(old_logprobs=None, on_policy=None), "old_logprobs", "here they are all 1"),
    "old-shifted": ("two-iterations", shifted, "old_logprobs", "not of the policy that drew these rows"),
    "mode": ("vllm", column(importance_sampling_mode="token_mask"), "importance_sampling_mode", "by token_truncate up to 1.2"),
    "mode-dropped": (
        "vllm",
        column(importance_sampling_mode=None, importance_sampling_clip_max=None, importance_sampling_clip_min=None),
        "importance_sampling_clip_max", "about 1.2, by importance_sampling_mode token_truncate",
    ),
    "bound": ("vllm", column(importance_sampling_clip_max=3.0), "importance_sampling_clip_max", "about 1.2"),
    "temperature": ("sapo", column(sapo_temperature_pos=1.0), "sapo_temperature_pos", "about 2"),
}  # fmt: skip


def with_reference(row: Rollout) -> Rollout:
    """A KL term to a reference that finds every token half as likely."""
    reference = tuple(-2.0 - 0.1 * (token % 7) for token in row.response_ids)
    return replace(row, ref_logprobs=reference, extra={**row.extra, "beta": 0.3})


SEARCHED = ("epsilon", "epsilon-high", "bound", "old-shifted", "cispo-cap", "temperature", "mode-dropped", "quantile")
"""By tens of passes."""


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=pytest.mark.long if name in SEARCHED else ()) for name in PLANTED]
)
def test_a_planted_fault_is_named(run_of: Callable[[str], Path], tmp_path: Path, fault: str) -> None:
    name, change, code, words = PLANTED[fault]
    step = OFF_POLICY if RUNS[name].get("max_steps") else 3
    report = planted(run_of(name), step, tmp_path, change)
    assert not report.matched
    assert report.update.error_net > 1e-3
    assert report.suspicions, report.headline
    first = report.suspicions[0]
    assert first.code == code, report.suspicions
    assert words in first.seen, first.seen
    assert first.error_net is None or first.error_net < 1e-4
    assert first.seen in report.headline
    assert first.advice


def test_old_log_probs_that_the_trainer_did_not_take_are_named(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    """In the first step on a generation every ratio is 1, whatever the rows say."""
    report = planted(run_of("two-iterations"), ON_POLICY, tmp_path, shifted)
    assert report.suspicions[0].code == "ratio"
    assert "0.3 nats a token" in report.suspicions[0].seen


def test_a_row_that_says_off_policy_without_old_log_probs_is_refused(
    run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="on_policy false"):
        planted(run_of("two-iterations"), OFF_POLICY, tmp_path, of_row(old_logprobs=None))


@pytest.mark.parametrize(("name", "step"), [("kl", 3), ("two-iterations", OFF_POLICY)])
def test_one_rows_advantage_is_found_in_a_loss_of_tokens(
    run_of: Callable[[str], Path], tmp_path: Path, name: str, step: int
) -> None:
    rows = read_rollouts(recorded(run_of(name), step))
    place = next(i for i, row in enumerate(rows) if row.advantage)
    true = rows[place].advantage
    assert isinstance(true, float)
    rows[place] = replace(rows[place], advantage=1.7 * true, reward=None)
    write_rollouts(rows, tmp_path / "rollouts.jsonl")
    report = run(run_of(name), step, rollouts=tmp_path / "rollouts.jsonl")
    assert report.suspicions[0].code == "advantage_of_a_row", report.suspicions
    assert f"response {place + 1} " in report.suspicions[0].seen
    assert f"was {true:.4g}; here it is {1.7 * true:.4g}" in report.suspicions[0].seen


def test_losses_that_are_one_over_these_rows_take_one_pass(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    """At ratio 1 no clip, level or formula is another loss, and without a sampler's log-probs no correction is one."""
    report = planted(run_of("dapo"), 3, tmp_path, of_row(advantage=0.5, reward=None))
    assert not report.matched
    assert report.tried < 25


def test_the_report_says_the_loss(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = run_of("two-iterations")
    config = run(folder, OFF_POLICY).config
    assert (config.loss, config.epsilon_low, config.epsilon_high) == ("dapo", 0.05, 0.08)
    assert (config.importance_ratios, config.importance_sampling_level, config.mini_batch) == (True, "token", None)
    assert (config.beta, config.entropy_coef, config.top_entropy_quantile, config.update_responses) == (
        0.0,
        0.0,
        1.0,
        24,
    )
    checkpoints = [run_of("kl") / "run" / f"checkpoint-{step}" for step in (2, 3)]
    outcome = run_command("replay", *checkpoints, "--rollouts", recorded(run_of("kl"), 3))
    assert outcome.code == 0, outcome.err
    assert "KL 0.3 (k3)" in outcome.out
