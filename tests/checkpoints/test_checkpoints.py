"""Weights, adapters and learning rates of a checkpoint folder are read as they were written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from entropy_probe import group_rollouts, state_of_optimizer, write_rollouts
from entropy_probe.checkpoints import load_checkpoint, load_model
from entropy_probe.losses.advantages import AdvantageRule, advantages_from_rewards
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.preconditioner import Preconditioners
from spoiled import Malicious
from support import (
    VOCABULARY,
    assert_same_moments,
    lora_model,
    make_checkpoint,
    random_rollouts,
    run_command,
    save_checkpoint,
    tiny_model,
    trained_optimizer,
)


@pytest.mark.parametrize("how", ["option", "relative-to-the-adapter", "relative-to-the-working-folder"])
def test_an_adapter_loads_over_its_base_and_only_the_adapter_trains(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    model = lora_model(base)
    optimizer = trained_optimizer(model)
    adapter = save_checkpoint(model, optimizer, tmp_path / "checkpoint-3")
    config = json.loads((adapter / "adapter_config.json").read_text())
    names = {"option": "", "relative-to-the-adapter": "../base", "relative-to-the-working-folder": "base"}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": names[how]}))
    monkeypatch.chdir(tmp_path)
    found = load_checkpoint(adapter, base=tmp_path / "base" if how == "option" else None)
    assert found.folder.kind == "lora"
    trainable = {name for name, p in found.model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert len(trainable) == 2 * 2 * 3
    assert_same_moments(found.adam, state_of_optimizer(optimizer, model))
    ours = dict(found.model.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(ours[name], p), name
    assert [len(group.names) for group in found.adam.groups] == [12, 0]
    frozen = load_model(adapter, base=tmp_path / "base", trainable=False).model
    assert not any(p.requires_grad for p in frozen.parameters())


def test_an_adapter_checkpoint_is_probed_by_the_command(tmp_path: Path) -> None:
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    model = lora_model(base)
    adapter = save_checkpoint(model, trained_optimizer(model), tmp_path / "checkpoint-3")
    write_rollouts(random_rollouts(4, 2), tmp_path / "rollouts.jsonl")
    run = ["run", adapter, "--base", tmp_path / "base", "--rollouts", tmp_path / "rollouts.jsonl"]
    outcome = run_command(*run, "--json", tmp_path / "report.json")
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["checkpoint"]["kind"] == "lora"
    assert report["checkpoint"]["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report["checkpoint"]["frozen_parameters"] == sum(p.numel() for p in base.parameters() if not p.requires_grad)


def probe_json(checkpoint: Path, folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    write_rollouts(random_rollouts(5, 3), folder / "rollouts.jsonl")
    target = folder / "report.json"
    outcome = run_command(
        "run",
        checkpoint,
        "--rollouts",
        folder / "rollouts.jsonl",
        "--json",
        target,
        "--dtype",
        "float64",
        "--estimator",
        "score",
        *options,
    )
    assert outcome.code == 0, outcome.err
    return json.loads(target.read_text()), outcome.out


def test_a_stored_learning_rate_of_zero_is_said_aloud(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", learning_rate=0.0)
    report, printed = probe_json(checkpoint, tmp_path)
    (warning,) = [w for w in report["warnings"] if w["code"] == "learning_rate_zero"]
    assert "0.0" in warning["seen"]
    assert "Set the learning rate" in warning["advice"]
    assert "learning rate is 0.0" in " ".join(printed.split())
    assert report["first_order"]["delta_h1"] == 0.0
    assert report["first_order"]["u_cross"] != 0.0
    told = " ".join(run_command("inspect", checkpoint).out.split())
    assert "learning rate is 0.0 (end of a schedule?); run takes the rate that the rows recorded" in told


def test_a_given_learning_rate_replaces_the_stored_one(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", learning_rate=0.0)
    report, _ = probe_json(checkpoint, tmp_path, "--learning-rate", "2e-4")
    first = report["first_order"]
    assert first["learning_rate"] == 2e-4
    assert first["delta_h1"] == pytest.approx(-2e-4 * first["u_cross"], rel=1e-12)
    assert report["checkpoint"]["stored_learning_rates"] == [0.0]
    assert "learning_rate_zero" not in {w["code"] for w in report["warnings"]}


def test_groups_of_different_learning_rates_add_up_group_by_group(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = trained_optimizer(model)
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 3e-3, 5e-4
    save_checkpoint(model, optimizer, tmp_path / "checkpoint")
    report, printed = probe_json(tmp_path / "checkpoint", tmp_path)
    first = report["first_order"]
    assert first["learning_rate"] == [3e-3, 5e-4]
    assert "0.003, 0.0005" in printed

    # X_n and Y_n one prompt at a time by autograd, then one kernel X P Y for each group's parameters.
    loaded = load_checkpoint(tmp_path / "checkpoint", dtype=torch.float64)
    batch = group_rollouts(random_rollouts(5, 3))
    policy, p = Policy(loaded.model), Preconditioners(loaded.adam)
    parameters = policy.trainable()
    kernels = {name: torch.zeros(5, 5, dtype=torch.float64) for name in parameters}
    xs, ys = [], []
    for group in batch.groups:
        with policy.arithmetic():
            scores = policy.forward_scores(group.responses)
        rewards = torch.tensor([r.reward for r in group.responses], dtype=torch.float64)
        advantages = advantages_from_rewards(rewards, [3], AdvantageRule.DR_GRPO)
        longest = max(len(r.response_ids) for r in group.responses)
        others = torch.stack([(scores.sum() - s) / 2 for s in scores]).detach()
        loss_x = ((scores.detach() - others) * scores).mean()
        loss_y = (advantages / longest * scores).mean()
        xs.append(torch.autograd.grad(loss_x, list(parameters.values()), retain_graph=True))
        ys.append(torch.autograd.grad(loss_y, list(parameters.values())))
    for u in range(5):
        for w in range(5):
            for index, name in enumerate(parameters):
                kernels[name][u, w] = (xs[u][index] * p[name] * ys[w][index]).sum()
    off_diagonal = ~torch.eye(5, dtype=torch.bool)
    by_group = [sum(float(kernels[name][off_diagonal].mean()) for name in group.names) for group in loaded.adam.groups]
    assert first["delta_h1"] == pytest.approx(-(3e-3 * by_group[0] + 5e-4 * by_group[1]), rel=1e-9)
    assert first["u_cross"] == pytest.approx(by_group[0] + by_group[1], rel=1e-9)
    assert abs(by_group[1]) > 1e-3 * abs(by_group[0])


def test_equal_learning_rates_of_two_groups_are_one_number(tmp_path: Path) -> None:
    report, _ = probe_json(make_checkpoint(tmp_path / "checkpoint"), tmp_path)
    first = report["first_order"]
    assert first["learning_rate"] == 1e-3
    assert first["delta_h1"] == pytest.approx(-1e-3 * first["u_cross"], rel=1e-12)


def test_pickles_beside_the_optimizer_are_never_opened(tmp_path: Path) -> None:
    checkpoint, planted = make_checkpoint(tmp_path / "checkpoint"), tmp_path / "planted"
    for name in ("training_args.bin", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "scaler.pt"):
        (checkpoint / name).write_bytes(pickle.dumps(Malicious(planted)))
    report, _ = probe_json(checkpoint, tmp_path)
    assert report["first_order"]["u_cross"] != 0
    assert run_command("inspect", checkpoint).code == 0
    assert not planted.exists()
    pickle.loads((checkpoint / "scheduler.pt").read_bytes())
    assert planted.exists()


@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_an_adapter_in_the_embeddings_place_is_inspected_and_its_vocabulary_still_counts(
    kind: str, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny_model("llama-untied")
    base.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "embed_tokens"] if kind == "lora" else ["q_proj"]
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=None if kind == "lora" else ["embed_tokens"])
    model = get_peft_model(base, config)
    checkpoint = save_checkpoint(model, trained_optimizer(model), tmp_path / "checkpoint-3")
    arguments = ["--base", tmp_path / "base"]
    shown = run_command("inspect", checkpoint, *arguments)
    assert shown.code == 0, shown.err
    assert "embed_tokens" in shown.out
    for vocabulary, code in ((VOCABULARY, 0), (VOCABULARY + 20, 2)):
        rows = random_rollouts(3, 2, vocabulary=vocabulary)
        write_rollouts(rows, tmp_path / "rollouts.jsonl")
        outcome = run_command("run", checkpoint, *arguments, "--rollouts", tmp_path / "rollouts.jsonl")
        assert outcome.code == code, outcome.err
    assert "vocabulary" in outcome.err


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_adapter_and_its_base_are_wholly_in_the_type_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    adapted = lora_model(base)
    checkpoint = save_checkpoint(adapted, trained_optimizer(adapted), tmp_path / "checkpoint-3")
    model = load_model(checkpoint, base=tmp_path / "base", dtype=dtype).model
    assert {p.dtype for p in model.parameters()} == {dtype}
    # Rotary tables are widened and never narrowed: in bfloat16 they would turn far positions by the wrong angle.
    widened = torch.promote_types(dtype, torch.float32)
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {widened}


def test_the_tokenizer_is_looked_for_in_the_adapter_and_then_in_its_base(tmp_path: Path) -> None:
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    adapted = lora_model(base)
    checkpoint = save_checkpoint(adapted, trained_optimizer(adapted), tmp_path / "checkpoint-3")
    assert load_model(checkpoint, base=tmp_path / "base").tokenizer_folders == (checkpoint, tmp_path / "base")
    assert load_model(tmp_path / "base").tokenizer_folders == (tmp_path / "base",)


def test_the_trainers_step_is_read_and_a_folder_without_its_log_will_do(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint-3")
    assert load_checkpoint(checkpoint).trainer_step == 3
    (checkpoint / "trainer_state.json").unlink()
    assert load_checkpoint(checkpoint).trainer_step is None
