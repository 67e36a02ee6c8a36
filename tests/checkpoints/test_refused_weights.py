"""Damaged weights, configurations and adapters are refused by the real command: exit code 2, one line, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spoiled import NORM, Place, refuse, refuse_run
from support import (
    lora_model,
    make_checkpoint,
    run_command,
    save_checkpoint,
    tiny_model,
    trained_optimizer,
)


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Place], object]:
    def spoil(place: Place) -> None:
        path = place.checkpoint / name
        path.write_bytes(change(path.read_bytes()))

    return spoil


def _only_pickled_weights(place: Place) -> None:
    torch.save(load_file(place.weights), place.checkpoint / "pytorch_model.bin")
    place.weights.unlink()


def _edit_config(**settings: Any) -> Callable[[Place], object]:
    return _rewrite("config.json", lambda old: json.dumps(json.loads(old) | settings).encode())


def _remote_code(place: Place) -> None:
    """A configuration that names code of its own, which would leave a mark if it ran."""
    (place.checkpoint / "modeling.py").write_text("import pathlib; pathlib.Path('ran').touch()\n")
    auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    _edit_config(model_type="homemade", auto_map=auto_map)(place)


def _missing_shard(place: Place) -> None:
    tiny_model().save_pretrained(place.checkpoint, max_shard_size="5KB")
    place.weights.unlink(missing_ok=True)
    sorted(place.checkpoint.glob("model-*.safetensors"))[1].unlink()


WEIGHTS: dict[str, tuple[Callable[[Place], object], str]] = {
    "truncated": (_rewrite("model.safetensors", lambda old: old[:-100]), "checkpoint-3"),
    "cut-in-the-header": (_rewrite("model.safetensors", lambda old: old[:50]), "checkpoint-3"),
    "empty": (_rewrite("model.safetensors", lambda old: b""), "checkpoint-3"),
    "tensor-missing": (lambda place: place.edit_weights(lambda tensors: tensors.pop(NORM)), NORM),
    "tensor-too-many": (
        lambda place: place.edit_weights(lambda tensors: tensors.update(intruder=torch.zeros(2))),
        "intruder",
    ),
    "tensor-mis-shaped": (
        lambda place: place.edit_weights(lambda tensors: tensors.update({NORM: torch.ones(15)})),
        NORM,
    ),
    "tensor-nan": (
        lambda place: place.edit_weights(lambda tensors: tensors[NORM].fill_(float("nan"))),
        NORM,
    ),
    "only-pickled": (_only_pickled_weights, "pytorch_model.bin"),
    "no-weights": (lambda place: place.weights.unlink(), "no weights"),
    "missing-shard": (_missing_shard, "checkpoint-3"),
    "no-config": (lambda place: (place.checkpoint / "config.json").unlink(), "config.json"),
    "config-not-json": (_rewrite("config.json", lambda old: old[:-5]), "config.json"),
    "config-a-list": (_rewrite("config.json", lambda old: b"[1]"), "checkpoint-3"),
    "config-of-no-type": (_rewrite("config.json", lambda old: b"{}"), "checkpoint-3"),
    "config-of-unknown-type": (_edit_config(model_type="nonsense"), "checkpoint-3"),
    "config-of-an-encoder-decoder": (_edit_config(model_type="t5"), "checkpoint-3"),
    "config-of-a-wrong-value": (_edit_config(num_attention_heads=0), "checkpoint-3"),
    "config-with-code": (_remote_code, "checkpoint-3"),
    "trainer-state-not-json": (_rewrite("trainer_state.json", lambda old: b"{"), "trainer_state.json"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_damaged_weights_and_configurations_are_refused(name: str, place: Place) -> None:
    spoil, culprit = WEIGHTS[name]
    spoil(place)
    refuse_run(place, culprit)


def test_a_checkpoint_path_that_is_no_folder_is_refused(place: Place) -> None:
    for path in (place.root / "nowhere", place.rollouts):
        for command in (["run", path, "--rollouts", place.rollouts, "--json", "report.json"], ["inspect", path]):
            refuse(place, command, str(path), "not a folder")


def test_an_adapter_without_its_base_is_refused(place: Place) -> None:
    adapter = place.root / "adapter"
    model = lora_model(tiny_model())
    save_checkpoint(model, trained_optimizer(model), adapter)
    arguments = ["--rollouts", place.rollouts, "--json", "report.json"]
    refuse(place, ["run", adapter, *arguments], "as base", "adapter")
    refuse(place, ["run", adapter, "--base", place.root / "nowhere", *arguments], "nowhere")
    refuse(place, ["run", adapter, "--base", adapter, *arguments], "config.json")
    assert run_command("run", adapter, "--base", place.checkpoint, *arguments).code == 0


@pytest.mark.parametrize("damage", ["truncated", "pickled", "tensor-missing", "nan", "config", "another-base"])
def test_a_damaged_adapter_is_refused(damage: str, place: Place) -> None:
    adapter, base = place.root / "adapter", place.checkpoint
    model = lora_model(tiny_model())
    save_checkpoint(model, trained_optimizer(model), adapter)
    weights = adapter / "adapter_model.safetensors"
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    culprit = "adapter"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif damage == "pickled":
        torch.save(load_file(weights), adapter / "adapter_model.bin")
        weights.unlink()
    elif damage == "tensor-missing":
        save_file({name: t for name, t in load_file(weights).items() if name != key}, weights)
        culprit = key
    elif damage == "nan":
        save_file(load_file(weights) | {key: torch.full((16, 2), float("nan"))}, weights)
        culprit = "lora_B"
    elif damage == "config":
        (adapter / "adapter_config.json").write_text("{")
    else:
        base = make_checkpoint(place.root / "other", "gpt2")
    refuse(place, ["run", adapter, "--base", base, "--rollouts", place.rollouts, "--json", "report.json"], culprit)


def test_a_base_for_a_full_checkpoint_is_refused(place: Place) -> None:
    refuse_run(place, "base", options=["--base", str(place.checkpoint)])
