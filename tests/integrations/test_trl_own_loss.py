"""Whose loss it is: a trainer that is not TRL's own GRPOTrainer is refused by name, or its rows say so."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import trl
from transformers import MixtralConfig, OPTConfig, PhimoeConfig
from trl import GRPOTrainer
from trl.experimental.gmpo import GMPOTrainer
from trl.extras.profiling import profiling_decorator

from entropy_probe.data.rollouts import group_rollouts, read_rollouts
from entropy_probe.errors import InputError
from entropy_probe.integrations.trl import RolloutRecorder
from entropy_probe.integrations.trl.trainer import check_batch
from entropy_probe.model.dropout import active_dropout
from entropy_probe.report.rollout_warnings import recorder_warnings
from trl_training import make_trainer, rebuilt_gradient, relative_error, train


class HalfOfTheTokens(GRPOTrainer):  # type: ignore[misc]
    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        kept = inputs["completion_mask"].clone()
        kept[:, ::2] = 0
        return super()._compute_loss(model, dict(inputs) | {"completion_mask": kept})


class BestOfMany(GRPOTrainer):  # type: ignore[misc]
    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        return super()._generate_single_turn(*args, **kwargs)


class OwnLogging(GRPOTrainer):  # type: ignore[misc]
    def log(self, *args: Any, **kwargs: Any) -> None:
        super().log(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        return super()._calculate_rewards(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        return super().get_train_dataloader()

    def helper_of_mine(self) -> None: ...


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_trainer(tmp_path_factory.mktemp("idle"))


def refusal(trainer: Any, loss_type: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        RolloutRecorder(trainer, "never_made", loss_type=loss_type)
    assert "\n" not in str(caught.value)
    assert not Path("never_made").exists()
    return str(caught.value)


@pytest.mark.parametrize("kind", [HalfOfTheTokens, GMPOTrainer])
def test_a_trainer_with_a_loss_of_its_own_is_not_recorded_as_its_parent(tmp_path: Path, kind: type) -> None:
    said = refusal(make_trainer(tmp_path, kind=kind, loss_type="dapo"))
    assert f"{kind.__name__} replaces _compute_loss ({kind.__module__}.{kind.__qualname__})" in said
    assert "loss_type=..." in said


def test_the_loss_that_is_stated_for_gmpo_is_the_one_of_its_gradient_and_the_probe_says_who_stated_it(
    tmp_path: Path,
) -> None:
    _, seen, steps = train(tmp_path, stated_loss="grpo", kind=GMPOTrainer, loss_type="dapo", max_steps=1)
    assert {row.loss_type for row in steps[0]} == {"grpo"}
    rebuilt = rebuilt_gradient(seen.weights[0], steps[0], "grpo")
    assert relative_error(rebuilt, seen.gradients[0]) < 1e-5
    assert relative_error(rebuilt_gradient(seen.weights[0], steps[0], "dapo"), seen.gradients[0]) > 0.01
    (warning,) = recorder_warnings(group_rollouts(steps[0]))
    assert warning.code == "stated_loss"
    assert "GMPOTrainer" in warning.seen
    assert "grpo" in warning.seen


def test_a_stated_loss_excuses_neither_another_sampling_nor_a_loss_that_is_trls_own(tmp_path: Path, idle: Any) -> None:
    trainer = make_trainer(tmp_path, kind=BestOfMany)
    for stated in (None, "grpo"):
        assert "BestOfMany replaces _generate_single_turn (" in refusal(trainer, stated)
    assert "loss_type 'grpo' was stated for a trainer whose loss is TRL's own 'dr_grpo'" in refusal(idle, "grpo")
    stated_alike = RolloutRecorder(idle, "never_made", loss_type="dr_grpo")
    assert not stated_alike._own_loss


def test_a_patched_loss_is_seen_behind_a_decorator_that_copies_its_name(
    idle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = GRPOTrainer._compute_loss

    def doubled(self: Any, model: Any, inputs: Any) -> Any:
        return 2 * original(self, model, inputs)

    # One copies the name onto a function of ours, the other is TRL's own, around it.
    for patched in (functools.wraps(original)(doubled), profiling_decorator(doubled)):
        with monkeypatch.context() as patch:
            patch.setattr(GRPOTrainer, "_compute_loss", patched)
            assert "GRPOTrainer replaces _compute_loss (a patch in " in refusal(idle)
    monkeypatch.setattr(idle, "compute_loss", lambda *_: 0.0)
    assert "GRPOTrainer replaces compute_loss (an attribute of the object itself)" in refusal(idle)


def test_a_trainer_that_is_changed_after_the_recorder_was_built_stops_before_the_first_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.add_callback(RolloutRecorder(trainer, tmp_path / "rollouts"))
    trainer._compute_loss = functools.partial(GRPOTrainer._compute_loss, trainer)
    with pytest.raises(InputError, match=r"replaces _compute_loss \(an attribute of the object itself\)"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not (tmp_path / "rollouts").exists()


def test_logging_rewards_and_data_of_ones_own_are_recorded_and_dropout_is_said(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, kind=OwnLogging, max_steps=1)
    trainer.model.config.attention_dropout = 0.1
    trainer.add_callback(RolloutRecorder(trainer, tmp_path / "rollouts"))
    trainer.train()
    (warning,) = recorder_warnings(group_rollouts(read_rollouts(tmp_path / "rollouts" / "step-00001.jsonl")))
    assert warning.code == "trained_with_dropout"
    assert "0.1" in warning.seen
    # One more recorder is no second file, but a refusal; taken out, the trainer is as it was.
    trainer.add_callback(RolloutRecorder(trainer, tmp_path / "again"))
    with pytest.raises(InputError, match="another RolloutRecorder records this trainer already; take all out"):
        trainer.train()
    assert not (tmp_path / "again").exists()
    trainer.pop_callback(RolloutRecorder).on_train_end(None, None, None)
    RolloutRecorder(trainer, tmp_path / "again")


@pytest.mark.parametrize(
    ("config", "name"),
    [(OPTConfig, "layerdrop"), (MixtralConfig, "router_jitter_noise"), (PhimoeConfig, "input_jitter_noise")],
)
def test_noise_of_training_mode_that_is_no_module_counts_as_dropout(config: Any, name: str) -> None:
    model = torch.nn.Module()
    model.config = config(**{name: 0.3})
    assert active_dropout(model) == 0.3


def test_another_kind_of_trainer_is_refused() -> None:
    assert "types.SimpleNamespace is neither" in refusal(SimpleNamespace())


@pytest.mark.parametrize(
    ("name", "value"), [("loss_type", "another"), ("args.neftune_noise_alpha", 5.0), ("aux_loss_enabled", True)]
)
def test_a_setting_that_the_rows_cannot_tell_is_refused_by_name(
    idle: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    owner = idle.args if name.startswith("args.") else idle
    monkeypatch.setattr(owner, name.removeprefix("args."), value)
    says = {"aux_loss_enabled": "router_aux_loss_coef"}
    assert says.get(name, name.removeprefix("args.")) in refusal(idle)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 0.04),
        ("args.delta", 0.5),
        ("_entropy_bonus_enabled", True),
        ("top_entropy_quantile", 0.2),
        ("off_policy_mask_threshold", 0.5),
        ("mask_truncated_completions", True),
        ("tools", [print]),
        ("rollout_func", print),
        ("environment_factories", {None: print}),
    ],
)
def test_an_option_of_trls_loss_is_refused_beside_a_loss_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    trainer = make_trainer(tmp_path, kind=HalfOfTheTokens)
    RolloutRecorder(trainer, "never_made", loss_type="dr_grpo")
    monkeypatch.setattr(trainer.args if name.startswith("args.") else trainer, name.removeprefix("args."), value)
    says = {"_entropy_bonus_enabled": "entropy_coef", "environment_factories": "environment_factory"}
    said = refusal(trainer, "dr_grpo")
    assert says.get(name, name.removeprefix("args.")) in said
    assert "is set for a loss of your own" in said


def test_uneven_windows_and_a_quantile_over_processes_are_refused(idle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(type(idle.args), "world_size", 2)
        RolloutRecorder(idle, "never_made")
        patch.setattr(idle, "top_entropy_quantile", 0.2)
        assert "top_entropy_quantile is 0.2, and with several processes" in refusal(idle)
    monkeypatch.setattr(idle.args, "steps_per_generation", 3)
    for loss in ("dapo", "cispo", "vespo"):
        monkeypatch.setattr(idle, "loss_type", loss)
        assert "steps_per_generation (3) is not a multiple" in refusal(idle)


def test_a_batch_with_what_the_rows_cannot_hold_is_refused() -> None:
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "num_items_in_batch", "advantages")
    batch = dict.fromkeys(names, torch.ones(4))
    check_batch(batch, grpo=True)
    with pytest.raises(InputError, match="pixel_values"):
        check_batch(batch | {"pixel_values": torch.ones(4, 3)}, grpo=True)
    with pytest.raises(InputError, match="advantages have a value per token"):
        check_batch(batch | {"advantages": torch.ones(4, 3)}, grpo=True)
    with pytest.raises(InputError, match="has no completion_mask"):
        check_batch({name: value for name, value in batch.items() if name != "completion_mask"}, grpo=True)
    with pytest.raises(InputError, match="has no old_logps"):
        check_batch(batch, grpo=False)


@pytest.mark.parametrize(
    "name", ["_entropy_bonus_enabled", "_last_world_entropy", "eos_token_ids", "tools", "generation_kwargs"]
)
def test_a_name_that_this_trl_should_have_is_never_taken_for_a_harmless_value(
    idle: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delattr(idle, name)
    assert f"has no {name}; the recorder knows the GRPOTrainer of TRL 1.10 to 1.16" in refusal(idle)


def test_an_older_trl_is_refused_and_a_name_asked_for_only_where_it_was(
    idle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trl, "__version__", "1.9.2")
    assert "knows TRL 1.10 to 1.16, and this is 1.9.2; install a newer TRL" in refusal(idle)
    monkeypatch.setattr(trl, "__version__", "1.14.2")
    monkeypatch.delattr(idle, "eos_token_ids")
    assert "has no use_liger_kernel" in refusal(idle)
    monkeypatch.setattr(idle, "use_liger_kernel", True, raising=False)
    assert "use_liger_kernel computes the loss" in refusal(idle)
    monkeypatch.setattr(idle, "use_liger_kernel", False)
    RolloutRecorder(idle, "never_made")


def test_rows_of_a_newer_trl_are_marked_and_the_probe_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "__version__", "1.17.0.dev0")
    _, _, (rows,) = train(tmp_path, max_steps=1)
    (warning,) = recorder_warnings(group_rollouts(rows))
    assert warning.code == "unknown_trl"
    assert "TRL 1.17.0.dev0" in warning.seen
    monkeypatch.delattr(GRPOTrainer, "_calculate_rewards")
    assert "has no _calculate_rewards" in refusal(make_trainer(tmp_path))
