"""accelerate's sharded folders, as the Trainer leaves them under FSDP with SHARDED_STATE_DICT.

``pytorch_model_fsdp_0/`` holds ``{"model": state_dict}``, ``optimizer_0/`` ``{"optimizer": {"state": {name: …},
"param_groups": […]}}``, both flattened to keys such as ``optimizer.state.<name>.exp_avg``, in the live model's names. There is
no configuration beside them. What is not in shards is as in the Trainer's other folders.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from entropy_probe.checkpoints.files.distributed import DistributedFolder
from entropy_probe.checkpoints.files.stored import StoredOptimizer, StoredTensor
from entropy_probe.checkpoints.files.trainer_state import TrainerState
from entropy_probe.checkpoints.formats.base import FoundFile, StoredAdapter, StoredWeights, found_file
from entropy_probe.checkpoints.formats.trainer import (
    ADAPTER_CONFIG,
    OPTIMIZER,
    TrainerFolder,
    adapter_without_config,
)
from entropy_probe.common.files import read_json
from entropy_probe.errors import InputError

MODEL_FOLDER = "pytorch_model_fsdp_0"
OPTIMIZER_FOLDER = "optimizer_0"
RANK = re.compile(r"__(\d+)_\d+\.distcp")
"""The rank in the name of a file that it wrote."""

TRAINER = TrainerFolder()


class AccelerateSharded:
    """A folder whose weights, whose Adam state or both are in accelerate's shards."""

    name = "accelerate checkpoint in shards (FSDP's SHARDED_STATE_DICT)"

    def detects(self, path: Path) -> bool:
        """By a folder of shards that holds what no file beside it does."""
        return _weights_in_shards(path) or _optimizer_in_shards(path)

    def files(self, path: Path) -> tuple[FoundFile, ...]:
        """The Trainer's files, and the shards in the place of those that they replace."""
        found = {file.pattern: file for file in TRAINER.files(path)}
        for inside, purpose, replaced, used in (
            (MODEL_FOLDER, "weights in shards", "*.safetensors", _weights_in_shards(path)),
            (OPTIMIZER_FOLDER, "Adam state in shards", OPTIMIZER, _optimizer_in_shards(path)),
        ):
            if used:
                found[replaced] = found_file(path, f"{inside}/*.distcp", purpose, required=True)
        return tuple(found.values())

    def world_size(self, path: Path) -> int | None:
        """Every rank writes files under its number."""
        files = (file for inside in (MODEL_FOLDER, OPTIMIZER_FOLDER) for file in (path / inside).glob("*.distcp"))
        ranks = [int(named.group(1)) for file in files if (named := RANK.fullmatch(file.name))]
        return max(ranks) + 1 if ranks else None

    def configuration(self, path: Path) -> Path | None:
        """The folder itself, where someone has put config.json into it."""
        return TRAINER.configuration(path)

    def weights(self, path: Path) -> StoredWeights | None:
        """The shards, or safetensors beside them; None beside an adapter, whose weights these then are."""
        if (path / ADAPTER_CONFIG).is_file():
            return None
        return StoredWeights(_model_tensors(path)) if _weights_in_shards(path) else TRAINER.weights(path)

    def adapter(self, path: Path) -> StoredAdapter | None:
        """The shards with adapter_config.json.

        Raises:
            InputError: they are an adapter's, and its configuration is not there.
        """
        if not _weights_in_shards(path):
            return TRAINER.adapter(path)
        tensors = _model_tensors(path)
        if (path / ADAPTER_CONFIG).is_file():
            return StoredAdapter(read_json(path / ADAPTER_CONFIG), tensors)
        found = next((key for key in tensors if "lora_" in key or key.startswith("base_model.model.")), None)
        if found is not None:
            raise InputError(adapter_without_config(path, found))
        return None

    def optimizer(self, path: Path) -> StoredOptimizer | None:
        """The shards, or optimizer.pt beside them.

        Raises:
            InputError: the folder is not an optimizer's, or damaged.
        """
        return _optimizer(path / OPTIMIZER_FOLDER) if _optimizer_in_shards(path) else TRAINER.optimizer(path)

    def trainer_state(self, path: Path) -> TrainerState:
        """trainer_state.json; empty where there is none."""
        return TRAINER.trainer_state(path)


def _weights_in_shards(path: Path) -> bool:
    return (path / MODEL_FOLDER).is_dir() and not any(path.glob("*.safetensors"))


def _optimizer_in_shards(path: Path) -> bool:
    return (path / OPTIMIZER_FOLDER).is_dir() and not (path / OPTIMIZER).is_file()


def _model_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors under ``model.``, where accelerate puts them, or as they are."""
    stored = DistributedFolder.open(path / MODEL_FOLDER).tensors()
    # A causal language model has names outside "model." too, its head's for one, or is itself called otherwise.
    wrapped = all(key.startswith("model.") for key in stored)
    return {key.removeprefix("model.") if wrapped else key: tensor for key, tensor in stored.items()}


def _optimizer(path: Path) -> StoredOptimizer:
    folder = DistributedFolder.open(path)
    prefix = "optimizer." if any(key.startswith("optimizer.") for key in folder.keys) else ""
    of_groups, of_state = f"{prefix}param_groups.", f"{prefix}state."
    settings: dict[int, dict[str, Any]] = {}
    for key, value in folder.settings([key for key in folder.keys if key.startswith(of_groups)]).items():
        number, _, name = key.removeprefix(of_groups).partition(".")
        if number.isdecimal() and name:
            settings.setdefault(int(number), {})[name] = value
    if not settings or not all(isinstance(group.get("params"), list) for group in settings.values()):
        raise InputError(f"{path} holds no groups with their parameters' names; expected accelerate's optimizer folder")
    groups = [settings[number] for number in sorted(settings)]
    index = {str(name): number for number, name in enumerate(name for group in groups for name in group["params"])}
    state: dict[int, dict[str, StoredTensor]] = {}
    for key, tensor in folder.tensors().items():
        name, _, field = key.removeprefix(of_state).rpartition(".")
        if key.startswith(of_state) and name in index:
            state.setdefault(index[name], {})[field] = tensor
    indexed = [
        {
            **group,
            "params": [index[str(name)] for name in group["params"]],
            "param_names": [str(name) for name in group["params"]],
        }
        for group in groups
    ]
    return StoredOptimizer(path, indexed, state, exact_names=True)
