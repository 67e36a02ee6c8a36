"""accelerate's whole folders: FSDP's FULL_STATE_DICT by names, and ``save_state``'s state by index.

``tests/data/checkpoints/trainer_fsdp2_full`` is a Trainer's folder under FSDP2 on two ranks (transformers 5.23, accelerate
1.15); ``truth.json`` has the SHA-256 of every weight and moment.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from entropy_probe.checkpoints import Checkpoint, load_checkpoint
from entropy_probe.data.rollouts import write_rollouts
from spoiled import Malicious, assert_refused
from support import (
    assert_equal,
    fingerprint,
    hf_groups,
    lora_model,
    make_checkpoint,
    random_rollouts,
    run_command,
    save_checkpoint,
    tiny_model,
    trained_optimizer,
)

WRITTEN = Path(__file__).parent.parent / "data" / "checkpoints" / "trainer_fsdp2_full"


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def _by_names(model: Any, optimizer: torch.optim.Optimizer, rename: Any = lambda name: name) -> dict[str, Any]:
    names = {id(p): rename(name) for name, p in model.named_parameters()}
    saved = optimizer.state_dict()
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    return {
        "state": {order[index]: entry for index, entry in saved["state"].items()},
        "param_groups": [{**g, "params": [order[index] for index in g["params"]]} for g in saved["param_groups"]],
    }


def _whole(model: Any, optimizer: torch.optim.Optimizer, path: Path, rename: Any = lambda name: name) -> Path:
    """As accelerate saves FSDP's FULL_STATE_DICT: no configuration."""
    path.mkdir(parents=True)
    torch.save({rename(name): value for name, value in model.state_dict().items()}, path / "pytorch_model_fsdp.bin")
    torch.save(_by_names(model, optimizer, rename), path / "optimizer.bin")
    return path


def _pair(tmp_path: Path, name: str = "llama-untied") -> tuple[Any, torch.optim.Optimizer, Path, Checkpoint]:
    model = tiny_model(name)
    optimizer = trained_optimizer(model)
    plain = save_checkpoint(model, optimizer, tmp_path / "plain")
    return model, optimizer, plain, load_checkpoint(plain)


def test_a_trainers_folder_under_fsdp2_is_read_bit_for_bit() -> None:
    truth = json.loads((WRITTEN / "truth.json").read_text())
    found = load_checkpoint(WRITTEN)
    parameters = dict(found.model.named_parameters(remove_duplicate=False))
    for key, digest in truth.items():
        name, field = key.split("|")
        value = parameters[name] if field == "weight" else getattr(found.adam.moments[name], field)
        assert _digest(value) == digest, key
    assert (found.trainer_step, found.mapping.rule) == (3, "param_names stored in the file")
    outcome = run_command("inspect", WRITTEN)
    assert outcome.code == 0
    assert "FULL_STATE_DICT" in outcome.out
    assert "step 3" in outcome.out


@pytest.mark.parametrize("name", ["llama-untied", "llama-tied"])
def test_state_by_names_is_the_plain_folders(name: str, tmp_path: Path) -> None:
    model, optimizer, plain, expected = _pair(tmp_path, name)
    folder = _whole(model, optimizer, tmp_path / "whole")
    shutil.copy(plain / "trainer_state.json", folder)
    assert_equal(load_checkpoint(folder, base=plain), expected)


def test_delta_h1_is_that_of_the_plain_folder(tmp_path: Path) -> None:
    model, optimizer, plain, _ = _pair(tmp_path)
    folder = _whole(model, optimizer, tmp_path / "whole")
    write_rollouts(random_rollouts(6, 3), tmp_path / "rollouts.jsonl")
    found = []
    for path, base in ((folder, ("--base", plain)), (plain, ())):
        options = ("--rollouts", tmp_path / "rollouts.jsonl", "--no-noise", "--length-weight", "grpo", *base)
        outcome = run_command("run", path, *options, "--json", tmp_path / "report.json")
        assert outcome.code == 0, outcome.err
        report = json.loads((tmp_path / "report.json").read_text())
        found.append((report["first_order"], report["adamw"]))
    assert found[0] == found[1]


def test_what_wrappers_put_into_names_is_taken_out(tmp_path: Path) -> None:
    model, optimizer, plain, expected = _pair(tmp_path)
    folder = _whole(
        model, optimizer, tmp_path / "whole", lambda n: n.replace("layers.0.", "layers.0._checkpoint_wrapped_module.")
    )
    shutil.copy(plain / "trainer_state.json", folder)
    assert_equal(load_checkpoint(folder, base=plain), expected)


def test_a_tied_parameter_by_its_other_name(tmp_path: Path) -> None:
    model, optimizer, plain, expected = _pair(tmp_path, "llama-tied")
    folder = _whole(model, optimizer, tmp_path / "whole")
    saved = _by_names(model, optimizer, lambda n: n.replace("model.embed_tokens.weight", "lm_head.weight"))
    torch.save(saved, folder / "optimizer.bin")
    shutil.copy(plain / "trainer_state.json", folder)
    assert_equal(load_checkpoint(folder, base=plain), expected)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("safe", [True, False])
def test_save_state_without_fsdp(prefix: str, safe: bool, tmp_path: Path) -> None:
    """By index; under DDP names begin with "module."."""
    model, optimizer, plain, expected = _pair(tmp_path)
    folder = tmp_path / "checkpoint_0"
    folder.mkdir()
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    if safe:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    for rank in range(2):
        (folder / f"random_states_{rank}.pkl").write_bytes(b"")
    found = load_checkpoint(folder, base=plain)
    for name, moments in expected.adam.moments.items():
        assert torch.equal(found.adam.moments[name].exp_avg_sq, moments.exp_avg_sq)
    for name, p in expected.model.named_parameters():
        assert torch.equal(dict(found.model.named_parameters())[name], p)
    outcome = run_command("inspect", folder)
    assert outcome.code == 0, outcome.err
    assert "written by 2 ranks" in outcome.out


def test_without_a_configuration_inspect_lists_and_run_asks_for_a_base(tmp_path: Path) -> None:
    model, optimizer, plain, _ = _pair(tmp_path)
    folder = _whole(model, optimizer, tmp_path / "whole")
    write_rollouts(random_rollouts(4, 2), tmp_path / "rollouts.jsonl")
    outcome = run_command("inspect", folder)
    assert outcome.code == 0, outcome.err
    assert "model.layers.1.mlp.up_proj.weight" in outcome.out
    assert run_command("inspect", folder, "--base", plain).code == 0
    assert_refused(run_command("run", folder, "--rollouts", tmp_path / "rollouts.jsonl"), str(folder), "base")


def test_master_weights_go_before_narrower_safetensors(tmp_path: Path) -> None:
    model, optimizer, plain, expected = _pair(tmp_path)
    torch.save(model.state_dict(), plain / "pytorch_model_fsdp.bin")
    torch.save(_by_names(model, optimizer), plain / "optimizer.bin")
    (plain / "optimizer.pt").unlink()
    model.bfloat16().save_pretrained(plain)
    assert_equal(load_checkpoint(plain), expected)


def test_an_adapter_in_a_whole_file(tmp_path: Path) -> None:
    from peft import get_peft_model_state_dict

    make_checkpoint(tmp_path / "base")
    model = lora_model(tiny_model())
    optimizer = torch.optim.AdamW(hf_groups(model), lr=1e-3)
    ids = torch.randint(3, 11, (2, 6), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    folder = tmp_path / "whole"
    folder.mkdir()
    torch.save(get_peft_model_state_dict(model), folder / "pytorch_model_fsdp.bin")
    torch.save(_by_names(model, optimizer), folder / "optimizer.bin")
    assert_refused(run_command("inspect", folder, "--base", tmp_path / "base"), str(folder), "adapter_config.json")
    model.peft_config["default"].save_pretrained(folder)
    found = load_checkpoint(folder, base=tmp_path / "base")
    assert found.folder.kind == "lora"
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.equal(dict(found.model.named_parameters())[name], p)
            assert torch.equal(found.adam.moments[name].exp_avg, optimizer.state[p]["exp_avg"])


@pytest.mark.parametrize("file", ["optimizer.bin", "pytorch_model_fsdp.bin"])
@pytest.mark.parametrize("spoiled", ["truncated", "foreign", "planted"])
def test_damaged_files_are_refused_by_their_names_and_not_run(file: str, spoiled: str, tmp_path: Path) -> None:
    model, optimizer, plain, _ = _pair(tmp_path)
    folder = _whole(model, optimizer, tmp_path / "whole")
    planted = tmp_path / "planted"
    content = (folder / file).read_bytes()
    if spoiled == "truncated":
        (folder / file).write_bytes(content[: len(content) // 2])
    elif spoiled == "foreign":
        torch.save([1, 2], folder / file)
    else:
        torch.save({"state": {0: Malicious(planted)}, "param_groups": []}, folder / file)
    before = fingerprint(tmp_path)
    outcome = run_command("inspect", folder, "--base", plain)
    assert_refused(outcome, file)
    assert "\x1b" not in outcome.err
    assert fingerprint(tmp_path) == before
    pickle.loads(pickle.dumps(Malicious(planted)))
    assert planted.exists()


def test_a_state_of_no_group_is_refused(tmp_path: Path) -> None:
    model, optimizer, plain, _ = _pair(tmp_path)
    folder = _whole(model, optimizer, tmp_path / "whole")
    saved = _by_names(model, optimizer)
    saved["state"]["model.extra.weight"] = {}
    torch.save(saved, folder / "optimizer.bin")
    assert_refused(run_command("inspect", folder, "--base", plain), "optimizer.bin", "model.extra.weight")
    del saved["state"]["model.extra.weight"]
    saved["param_groups"][0]["params"].append(saved["param_groups"][1]["params"][0])
    torch.save(saved, folder / "optimizer.bin")
    assert_refused(run_command("inspect", folder, "--base", plain), "optimizer.bin", "twice")


def test_flat_parts_of_ranks_are_refused_by_name(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({}, tmp_path / f"pytorch_model_fsdp_rank{rank}.bin")
    assert_refused(run_command("inspect", tmp_path), "LOCAL_STATE_DICT")
