"""A folder's format is found in one place; what one process reads from accelerate's shards is what the plain files hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

import toy_format
from entropy_probe.checkpoints import load_adam_state, load_checkpoint
from entropy_probe.checkpoints.files.distributed import DistributedFolder
from entropy_probe.checkpoints.formats import registry
from entropy_probe.checkpoints.formats.accelerate_sharded import MODEL_FOLDER, OPTIMIZER_FOLDER
from entropy_probe.data.rollouts import write_rollouts
from entropy_probe.errors import InputError
from support import (
    assert_equal,
    assert_same_moments,
    lora_model,
    make_checkpoint,
    random_rollouts,
    run_command,
    save_checkpoint,
    save_in_shards,
    tiny_model,
    trained_optimizer,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def both(root: Path, model: Any, optimizer: torch.optim.Optimizer, base: Any) -> tuple[Path, Path, Path]:
    """The same state as plain files and in shards, and the base that the shards want."""
    base.save_pretrained(root / "base")
    return (
        save_checkpoint(model, optimizer, root / "plain"),
        save_in_shards(model, optimizer, root / "shards"),
        root / "base",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_one_process_reads_from_shards_what_the_plain_files_hold(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model(family)
    plain, shards, base = both(tmp_path, model, trained_optimizer(model, amsgrad=True), tiny_model(family, seed=5))
    assert_equal(load_checkpoint(shards, base=base, dtype=dtype), load_checkpoint(plain, dtype=dtype))


@pytest.mark.parametrize("family", ["llama-tied", "mixtral"])
def test_one_process_reads_an_adapter_from_shards_over_whatever_base_transformers_loads(
    family: str, tmp_path: Path
) -> None:
    base = tiny_model(family)
    base.save_pretrained(tmp_path / "base")
    model = lora_model(base)
    optimizer = trained_optimizer(model)
    plain = save_checkpoint(model, optimizer, tmp_path / "plain")
    shards = save_in_shards(model, optimizer, tmp_path / "shards")
    found = load_checkpoint(shards, base=tmp_path / "base")
    assert found.folder.kind == "lora"
    assert_equal(found, load_checkpoint(plain, base=tmp_path / "base"))


def test_each_part_may_be_in_shards_alone_and_plain_files_are_preferred(tmp_path: Path) -> None:
    model = tiny_model()
    plain, shards, _ = both(tmp_path, model, trained_optimizer(model), tiny_model())
    expected = load_checkpoint(plain)
    for replaced, folder in (("model.safetensors", MODEL_FOLDER), ("optimizer.pt", OPTIMIZER_FOLDER)):
        mixed = shutil.copytree(plain, tmp_path / folder)
        shutil.copytree(shards / folder, mixed / folder)
        # Beside the plain file the shards are an earlier run's.
        data = next((mixed / folder).glob("*.distcp"))
        kept = data.read_bytes()
        data.write_bytes(b"")
        assert_equal(load_checkpoint(mixed), expected)
        data.write_bytes(kept)
        (mixed / replaced).unlink()
        assert_equal(load_checkpoint(mixed), expected)


def test_every_command_of_one_process_takes_shards(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = trained_optimizer(model)
    plain, shards, base = both(tmp_path, model, optimizer, tiny_model())
    rollouts = tmp_path / "rollouts.jsonl"
    write_rollouts(random_rollouts(4, 2), rollouts)
    reports = []
    for name, given in (("plain", [plain]), ("shards", [shards, "--base", base])):
        outcome = run_command("run", *given, "--rollouts", rollouts, "--json", tmp_path / f"{name}.json")
        assert outcome.code == 0, outcome.err
        reports.append(json.loads((tmp_path / f"{name}.json").read_text()))
    for section in ("first_order", "units", "realized", "adamw"):
        assert reports[0][section] == reports[1][section], section
    outcome = run_command("inspect", shards, "--base", base)
    assert outcome.code == 0, outcome.err
    said = " ".join(outcome.out.split())
    assert "format: accelerate checkpoint in shards (FSDP's SHARDED_STATE_DICT), step 3, written by 1 rank" in said
    assert f"{OPTIMIZER_FOLDER}/__0_0.distcp" in said
    assert "MISSING" not in said
    # A step along no gradient of these rows: what is asked is that both checkpoints are read, Adam's state after it too.
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    later = save_in_shards(model, optimizer, tmp_path / "later", step=4)
    outcome = run_command(
        "replay", shards, later, "--base", base, "--rollouts", rollouts, "--length-weight", "grpo",
        "--max-grad-norm", "1.0", "--json", tmp_path / "replay.json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "replay.json").read_text())["gradient"] is not None


def test_a_format_in_one_file_is_inspected_and_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_checkpoint(tmp_path / "plain")
    folder = toy_format.write(plain, tmp_path / "run" / "toy-9")
    rollouts = tmp_path / "rollouts.jsonl"
    write_rollouts(random_rollouts(4, 2), rollouts)
    refused = run_command("inspect", folder)
    assert (refused.code, len(refused.lines)) == (2, 1)
    assert "is no checkpoint that is read" in refused.err
    monkeypatch.setattr(registry, "FORMATS", (toy_format.Toy(), *registry.FORMATS))
    outcome = run_command("inspect", folder)
    assert outcome.code == 0, outcome.err
    assert "format: toy of the tests, step 3, written by 7 ranks" in outcome.out
    reports = []
    for given in (plain, folder):
        outcome = run_command("run", given, "--rollouts", rollouts, "--json", tmp_path / "report.json")
        assert outcome.code == 0, outcome.err
        reports.append(json.loads((tmp_path / "report.json").read_text()))
    for section in ("first_order", "units", "realized", "adamw"):
        assert reports[0][section] == reports[1][section], section
    assert reports[1]["checkpoint"]["trainer_step"] == 3
    around = run_command("inspect", tmp_path / "run")
    assert "holds toy-9; give that" in around.err


def test_an_optimizer_of_other_names_is_not_matched_by_shapes(tmp_path: Path) -> None:
    model = tiny_model()
    _, shards, base = both(tmp_path, model, trained_optimizer(model), tiny_model())
    with pytest.raises(InputError, match=r"trains what the model does not: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_checkpoint(shards, base=base, freeze=["layers.1.mlp.up_proj"])


def test_adams_state_is_loaded_from_a_path_in_text(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "checkpoint")
    loaded = load_checkpoint(path)
    found, _ = load_adam_state(str(path / "optimizer.pt"), loaded.model)
    assert_same_moments(found, loaded.adam)


def test_rows_of_shards_are_read_without_a_process_group_and_a_lost_part_is_told(tmp_path: Path) -> None:
    weight = torch.arange(42.0).view(7, 6)
    save({"weight": weight}, storage_writer=FileSystemWriter(tmp_path / "shards"), no_dist=True)
    folder = DistributedFolder.open(tmp_path / "shards")
    stored = folder.tensors()["weight"]
    assert (stored.shape, stored.dtype) == ((7, 6), torch.float32)
    for rows in (slice(0, 7), slice(2, 5), slice(6, 7), slice(7, 7)):
        assert torch.equal(stored.read(rows), weight[rows])
    record: Any = folder.metadata.state_dict_metadata["weight"]
    record.chunks[0].sizes = torch.Size([3, 6])
    assert torch.equal(stored.read(slice(0, 3)), weight[:3])
    with pytest.raises(InputError, match="damaged or incomplete: 6 of 12 elements of weight are there"):
        stored.read(slice(2, 4))
