"""A folder of another framework is named for what it is, by every command, and the way to what is read is told."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from entropy_probe.checkpoints.formats.foreign import recognise
from entropy_probe.data.rollouts import write_rollouts
from support import (
    lora_model,
    make_checkpoint,
    random_rollouts,
    run_command,
    save_checkpoint,
    tiny_model,
    trained_optimizer,
)

FOLDERS: dict[str, tuple[Sequence[str], str, str]] = {
    "zero-elsewhere": (["latest", "global_step4/readme"], "", "DeepSpeed checkpoint without its ranks' files"),
    "megatron": (["iter_0000002/common.pt", "iter_0000002/.metadata", "iter_0000002/__0_0.distcp"], "", "Megatron"),
    "megatron-old": (["mp_rank_00/model_optim_rng.pt"], "", "Megatron"),
    "lightning": (["hparams.yaml", "checkpoints/epoch=1-step=2.ckpt"], "checkpoints", "PyTorch Lightning"),
    "torchtune": (["recipe_state/recipe_state.pt", "epoch_0/config.json"], "", "torchtune"),
    "torchtune-old": (["recipe_state.pt", "hf_model_0001_0.pt"], "", "torchtune"),
    "local": (["pytorch_model_fsdp_rank0.bin", "optimizer_rank0.bin"], "", "FSDP's LOCAL_STATE_DICT"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_command_names_the_framework_and_where_it_is(kind: str, tmp_path: Path) -> None:
    files, where, name = FOLDERS[kind]
    folder = tmp_path / "given"
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"x")
    after = shutil.copytree(folder, tmp_path / "after")
    rollouts = tmp_path / "rollouts.jsonl"
    write_rollouts(random_rollouts(2, 2), rollouts)
    sampling = ["--prompts", rollouts, "--reward", "math:sqrt", "--responses", "2", "--out", tmp_path / "out.jsonl"]
    for command in (
        ["run", folder, "--rollouts", rollouts],
        ["inspect", folder],
        ["replay", folder, after, "--rollouts", rollouts, "--length-weight", "grpo"],
        ["sample", folder, *sampling],
    ):
        outcome = run_command(*command)
        assert outcome.code == 2
        assert len(outcome.lines) == 1
        assert name in outcome.err, outcome.err
        assert "which is not read yet; " in outcome.err
        assert f"{folder} {f'holds in {where} a' if where else 'is a'}" in outcome.err
        assert "save_only_model" not in outcome.err


def test_a_runs_folder_points_at_its_checkpoints(tmp_path: Path) -> None:
    for step in (2, 3):
        make_checkpoint(tmp_path / "run" / f"checkpoint-{step}")
    for given, inside in ((tmp_path / "run", ""), (tmp_path, "run/")):
        outcome = run_command("inspect", given)
        assert (outcome.code, len(outcome.lines)) == (2, 1)
        assert f"holds {inside}checkpoint-2, {inside}checkpoint-3; give one of them" in outcome.err


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    rollouts = tmp_path / "rollouts.jsonl"
    write_rollouts(random_rollouts(2, 2), rollouts)
    sampling = ["--prompts", rollouts, "--reward", "math:sqrt", "--responses", "2", "--out", tmp_path / "out.jsonl"]
    for command in (["inspect", folder], ["run", folder, "--rollouts", rollouts], ["sample", folder, *sampling]):
        outcome = run_command(*command)
        assert (outcome.code, len(outcome.lines)) == (2, 1)
        assert f"{folder} is empty; expected a checkpoint folder" in outcome.err


def test_weights_without_an_optimizer_are_no_foreign_folder(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    assert recognise(tmp_path) == ()
    outcome = run_command("inspect", tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    assert "save_only_model=True" in outcome.out
    assert "model.embed_tokens.weight" in outcome.out


def test_an_adapter_with_a_name_is_read_where_it_is(tmp_path: Path) -> None:
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    model = lora_model(base)
    path = save_checkpoint(model, trained_optimizer(model), tmp_path / "checkpoint-3")
    (path / "policy").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (path / file).rename(path / "policy" / file)
    assert run_command("inspect", path, "--base", tmp_path / "base").code == 0
    assert "holds checkpoint-3; give that" in run_command("inspect", tmp_path).err
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (path / "policy" / file).rename(path / file)
    assert run_command("inspect", path, "--base", tmp_path / "base").code == 0


@pytest.mark.parametrize(
    ("module", "owner"), [("torchao.optim.subclass_8bit", "torchao"), ("galore_torch.galore_projector", "GaLore")]
)
def test_code_that_an_optimizers_pickle_names_tells_whose_it_is(module: str, owner: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "checkpoint")
    # As torch.save writes a class of another library, which is not here.
    made = types.ModuleType(module)
    state = type("State", (), {"__module__": module})
    vars(made)["State"] = state
    names = [".".join(module.split(".")[: n + 1]) for n in range(module.count(".") + 1)]
    before = {name: sys.modules.get(name) for name in names}
    try:
        sys.modules |= dict.fromkeys(names, made)
        torch.save({"state": {0: {"step": state()}}, "param_groups": []}, path / "optimizer.pt")
    finally:
        for name, old in before.items():
            sys.modules.pop(name)
            if old is not None:
                sys.modules[name] = old
    outcome = run_command("inspect", path)
    assert outcome.code == 2
    assert owner in outcome.err
    assert f"names {module}.State" in outcome.err
