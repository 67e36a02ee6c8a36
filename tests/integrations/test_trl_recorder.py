"""The recorder's file is the batch: from it alone, the trainer's own gradient is rebuilt."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("datasets")

import trl
from accelerate.state import AcceleratorState

from entropy_probe.compat.trl import WRAPPED
from entropy_probe.data.rollouts import Rollout, group_rollouts, read_rollouts
from entropy_probe.errors import InputError
from entropy_probe.integrations.trl import RolloutRecorder
from trl_objective import gradient_of_the_objective, mask_of
from trl_training import (
    EOS,
    GROUP,
    MAX_LENGTH,
    NEUTRAL_COLUMNS,
    PROMPTS,
    TEMPERATURE,
    KeepGradients,
    length,
    log_probs,
    make_trainer,
    model_at,
    rebuilt_gradient,
    relative_error,
    tiny_tokenizer,
    train,
    vowels,
)

RUNS_OF_TWO_PROCESSES: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo"},
    "bnpo": {"loss_type": "bnpo"},
    "masked": {
        "loss_type": "dapo",
        "mask_truncated_completions": True,
        "max_completion_length": 12,
        "num_iterations": 2,
        "beta": 0.3,
        "entropy_coef": 0.05,
    },
}


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dr_grpo"},
        {"loss_type": "dr_grpo", "lora": True},
        {"loss_type": "dapo", "scale_rewards": "group"},
        {"loss_type": "dapo", "lora": True, "scale_rewards": "batch"},
        {"loss_type": "bnpo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "sapo"},
        # Two generations in one optimizer step: the buffer that TRL keeps holds only the last of them.
        {"loss_type": "dr_grpo", "steps_per_generation": 1},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_the_gradient_of_every_step_is_rebuilt_from_its_file(tmp_path: Path, options: dict[str, Any]) -> None:
    _, seen, steps = train(tmp_path, **options)
    assert len(steps) == 3
    for weights, gradients, rows in zip(seen.weights, seen.gradients, steps, strict=True):
        rebuilt = rebuilt_gradient(weights, rows, options["loss_type"])
        # Float32 on two paddings: the sums run in another order.
        assert relative_error(rebuilt, gradients) < 1e-5
        # The comparison can fail: the next response's advantage on each row is another gradient.
        shifted = [Rollout(**(vars(row) | {"advantage": rows[i - 1].advantage})) for i, row in enumerate(rows)]
        assert relative_error(rebuilt_gradient(weights, shifted, options["loss_type"]), gradients) > 0.1


@pytest.mark.parametrize("steps_per_generation", [2, 1])
def test_groups_keep_their_rows_apart_when_prompts_repeat(tmp_path: Path, steps_per_generation: int) -> None:
    _, _, steps = train(tmp_path, steps_per_generation=steps_per_generation, eval_strategy="steps", eval_steps=1)
    for step, rows in enumerate(steps, start=1):
        assert len(rows) == 24
        groups = group_rollouts(rows).groups  # also: one prompt under one id
        assert [group.prompt_id for group in groups] == [f"{step}-{k}" for k in range(len(groups))]
        assert {len(group.responses) for group in groups} == {GROUP}
        assert len({group.prompt_ids for group in groups}) < len(groups)
        for group in groups:
            mean = sum(row.reward for row in group.responses) / GROUP
            for row in group.responses:
                assert row.advantage == pytest.approx(row.reward - mean, abs=1e-5)


def test_rows_say_what_was_sampled_and_how(tmp_path: Path) -> None:
    _, _, steps = train(tmp_path, loss_type="dapo")
    tokenizer = tiny_tokenizer()
    rows = [row for step in steps for row in step]
    for row in rows:
        text = tokenizer.decode(row.response_ids, skip_special_tokens=True)
        assert row.reward == vowels([text])[0] + 0.5 * length([text])[0]  # type: ignore[operator]
        assert row.response == tokenizer.decode(row.response_ids)
        assert row.prompt in PROMPTS
        assert list(row.prompt_ids) == tokenizer.encode(row.prompt)
        assert row.cut == (row.response_ids[-1] != EOS)
        assert EOS not in row.response_ids[:-1]
        assert (row.temperature, row.top_k, row.top_p) == (TEMPERATURE, 0, 1.0)
        assert row.max_completion_length == MAX_LENGTH
        assert row.loss_type == "dapo"
        assert row.on_policy is True
        assert row.extra.items() >= NEUTRAL_COLUMNS.items()
        assert row.extra["trl_version"] == trl.__version__
        assert not row.extra.keys() & {"trainer_class", "trl_is_unknown"}
    assert {row.cut for row in rows} == {True, False}
    assert {row.micro_batch for row in rows} == {0, 1}
    for step, step_rows in enumerate(steps, start=1):
        assert {row.window_tokens for row in step_rows} == {float(sum(len(row.response_ids) for row in step_rows))}
        assert {row.step for row in step_rows} == {step}


def test_the_training_is_the_same_with_and_without_the_recorder(tmp_path: Path) -> None:
    recorded, _, _ = train(tmp_path)
    plain = make_trainer(tmp_path)
    plain.train()
    for with_recorder, without in zip(recorded.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(with_recorder, without)
    assert not set(WRAPPED) & vars(recorded).keys()


def test_off_policy_windows_carry_the_samplers_log_probs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="entropy_probe.integrations.trl"):
        _, seen, steps = train(tmp_path, steps_per_generation=4, max_steps=2, per_device_train_batch_size=6)
    assert "several optimizer steps" in caplog.text
    assert {str(row.prompt_id).split("-")[0] for row in steps[1]} == {"1"}  # sampled for step 1, used in step 2
    with torch.no_grad():
        for row, expected in zip(steps[1], log_probs(model_at(seen.weights[0]), steps[1]), strict=True):
            assert row.on_policy is False
            assert row.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_rows_of_two_processes_together_are_the_batch(tmp_path: Path) -> None:
    """Each rank writes its own rows; the averaged gradient is rebuilt from both files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked: they need not import everything again.
    processes = [get_context("fork").Process(target=train_one_rank, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(100)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    for name in RUNS_OF_TWO_PROCESSES:
        saved = torch.load(tmp_path / name / "seen.pt", weights_only=True)
        for step in (1, 2):
            files = [tmp_path / name / "rollouts" / f"step-{step:05d}-rank{rank}.jsonl" for rank in (0, 1)]
            rows = [row for file in files for row in read_rollouts(file)]
            assert {len(group.responses) for group in group_rollouts(rows).groups} == {GROUP}
            assert {row.window_tokens for row in rows} == {sum(sum(mask_of(row)) for row in rows)}
            assert any(row.loss_mask is not None for row in rows) == (name == "masked")
            weights, gradients = saved["weights"][step - 1], saved["gradients"][step - 1]
            assert relative_error(gradient_of_the_objective(weights, rows), gradients) < 2e-5


def train_one_rank(rank: int, port: int, folder: Path) -> None:
    """With the environment that torchrun would give."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(reset_partial_state=True)  # of the trainers before the fork
    for name, options in RUNS_OF_TWO_PROCESSES.items():
        trainer = make_trainer(folder / name, per_device_train_batch_size=6, max_steps=2, **options)
        seen = KeepGradients()
        trainer.add_callback(RolloutRecorder(trainer, folder / name / "rollouts"))
        trainer.add_callback(seen)
        trainer.train()
        if trainer.accelerator.is_main_process:
            torch.save({"weights": seen.weights, "gradients": seen.gradients}, folder / name / "seen.pt")
    # Together: a rank whose peer's threads have gone may abort at exit.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_every_records_the_steps_after_each_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.add_callback(RolloutRecorder(trainer, tmp_path / "rollouts", every=2))
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == ["step-00001.jsonl", "step-00003.jsonl"]


@pytest.mark.parametrize("every", ["2", 1.5, True, 0])
def test_every_is_a_whole_number_above_0(every: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"every is .*; expected a whole number, 1 or above"):
        RolloutRecorder(make_trainer(tmp_path), tmp_path / "rollouts", every=every)


def test_a_row_without_any_reward_is_recorded_with_the_advantage_that_trl_gave_it(tmp_path: Path) -> None:
    def sometimes(completions: Sequence[str], trainer_state: Any, **_: Any) -> list[float | None]:
        lost = trainer_state.global_step == 1
        return [None if lost and i == 0 else float(len(text)) for i, text in enumerate(completions)]

    _, seen, steps = train(tmp_path, rewards=[sometimes])
    unscored = [row for rows in steps for row in rows if row.reward is None]
    assert [row.step for row in unscored] == [2]
    assert unscored[0].advantage == 0.0
    for weights, gradients, rows in zip(seen.weights, seen.gradients, steps, strict=True):
        assert relative_error(rebuilt_gradient(weights, rows, "dr_grpo"), gradients) < 1e-5


def test_without_trl_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "entropy_probe.integrations.trl")
    with pytest.raises(InputError, match=r"install entropy-probe\[trl\]"):
        importlib.import_module("entropy_probe.integrations.trl")
