"""Quantised weights are refused by their method's name; an adapter over another base than its quantised one is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from entropy_probe import InputError
from entropy_probe.checkpoints import load_checkpoint, load_model, quantisation
from entropy_probe.checkpoints.quantisation import quantisation_of, quantised_base_note
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

METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "bnb-4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "bitsandbytes 4-bit nf4",
    ),
    "bnb-8": ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes 8-bit"),
    "bnb-old": ({"load_in_4bit": True}, "bitsandbytes 4-bit"),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq 4-bit"),
    "awq": ({"quant_method": "awq", "w_bit": 4}, "awq 4-bit"),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8 dynamic"),
    "mxfp4": ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "mxfp4"),
    "compressed": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
        },
        "compressed-tensors 8-bit pack-quantized",
    ),
    "torchao": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
        "torchao Int4WeightOnlyConfig",
    ),
    "nameless": ({"bits": 3}, "by a method that quantization_config does not name 3-bit"),
}


def configure(folder: Path, **changed: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_told_from_the_configuration(method: str, tmp_path: Path) -> None:
    settings, expected = METHODS[method]
    for config in ({"quantization_config": settings}, {"text_config": {"quantization_config": settings}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert quantisation_of(tmp_path) == expected


def test_a_configuration_without_a_method_is_of_no_quantised_model(tmp_path: Path) -> None:
    assert quantisation_of(tmp_path) is None
    for config in ({}, {"quantization_config": None}, {"quantization_config": {}}, {"text_config": {"hidden_size": 4}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert quantisation_of(tmp_path) is None


@pytest.mark.parametrize("value", ["fp8", False, ["gptq"]])
def test_a_quantization_config_that_is_no_object_is_told_in_one_line(value: object, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "checkpoint")
    configure(path, quantization_config=value)
    outcome = run_command("inspect", path)
    assert (outcome.code, len(outcome.lines)) == (2, 1)
    assert f"config.json: quantization_config is {value!r}; expected an object" in outcome.err


def test_every_command_refuses_a_quantised_base_before_a_weight_is_read(tmp_path: Path) -> None:
    base = tiny_model("llama-untied")
    base.save_pretrained(tmp_path / "base")
    model = lora_model(base)
    adapter = save_checkpoint(model, trained_optimizer(model), tmp_path / "checkpoint-3")
    after = save_checkpoint(model, trained_optimizer(model, steps=4), tmp_path / "checkpoint-4", step=4)
    configure(tmp_path / "base", quantization_config=METHODS["bnb-4"][0])
    # Nothing of it could be read.
    (tmp_path / "base" / "model.safetensors").write_bytes(b"not weights")
    rollouts, given = tmp_path / "rollouts.jsonl", ["--base", tmp_path / "base"]
    write_rollouts(random_rollouts(), rollouts)
    (tmp_path / "prompts.jsonl").write_text('{"prompt_ids": [4]}\n')
    commands = [
        *(["run", adapter, "--rollouts", rollouts, "--dtype", dtype] for dtype in ("float32", "bfloat16", "float64")),
        ["replay", adapter, after, "--rollouts", rollouts, "--length-weight", "grpo"],
        ["sample", adapter, "--prompts", tmp_path / "prompts.jsonl", "--reward", "math:sqrt", "--responses", "2",
         "--out", tmp_path / "out.jsonl"],
        ["inspect", adapter],
    ]  # fmt: skip
    for command in commands:
        outcome = run_command(*command, *given)
        assert outcome.code == 2, (command, outcome.err)
        assert outcome.lines == [outcome.lines[0]]
        assert f"{tmp_path / 'base'} is quantised (bitsandbytes 4-bit nf4)" in outcome.err


def test_a_null_setting_is_no_quantisation(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "checkpoint")
    configure(path, quantization_config=None)
    assert load_checkpoint(path).adam.moments


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_weights_of_packed_numbers_without_a_setting_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "checkpoint")
    weights = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(dtype)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"quantised weights \({name} is of type .*no quantization_config"):
        load_model(path)


STORED_KEYS = {
    "model.layers.0.mlp.up_proj.weight_packed": (torch.int32, "compressed-tensors"),
    "model.layers.0.mlp.up_proj.weight_scale": (torch.bfloat16, "compressed-tensors"),
    "model.layers.0.mlp.up_proj.qweight": (torch.int32, "GPTQ or AWQ"),
    "model.layers.0.mlp.up_proj.qzeros": (torch.int32, "GPTQ or AWQ"),
    "model.layers.0.mlp.experts.gate_up_proj_blocks": (torch.uint8, "MXFP4"),
    "model.layers.0.mlp.experts.gate_up_proj_scales": (torch.uint8, "MXFP4"),
    "model.layers.0.mlp.up_proj.weight.absmax": (torch.float32, "bitsandbytes"),
    "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4": (torch.uint8, "bitsandbytes"),
    "model.layers.0.mlp.up_proj.SCB": (torch.float32, "bitsandbytes"),
    "model.layers.0.mlp.up_proj.weight_scale_inv": (torch.float32, "FP8 in blocks"),
    "model.layers.0.mlp.experts.gate_up_proj": (torch.float8_e4m3fn, "is of type F8_E4M3"),
}


@pytest.mark.parametrize("key", STORED_KEYS)
def test_what_only_quantised_weights_have_is_refused_by_its_name_without_a_setting(key: str, tmp_path: Path) -> None:
    dtype, told = STORED_KEYS[key]
    path = make_checkpoint(tmp_path / "checkpoint")
    weights = load_file(path / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    weights[key] = torch.zeros(4, dtype=torch.uint8).to(dtype)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"quantised weights \({re.escape(key)}.*{told}.*no quantization_config"):
        load_model(path)


def test_scales_of_floats_are_no_sign_of_packed_weights(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "checkpoint")
    weights = load_file(path / "model.safetensors")
    weights["model.layers.0.mlp.layer_scales"] = torch.ones(4)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"unexpected keys: model\.layers\.0\.mlp\.layer_scales"):
        load_model(path)


def test_a_header_that_cannot_be_read_is_memory_that_ran_out_or_left_to_where_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint(tmp_path / "checkpoint")
    says = ""

    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError(says)

    monkeypatch.setattr(quantisation, "safe_open", fail)
    says = "unable to mmap 96 bytes from file <model.safetensors>: Cannot allocate memory (12)"
    outcome = run_command("inspect", path)
    assert (outcome.code, len(outcome.lines)) == (1, 1)
    assert "memory ran out" in outcome.err
    says = "unable to mmap 96 bytes from file <model.safetensors>: Invalid argument (22)"
    (path / "model.safetensors").write_bytes(b"damaged")
    outcome = run_command("inspect", path)
    assert (outcome.code, len(outcome.lines)) == (2, 1)
    assert "cannot be read" in outcome.err


NAMES = {
    "unsloth/Some-Model-unsloth-bnb-4bit": "a 4-bit base",
    "Org/Model-GPTQ-Int8": "an 8-bit base",
    "Org/Model-AWQ": "a quantised base",
    "org/model.Q4_K_M.gguf": "a quantised base",
    "org/model-w4a16": "a 4-bit base",
    "org/model-nf4": "a 4-bit base",
    "org/model-FP8-dynamic": "an 8-bit base",
    "org/print8-model": None,
    "google/gemma-3-4b-it-qat-q4_0-unquantized": None,
    "org/model-dequantized-fp8-to-bf16": None,
    "org/Model-NF4-Dequantised": None,
    "/data/quantized-study/llama/": None,
    "C:\\quantized\\llama": None,
    "gguf-org/llama": None,
    "/data/study/llama-4bit/": "a 4-bit base",
    "/cache/hub/models--org--llama-bnb-4bit/snapshots/0fa1": "a 4-bit base",
    "org/llama-4bit--final": "a 4-bit base",
    "/": None,
    "org/Llama-3-8B-bf16": None,
    "org/awqward-habits": None,
    None: None,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_base_is_taken_for_quantised_by_whole_words_of_its_name(name: str | None, tmp_path: Path) -> None:
    settings = {"base_model_name_or_path": name}
    note, expected = quantised_base_note(tmp_path, settings, tmp_path / "base"), NAMES[name]
    assert (note is None) == (expected is None)
    if note is not None:
        assert note.code == "quantised_base"
        assert f"trained over {expected} ({name}" in note.seen


def test_the_named_folder_itself_is_no_other_base_and_a_quantised_one_is_by_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    for name in ("base-4bit", "packed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    configure(tmp_path / "packed", quantization_config=METHODS["gptq"][0])
    adapter, given = tmp_path / "adapter", tmp_path / "base-4bit"
    assert quantised_base_note(adapter, {"base_model_name_or_path": "../base-4bit"}, given) is None
    note = quantised_base_note(adapter, {"base_model_name_or_path": "../packed"}, given)
    assert note is not None
    assert "a 4-bit base (../packed, by its configuration: gptq 4-bit)" in note.seen


def test_run_replay_sample_and_inspect_say_that_the_base_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "level_rewards.py").write_text("def one(prompt, response, row):\n    return 1.0\n")
    base = tiny_model("llama-untied")
    base.save_pretrained(tmp_path / "base")
    model = lora_model(base)
    optimizer = trained_optimizer(model)
    before = save_checkpoint(model, optimizer, tmp_path / "checkpoint-3")
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    optimizer.step()
    after = save_checkpoint(model, optimizer, tmp_path / "checkpoint-4", step=4)
    for folder in (before, after):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "a/b-bnb-4bit"}))
    rollouts, base_option = tmp_path / "rollouts.jsonl", ["--base", tmp_path / "base"]
    write_rollouts(random_rollouts(), rollouts)
    (tmp_path / "prompts.jsonl").write_text('{"prompt_ids": [4]}\n')
    written = tmp_path / "report.json"
    for command in (
        ["run", before, "--rollouts", rollouts, "--no-noise", "--json", written],
        ["replay", before, after, "--rollouts", rollouts, "--length-weight", "grpo", "--json", written],
    ):
        outcome = run_command(*command, *base_option)
        assert outcome.code == 0, outcome.err
        assert "quantised_base" in {warning["code"] for warning in json.loads(written.read_text())["warnings"]}
        written.unlink()
    sampled = run_command(
        "sample", before, "--prompts", tmp_path / "prompts.jsonl", "--reward", "level_rewards:one", "--responses", "2",
        "--max-new-tokens", "2", "--out", tmp_path / "out.jsonl", *base_option,
    )  # fmt: skip
    for outcome in (sampled, run_command("inspect", before, *base_option)):
        assert "trained over a 4-bit base (a/b-bnb-4bit" in " ".join(outcome.out.split()), outcome
