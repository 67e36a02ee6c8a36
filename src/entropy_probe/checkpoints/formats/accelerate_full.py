"""accelerate's whole folders: what FSDP's FULL_STATE_DICT leaves, by the Trainer too, and what ``save_state`` leaves alone.

``optimizer.bin`` is ``torch.save`` of a state_dict: by parameters' names under FSDP, else by index. Weights are in
``pytorch_model_fsdp.bin`` by the live model's names, in safetensors, or, where these were switched off, in
``pytorch_model.bin``. All are read with ``weights_only=True``. accelerate alone writes no configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor

from entropy_probe.checkpoints.files.optimizer_pt import INSIDE, read_optimizer_file
from entropy_probe.checkpoints.files.saved import dictionary, read_saved
from entropy_probe.checkpoints.files.stored import MappedTensor, StoredOptimizer, StoredTensor
from entropy_probe.checkpoints.files.trainer_state import TrainerState
from entropy_probe.checkpoints.formats.base import ADAM_STATE, FoundFile, StoredAdapter, StoredWeights, found_file
from entropy_probe.checkpoints.formats.trainer import (
    ADAPTER,
    ADAPTER_CONFIG,
    OPTIMIZER,
    TrainerFolder,
    adapter_without_config,
)
from entropy_probe.common.files import read_json
from entropy_probe.errors import InputError, some_of

WHOLE_OPTIMIZER = "optimizer.bin"
FSDP_WEIGHTS = "pytorch_model_fsdp.bin"
PICKLED_WEIGHTS = "pytorch_model.bin"
RANK = re.compile(r"(?:random_states|rng_state)_(\d+)\.(?:pkl|pth)")
"""The rank in the name of the file of its random state, the only one that every rank writes."""
WRAPPERS = ("module.", "_orig_mod.")
"""What DDP and torch.compile put before every name, outermost first."""
OF_MODEL = "torch.save of a model's state_dict"

TRAINER = TrainerFolder()


class AccelerateFull:
    """A folder whose Adam state, whose weights or both are in accelerate's .bin files."""

    name = "accelerate checkpoint in whole files (save_state, or FSDP's FULL_STATE_DICT)"

    def detects(self, path: Path) -> bool:
        """By optimizer.bin, or by FSDP's weights without others beside them."""
        if (path / OPTIMIZER).is_file():
            return False
        return (path / WHOLE_OPTIMIZER).is_file() or (_pickled(path) == FSDP_WEIGHTS and not _in_safetensors(path))

    def files(self, path: Path) -> tuple[FoundFile, ...]:
        """The Trainer's files, with accelerate's in the place of those that they replace."""
        found = {file.pattern: file for file in TRAINER.files(path)}
        found[OPTIMIZER] = found_file(path, WHOLE_OPTIMIZER, ADAM_STATE, required=True)
        pickled = _pickled(path)
        if pickled is not None:
            found["*.safetensors"] = found_file(path, pickled, "weights", required=True)
        return tuple(found.values())

    def world_size(self, path: Path) -> int | None:
        """By the files of the ranks' random states."""
        ranks = [int(named.group(1)) for file in path.iterdir() if (named := RANK.fullmatch(file.name))]
        return max(ranks) + 1 if ranks else None

    def configuration(self, path: Path) -> Path | None:
        """The folder itself, where it has config.json."""
        return TRAINER.configuration(path)

    def weights(self, path: Path) -> StoredWeights | None:
        """safetensors, or the .bin file where these are not there or narrower; None beside an adapter."""
        if (path / ADAPTER_CONFIG).is_file():
            return None
        pickled = _pickled(path)
        beside = TRAINER.weights(path)
        if pickled is None:
            return None if beside is None else _unwrapped(beside)
        tensors = _tensors(path / pickled)
        if _of_adapter(tensors) is not None:
            return None
        if beside is not None and not any(
            _wider(tensors[key], beside.tensors[key]) for key in tensors.keys() & beside.tensors
        ):
            return beside
        return StoredWeights(tensors)

    def adapter(self, path: Path) -> StoredAdapter | None:
        """As the Trainer's, or from the .bin file with adapter_config.json.

        Raises:
            InputError: an adapter's weights without its configuration.
        """
        pickled = _pickled(path)
        if pickled is None or (path / ADAPTER).is_file():
            return TRAINER.adapter(path)
        tensors = _tensors(path / pickled)
        found = _of_adapter(tensors)
        if found is None:
            return None
        if not (path / ADAPTER_CONFIG).is_file():
            raise InputError(adapter_without_config(path, found))
        return StoredAdapter(read_json(path / ADAPTER_CONFIG), tensors)

    def optimizer(self, path: Path) -> StoredOptimizer | None:
        """optimizer.bin; None where it is not there."""
        return read_optimizer_file(path / WHOLE_OPTIMIZER) if (path / WHOLE_OPTIMIZER).is_file() else None

    def trainer_state(self, path: Path) -> TrainerState:
        """trainer_state.json; empty where there is none."""
        return TRAINER.trainer_state(path)


def _pickled(path: Path) -> str | None:
    return next((name for name in (FSDP_WEIGHTS, PICKLED_WEIGHTS) if (path / name).is_file()), None)


def _in_safetensors(path: Path) -> bool:
    return any(path.glob("*.safetensors"))


def _tensors(file: Path) -> dict[str, StoredTensor]:
    """A state_dict's tensors by the live model's names.

    Raises:
        InputError: damaged, no state_dict, or parts of tensors.
    """
    content = dictionary(read_saved(file, OF_MODEL), of=OF_MODEL)
    wrong = [str(key) for key, value in content.items() if not isinstance(value, Tensor) or isinstance(value, DTensor)]
    if wrong or not content:
        raise InputError(f"{file} holds {some_of(wrong) or 'nothing'} that is no whole tensor; expected {OF_MODEL}")
    return _renamed({str(key): MappedTensor.of(value) for key, value in content.items()})


def _renamed(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    found = dict(tensors)
    for prefix in WRAPPERS:
        if found and all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): tensor for key, tensor in found.items()}
    return {INSIDE.sub("", key): tensor for key, tensor in found.items()}


def _unwrapped(weights: StoredWeights) -> StoredWeights:
    """``save_state`` keeps what DDP puts before the names, which transformers does not know."""
    renamed = _renamed(weights.tensors)
    return weights if renamed.keys() == weights.tensors.keys() else StoredWeights(renamed)


def _wider(one: StoredTensor, other: StoredTensor) -> bool:
    return one.dtype.is_floating_point and one.dtype.itemsize > other.dtype.itemsize


def _of_adapter(tensors: Mapping[str, StoredTensor]) -> str | None:
    """The first key that only an adapter has."""
    return next((key for key in tensors if ".lora_" in key or key.startswith("base_model.model.")), None)
