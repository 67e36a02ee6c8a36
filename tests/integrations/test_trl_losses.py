"""Whatever TRL's loss uses is in the rows: from them alone its gradient is rebuilt, with every option that it has."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("datasets")

from transformers import TrainerCallback
from trl import RLOOTrainer

from entropy_probe.data.rollouts import Rollout, read_rollouts
from entropy_probe.data.rollouts.columns import OF_THE_LOSS
from entropy_probe.integrations.trl import RolloutRecorder
from trl_objective import gradient_of_the_objective, gradient_of_the_update, mask_of, measured
from trl_tools import TOOL_SAYS, with_tools
from trl_training import (
    EOS,
    SYMBOLS,
    make_trainer,
    model_at,
    relative_error,
    tiny_model,
    train,
    turns_with_tool_output,
)
from trl_vllm import AsVLLM

TWO_ITERATIONS = {"num_iterations": 2, "learning_rate": 3e-2, "max_steps": 4}
"""The second step of each pair takes its ratios to the policy before the first."""
TRUNCATED = {"mask_truncated_completions": True, "max_completion_length": 20}
"""Long enough that some end by themselves."""
TURNS = {"given": {"rollout_func": turns_with_tool_output}}


def as_vllm(
    mode: str = "sequence_mask", low: float | None = None, high: float | None = 3.0, corrects: bool = True
) -> Any:
    """Callbacks that make a trainer one with vLLM, whose log-probs differ from its own."""
    settings = {
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
        "vllm_importance_sampling_correction": corrects,
    }
    return lambda trainer: [AsVLLM(trainer, **settings)]


CASES: dict[str, dict[str, Any]] = {
    "kl": {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
    "kl-corrected": {"loss_type": "dapo", "beta": 0.3},
    "kl-lora": {"loss_type": "grpo", "beta": 0.3, "lora": True},
    "kl-sequence": {"loss_type": "bnpo", "beta": 0.3, "importance_sampling_level": "sequence", **TWO_ITERATIONS},
    "bonus": {"loss_type": "bnpo", "entropy_coef": 0.05},
    "quantile": {"loss_type": "dapo", "top_entropy_quantile": 0.4, "entropy_coef": 0.05},
    "truncated": {"loss_type": "dr_grpo", **TRUNCATED},
    "truncated-kl": {"loss_type": "dapo", **TRUNCATED, "beta": 0.3, **TWO_ITERATIONS},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1, **TWO_ITERATIONS},
    "cispo-below-1": {"loss_type": "cispo", "epsilon_high": 0.2},
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 2.0, **TWO_ITERATIONS},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon_high": 0.01, **TWO_ITERATIONS},
    "vespo": {"loss_type": "vespo", "vespo_k_pos": 1.5, **TWO_ITERATIONS},
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-3,
        "epsilon_high": 4e-3,
        **TWO_ITERATIONS,
    },
    "two-iterations": {"loss_type": "dapo", "epsilon": 0.05, "epsilon_high": 0.08, "delta": 1.05, **TWO_ITERATIONS},
    "off-policy-mask": {"loss_type": "grpo", "off_policy_mask_threshold": 0.01, **TWO_ITERATIONS},
    "two-steps": {"loss_type": "dapo", "steps_per_generation": 4, "per_device_train_batch_size": 6, "epsilon": 0.05},
    "two-steps-of-rows": {
        "loss_type": "grpo",
        "steps_per_generation": 4,
        "per_device_train_batch_size": 6,
        "epsilon": 0.05,
    },
    "turns": {"loss_type": "dapo", **TURNS},
    "turns-truncated": {"loss_type": "bnpo", **TRUNCATED, "beta": 0.3, **TURNS, **TWO_ITERATIONS},
    "turns-grpo": {"loss_type": "grpo", "entropy_coef": 0.05, "top_entropy_quantile": 0.5, **TURNS},
    "tools": {"loss_type": "dapo", **with_tools()},
    "tools-truncated-kl": {
        "loss_type": "grpo",
        "mask_truncated_completions": True,
        "beta": 0.3,
        **with_tools(),
        **TWO_ITERATIONS,
    },
    "environment": {"loss_type": "bnpo", "entropy_coef": 0.05, **with_tools(environment=True)},
    "vllm": {"loss_type": "dapo", "further": as_vllm()},
    "vllm-truncate": {"loss_type": "grpo", "further": as_vllm("sequence_truncate", high=1.2), **TWO_ITERATIONS},
    "vllm-token-mask": {"loss_type": "bnpo", "further": as_vllm("token_mask", low=0.8, high=1.3)},
    "vllm-unbounded": {"loss_type": "dapo", "further": as_vllm(high=None)},
    "vllm-vespo": {"loss_type": "vespo", "further": as_vllm("token_truncate", high=1.2)},
    "vllm-kl-tools": {"loss_type": "grpo", "beta": 0.3, "further": as_vllm("token_truncate", high=1.2), **with_tools()},
    "vllm-uncorrected": {"loss_type": "dapo", "off_policy_mask_threshold": 0.02, "further": as_vllm(corrects=False)},
    "rloo": {"kind": RLOOTrainer},
    "rloo-kl": {"kind": RLOOTrainer, "beta": 0.3, "reward_clip_range": (0.5, 3.0), "normalize_advantages": True},
    "rloo-truncated": {"kind": RLOOTrainer, "beta": 0.3, **TRUNCATED},
    "rloo-two-iterations": {"kind": RLOOTrainer, "epsilon": 0.5, **TWO_ITERATIONS, "learning_rate": 3e-3},
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_every_step_is_rebuilt_from_its_file(tmp_path: Path, case: str) -> None:
    _, seen, steps = train(tmp_path, **CASES[case])
    assert len(steps) >= 3
    for weights, gradients, rows in zip(seen.weights, seen.gradients, steps, strict=True):
        assert any(g.any() for g in gradients.values())
        assert relative_error(gradient_of_the_objective(weights, rows), gradients) < 2e-5
        assert relative_error(gradient_of_the_update(weights, rows), gradients) < 2e-5


PLANTED = {
    "kl": {"beta": 0.0},
    "kl-corrected": {"use_bias_correction_kl": False},
    "bonus": {"entropy_coef": 0.0},
    "quantile": {"top_entropy_quantile": 1.0},
    "cispo": {"epsilon_high": 5.0},
    "cispo-below-1": {"epsilon_high": 5.0},
    "sapo": {"sapo_temperature_pos": 1.0},
    "luspo": {"epsilon_high": 0.2},
    "vespo": {"vespo_k_pos": 2.0},
    "gspo": {"importance_sampling_level": "token"},
    "two-iterations": {"epsilon_low": 0.2, "epsilon_high": 0.2, "delta": None},
    "off-policy-mask": {"off_policy_mask_threshold": 10.0},
    "truncated": {"loss_mask": None},
    "turns": {"sampled": None},
    "tools": {"sampled": None},
    "vllm": {"importance_sampling_clip_max": None},
    "vllm-truncate": {"importance_sampling_mode": "token_truncate"},
    "vllm-token-mask": {"importance_sampling_clip_min": None},
    "vllm-vespo": {"importance_sampling_clip_max": 10.0},
    "vllm-uncorrected": {"logprobs": None},
    "rloo-two-iterations": {"epsilon_low": 0.01, "epsilon_high": 0.01},
}

DECLARED = ("loss_mask", "sampled", "logprobs")


@pytest.mark.parametrize("case", PLANTED)
def test_each_column_that_is_recorded_is_needed(tmp_path: Path, case: str) -> None:
    """The comparison fails where a row says something else."""
    _, seen, steps = train(tmp_path, **CASES[case])
    worst = 0.0
    for weights, gradients, rows in zip(seen.weights, seen.gradients, steps, strict=True):
        declared = {name: value for name, value in PLANTED[case].items() if name in DECLARED}
        extra = {name: value for name, value in PLANTED[case].items() if name not in declared}
        changed = [replace(row, **declared, extra={**row.extra, **extra}) for row in rows]
        worst = max(worst, relative_error(gradient_of_the_objective(weights, changed), gradients))
    assert worst > 1e-3


class LossInputs(TrainerCallback):  # type: ignore[misc]
    """What TRL's loss is given, micro-batch by micro-batch, and what it would divide by."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.seen = trainer, []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        compute = self.trainer._compute_loss

        def look(model: Any, inputs: Any) -> Any:
            # As GRPOTrainer._compute_loss has it for dapo.
            share = self.trainer.current_gradient_accumulation_steps / args.steps_per_generation
            self.seen.append((inputs, float(inputs["num_items_in_batch"].clamp(min=1.0)) * share))
            return compute(model, inputs)

        self.trainer._compute_loss = look


def test_every_value_is_the_one_of_trls_tensors_at_the_loss(tmp_path: Path) -> None:
    looks: list[LossInputs] = []

    def further(trainer: Any) -> list[Any]:
        looks.append(LossInputs(trainer))
        return [AsVLLM(trainer, vllm_importance_sampling_mode="token_truncate"), *looks]

    options = {"loss_type": "dapo", "beta": 0.3, "mask_truncated_completions": True, **with_tools(), **TWO_ITERATIONS}
    _, _, steps = train(tmp_path, further=further, **options)
    inputs = looks[0].seen
    assert len(inputs) == 2 * len(steps)
    found = {"left out": 0, "by a tool": 0}
    for step, rows in enumerate(steps):
        for number in (0, 1):
            batch, divisor = inputs[2 * step + number]
            taken = [row for row in rows if row.micro_batch == number]
            assert len(taken) == len(batch["advantages"])
            for row in taken:
                assert row.window_tokens == divisor
                (i,) = [i for i in range(len(taken)) if is_row(row, batch, i)][:1]
                tokens = len(row.response_ids)
                mask = batch["completion_mask"][i] * batch["tool_mask"][i]
                assert mask_of(row) == mask[:tokens].tolist()
                assert not batch["completion_mask"][i, tokens:].any()
                found["by a tool"] += row.sampled is not None
                columns = [("sampling_per_token_logps", row.logprobs)]
                if row.loss_mask is None:
                    # Of the others TRL's own are those of tokens that do not see each other.
                    columns += [("old_per_token_logps", row.old_logprobs), ("ref_per_token_logps", row.ref_logprobs)]
                else:
                    found["left out"] += 1
                    assert not any(row.loss_mask)
                for name, values in columns:
                    assert values == tuple(batch[name][i, :tokens].double().tolist())
                if row.sampled is not None:
                    put = [SYMBOLS[t] for t, drawn in zip(row.response_ids, row.sampled, strict=True) if not drawn]
                    assert "".join(put) in (f"{TOOL_SAYS}z", 2 * f"{TOOL_SAYS}z")
    assert all(found.values()), found


def is_row(row: Rollout, batch: Any, i: int) -> bool:
    tokens = len(row.response_ids)
    return (
        row.advantage == float(batch["advantages"][i])
        and list(row.response_ids) == batch["completion_ids"][i, :tokens].tolist()
        and not batch["completion_ids"][i, tokens:].any()
        and list(row.prompt_ids) == batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
    )


def test_log_probs_of_responses_that_the_loss_leaves_out_are_those_of_their_tokens(tmp_path: Path) -> None:
    """TRL's own are not: there no token sees the response before it."""
    _, seen, steps = train(tmp_path, loss_type="grpo", beta=0.3, **TRUNCATED, **TWO_ITERATIONS)
    left_out = [row for row in steps[1] if row.loss_mask is not None]
    assert left_out
    reference = type(tiny_model()).from_pretrained(tmp_path / "reference")
    with torch.no_grad():
        for model, column in ((model_at(seen.weights[0]), "logprobs"), (reference, "ref_logprobs")):
            log_probs, _ = measured(model, left_out)
            recorded = [value for row in left_out for value in getattr(row, column)]
            assert recorded == pytest.approx(log_probs.tolist(), abs=1e-5)
    assert all(row.old_logprobs == row.logprobs for row in steps[1])
    assert {row.cut for row in left_out} == {True}
    assert {row.on_policy for row in steps[0]} == {True}
    assert {row.on_policy for row in steps[1]} == {False}


@pytest.mark.parametrize("vllm", [False, True])
def test_the_training_is_the_same_with_and_without_the_recorder(tmp_path: Path, vllm: bool) -> None:
    options = {
        "loss_type": "dapo",
        "beta": 0.3,
        "mask_truncated_completions": True,
        "use_adaptive_entropy": True,
        "entropy_target": 2.6,
        **with_tools(),
        **TWO_ITERATIONS,
    }
    recorded, _, steps = train(tmp_path, further=as_vllm() if vllm else lambda _: (), **options)
    plain = make_trainer(tmp_path, **options)
    for callback in as_vllm()(plain) if vllm else ():
        plain.add_callback(callback)
    plain.train()
    assert any(row.sampled is not None for rows in steps for row in rows)
    for with_recorder, without in zip(recorded.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(with_recorder, without)


def test_an_adaptive_entropy_coefficient_is_that_of_the_step(tmp_path: Path) -> None:
    options = {"entropy_coef": 0.02, "entropy_coef_delta": 0.01, "entropy_target": 2.6, "use_adaptive_entropy": True}
    _, seen, steps = train(tmp_path, loss_type="grpo", max_steps=4, **options)
    coefficients = [rows[0].extra["entropy_coef"] for rows in steps]
    assert coefficients[0] == 0.0  # TRL measures before it applies any
    assert len(set(coefficients)) >= 3
    for weights, gradients, rows in zip(seen.weights, seen.gradients, steps, strict=True):
        assert relative_error(gradient_of_the_objective(weights, rows), gradients) < 2e-5


def test_a_step_of_which_vllm_did_not_score_a_token_is_left_out_where_the_loss_needs_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Unscored(AsVLLM):
        def _log_probs(self, prompt: list[int], response: list[int]) -> list[float]:
            found = super()._log_probs(prompt, response)
            return [math.nan, *found[1:]] if self.trainer.state.global_step == 1 else found

    for corrects in (True, False):
        folder = tmp_path / str(corrects)
        trainer = make_trainer(folder, max_steps=2)
        trainer.add_callback(RolloutRecorder(trainer, folder / "rollouts"))
        trainer.add_callback(Unscored(trainer, vllm_importance_sampling_correction=corrects))
        trainer.train()
        assert (folder / "rollouts" / "step-00001.jsonl").exists()
        assert (folder / "rollouts" / "step-00002.jsonl").exists() == (not corrects)
    assert "step 2 is not recorded: in 24 rows the policy drew no token, or log-probs are not finite" in caplog.text
    rows = read_rollouts(tmp_path / "False" / "rollouts" / "step-00002.jsonl")
    assert {row.logprobs for row in rows} == {None}


def test_what_a_function_draws_is_not_said_to_be_the_policys(tmp_path: Path) -> None:
    _, _, (rows,) = train(tmp_path, loss_type="dapo", max_steps=1, **TURNS)
    for row in rows:
        assert (row.top_k, row.top_p, row.on_policy, row.logprobs) == (None, None, None, None)
        assert row.extra["sampler"] == "rollout_func"
        if row.sampled is not None:
            assert row.sampled.count(False) == 1
            assert SYMBOLS[row.response_ids[row.sampled.index(False)]] == "t"
    assert any(row.sampled is not None for row in rows)
    assert any(row.response_ids[-1] == EOS for row in rows)


def test_plain_rows_say_nothing_of_a_loss_that_is_plain(tmp_path: Path) -> None:
    _, _, (rows,) = train(tmp_path, loss_type="dapo", max_steps=1)
    names = {"old_logprobs", "ref_logprobs", "loss_mask", "sampled", "token_weight", "logprobs"}
    assert all(getattr(row, name) is None for row in rows for name in names)
    assert not set(OF_THE_LOSS) & rows[0].extra.keys()
