"""PEFT adapters in checkpoint folders: where their base is, and their weights around it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from entropy_probe.checkpoints.adapter_fit import does_not_fit, why_not_loaded
from entropy_probe.checkpoints.distributed_folders import MODEL_FOLDER, DistributedFolder, keeps_weights_distributed
from entropy_probe.common.files import read_json
from entropy_probe.errors import InputError, out_of_memory, some_of
from entropy_probe.model.input_limits import input_limits

LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)


def base_folder(path: Path, base: Path | None) -> Path:
    """The given base, or the one that the adapter in ``path`` names.

    Raises:
        InputError: it is no folder.
    """
    if base is not None:
        if not base.is_dir():
            raise InputError(f"base {base} is not a folder; expected the base model's folder")
        return base
    named = read_json(path / "adapter_config.json").get("base_model_name_or_path")
    if isinstance(named, str) and named:
        for candidate in (Path(os.path.normpath(path / named)), Path(named)):
            if candidate.is_dir():
                return candidate
    raise InputError(
        f"{path} is an adapter over {named!r}, which is not a folder here; give the base model's folder as base"
    )


def load_adapter(path: Path, model: Any, trainable: bool) -> Any:
    """The model with the PEFT adapter of a folder around it, in the types as stored.

    Raises:
        InputError: no safetensors, no PEFT here, or weights that do not fit the model.
    """
    weights = path / "adapter_model.safetensors"
    if not weights.is_file():
        raise InputError(f"{path} has no adapter_model.safetensors; pickled adapters are not loaded")
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise InputError(f"{path} is a PEFT adapter; install it with: pip install 'entropy-probe[lora]'") from error
    try:
        with safe_open(weights, framework="pt") as file:
            stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
        adapted = PeftModel.from_pretrained(
            model, path, is_trainable=trainable, autocast_adapter_dtype=False, local_files_only=True
        )
    except (*LOAD_ERRORS, TypeError) as error:
        if out_of_memory(error):
            raise
        raise InputError(why_not_loaded(path, error, input_limits(model)[0])) from error
    expected = {
        key: tuple(value.shape)
        for key, value in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
    }
    for key, shape in expected.items():
        if key not in stored:
            raise InputError(f"{path}: adapter weight {key} is missing; the file is truncated or of another base")
        if stored[key] != shape:
            raise InputError(does_not_fit(path, key, stored[key], shape, input_limits(model)[0]))
    return adapted


def refuse_adapter_without_config(path: Path) -> None:
    """Refuse an adapter's weights without its configuration, which the Trainer leaves out of what accelerate writes in shards.

    Raises:
        InputError: they are such.
    """
    adapter: str | None = None
    if (path / "adapter_model.safetensors").is_file() and not (path / "config.json").is_file():
        adapter = "adapter_model.safetensors"
    elif keeps_weights_distributed(path):
        keys = DistributedFolder.open(path / MODEL_FOLDER).tensors()
        adapter = next((key for key in keys if "lora_" in key or "base_model.model." in key), None)
    if adapter is not None:
        raise InputError(
            f"{path} holds an adapter's weights ({adapter}) and no adapter_config.json; write it there from the model that was "
            'trained: model.peft_config["default"].save_pretrained(folder)'
        )


def refuse_adapter_inside(path: Path) -> None:
    """Refuse a folder whose adapter is in a folder of its name, as PEFT keeps those that are not called "default".

    Raises:
        InputError: it is such.
    """
    inside = sorted(file.parent.name for file in path.glob("*/adapter_config.json"))
    if inside and (path / "optimizer.pt").is_file():
        raise InputError(
            f"{path} keeps its adapter in {some_of(inside)}/, as PEFT does with adapters that have a name; copy "
            f"adapter_config.json and adapter_model.safetensors from {inside[0]}/ beside optimizer.pt"
        )
