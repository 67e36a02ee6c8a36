"""verl's folders of FSDP ranks' files, FSDP1 and FSDP2, full or LoRA; SkyRL and AReaL write files of the same names.

``global_step_N/actor/`` (SkyRL: ``policy/``) holds ``model_world_size_W_rank_R.pt`` and ``optim_world_size_W_rank_R.pt``, with
configuration and tokenizer in ``huggingface/``. AReaL keeps weights in safetensors beside ``optim_world_size_W_rank_R.pt``.
Model files hold DTensors by name. FSDP2's optimizer counts parameters in the order of ``named_parameters``, FSDP1's counts flat
units (:mod:`~entropy_probe.checkpoints.files.flat_units`); both count frozen ones, which have no state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entropy_probe.checkpoints.files.flat_units import LEAF
from entropy_probe.checkpoints.files.rank_files import RankFiles, world_size
from entropy_probe.checkpoints.files.rank_optimizer import RankOptimizer
from entropy_probe.checkpoints.files.stored import StoredOptimizer, StoredTensor
from entropy_probe.checkpoints.files.trainer_state import TrainerState, read_trainer_state
from entropy_probe.checkpoints.formats.base import ADAM_STATE, FoundFile, StoredAdapter, StoredWeights, found_file
from entropy_probe.checkpoints.formats.trainer import ADAPTER_CONFIG, CONFIG, OPTIMIZER, TrainerFolder
from entropy_probe.common.files import read_json
from entropy_probe.errors import InputError, some_of

INNER = ("actor", "policy")
"""The policy's folder in a step's: verl's and SkyRL's."""

LATEST = ("latest_checkpointed_iteration.txt", "latest_ckpt_global_step.txt")
"""Where verl and SkyRL say in a run's folder which step was saved last."""

STEP = re.compile(r"global_?step_?(\d+)")
LORA_SETTINGS = "lora_train_meta.json"
PEFT = "base_model.model."

TRAINER = TrainerFolder()


class FsdpRanks:
    """A run's folder, a step's, or the policy's inside it."""

    name = "verl checkpoint (files of FSDP ranks, as SkyRL and AReaL write them too)"

    def detects(self, path: Path) -> bool:
        """By ranks' files, in the folder or in the one inside it that the run names."""
        return _ranks_folder(path) is not None and not (path / OPTIMIZER).is_file()

    def files(self, path: Path) -> tuple[FoundFile, ...]:
        """The ranks' files, and what lies beside them."""
        folder = _inner(path)
        inside = "" if folder == path else f"{folder.relative_to(path)}/"
        in_files = bool(list(folder.glob("model_world_size_*_rank_*.pt")))
        weights = "model_world_size_*_rank_*.pt" if in_files else "*.safetensors"
        return (
            found_file(path, f"{inside}**/{CONFIG}", "architecture", required=False),
            found_file(path, f"{inside}{weights}", "weights", required=True),
            found_file(path, f"{inside}optim_world_size_*_rank_*.pt", ADAM_STATE, required=True),
            found_file(path, f"{inside}{LORA_SETTINGS}", "LoRA's settings", required=False),
            found_file(path, f"{inside}**/tokenizer_config.json", "tokenizer", required=False),
        )

    def world_size(self, path: Path) -> int | None:
        """Every file names it."""
        folder = _inner(path)
        sizes = [world_size(folder, kind) for kind in ("model", "optim")]
        if None not in sizes and sizes[0] != sizes[1]:
            raise InputError(
                f"{folder} holds the model of {sizes[0]} ranks and the optimizer of {sizes[1]}; leave one step's"
            )
        return sizes[0] or sizes[1]

    def configuration(self, path: Path) -> Path | None:
        """``huggingface/``, or the folder itself."""
        folder = _inner(path)
        return next((place for place in (folder / "huggingface", folder, path) if (place / CONFIG).is_file()), None)

    def weights(self, path: Path) -> StoredWeights | None:
        """The whole model's; of LoRA's the base's, None where the adapter alone was saved."""
        model = _model(path)
        if model is None:
            places = (
                place for place in (_inner(path), _inner(path) / "huggingface") if any(place.glob("*.safetensors"))
            )
            return next((TRAINER.weights(place) for place in places), None)
        if not _is_adapted(model):
            return StoredWeights(model)
        base = {_base_name(key): tensor for key, tensor in model.items() if not LEAF.match(key)}
        return StoredWeights(base) if base else None

    def adapter(self, path: Path) -> StoredAdapter | None:
        """LoRA's tensors, with settings from the file that verl writes; target modules are in the names.

        Raises:
            InputError: no settings are there.
        """
        model = _model(path)
        if model is None or not _is_adapted(model):
            return None
        tensors = {key: tensor for key, tensor in model.items() if LEAF.match(key)}
        return StoredAdapter(_lora_settings(_inner(path), tensors), tensors)

    def optimizer(self, path: Path) -> StoredOptimizer | None:
        """The ranks' state, by names where the model's files tell them.

        Raises:
            InputError: damaged, of several checkpoints, or flat units of no known wrapping.
        """
        self.world_size(path)
        folder = _inner(path)
        files = RankFiles.open(folder, "optim")
        return None if files is None else RankOptimizer(folder, files).stored()

    def trainer_state(self, path: Path) -> TrainerState:
        """The step in the folder's name, or in that of the one around it."""
        folder = _inner(path)
        found = read_trainer_state(folder)
        named = [STEP.search(place.name) for place in (folder.resolve(), folder.resolve().parent)]
        steps = [int(match[1]) for match in named if match is not None]
        return TrainerState(steps[0], ()) if found.global_step is None and steps else found


def _ranks_folder(path: Path) -> Path | None:
    """The folder of the policy's files: the given one, or inside a step's or a run's."""
    for inner in (path, *(path / name for name in INNER)):
        if any(any(inner.glob(f"{kind}_world_size_*_rank_*.pt")) for kind in ("model", "optim")):
            return inner
    steps = [path / f"global_step_{(path / name).read_text().strip()}" for name in LATEST if (path / name).is_file()]
    if not steps:
        steps = [step for step in path.glob("global_step_*") if step.is_dir()]
    return _ranks_folder(steps[0]) if len(steps) == 1 and steps[0].is_dir() else None


def _inner(path: Path) -> Path:
    found = _ranks_folder(path)
    assert found is not None, "asked of a folder that is not of this format"
    return found


def _model(path: Path) -> dict[str, StoredTensor] | None:
    """All tensors of the model's files by name; None where there are no such files."""
    files = RankFiles.open(_inner(path), "model")
    return None if files is None else {name: tensor for name, tensor, _ in files.tensors()}


def _is_adapted(names: Mapping[str, object]) -> bool:
    return any(key.startswith(PEFT) or LEAF.match(key) for key in names)


def _base_name(key: str) -> str:
    return key.removeprefix(PEFT).replace(".base_layer.", ".").replace(".original_module.", ".")


def _lora_settings(folder: Path, tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    for place in (folder, folder / "lora_adapter"):
        if (place / ADAPTER_CONFIG).is_file():
            return read_json(place / ADAPTER_CONFIG)
    file = folder / LORA_SETTINGS
    if not file.is_file():
        raise InputError(
            f"{folder} holds LoRA's weights ({some_of(list(tensors), 1)}) and neither {LORA_SETTINGS} nor {ADAPTER_CONFIG}, so "
            'its scale is not known; write the latter from the model: model.peft_config["default"].save_pretrained(folder)'
        )
    meta = read_json(file)
    if not isinstance(meta.get("r"), int) or not isinstance(meta.get("lora_alpha"), int | float):
        raise InputError(f"{file} holds {dict(meta)}; expected numbers r and lora_alpha")
    modules: dict[str, dict[str, None]] = {"lora_": {}, "modules_to_save": {}}
    for key in tensors:
        for part, names in modules.items():
            module, found, _ = key.removeprefix(PEFT).partition(f".{part}")
            if found:
                names.setdefault(module)
    return {
        "peft_type": "LORA",
        "task_type": meta.get("task_type") or "CAUSAL_LM",
        "r": meta["r"],
        "lora_alpha": meta["lora_alpha"],
        "target_modules": list(modules["lora_"]),
        "modules_to_save": list(modules["modules_to_save"]) or None,
        "bias": "none",
    }
