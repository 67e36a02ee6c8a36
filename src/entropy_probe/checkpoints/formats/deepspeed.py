"""DeepSpeed's folders: ZeRO 0, 1, 2 and 3 and the universal layout, by themselves or in the folder of the Hugging Face Trainer,
of OpenRLHF (``_actor/``) and of open-instruct.

The file ``latest`` (universal: ``latest_universal``) names the step's folder, any tag; that folder may be given too. Weights
are the optimizer's master weights: what stands under ``module`` is what the forward was computed with, in bfloat16 or float16
where the run was. Adam's groups have names except under stage 0, which saves ``torch.optim``'s own state_dict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from entropy_probe.checkpoints.files import zero_universal
from entropy_probe.checkpoints.files.flat_units import LEAF
from entropy_probe.checkpoints.files.pieces import FlatTensor
from entropy_probe.checkpoints.files.stored import StoredOptimizer, StoredTensor
from entropy_probe.checkpoints.files.trainer_state import TrainerState, read_trainer_state
from entropy_probe.checkpoints.files.zero_files import ModelStates, OptimizerStates
from entropy_probe.checkpoints.files.zero_flat import FlatOptimizer
from entropy_probe.checkpoints.files.zero_unsharded import Unsharded
from entropy_probe.checkpoints.formats.base import ADAM_STATE, FoundFile, StoredAdapter, StoredWeights, found_file
from entropy_probe.checkpoints.formats.trainer import ADAPTER_CONFIG, CONFIG, OPTIMIZER
from entropy_probe.common.files import read_json
from entropy_probe.errors import InputError

LATEST = ("latest", "latest_universal")
OPENRLHF = "_actor"
STEP = re.compile(r"step[_-]?(\d+)")
PEFT = "base_model.model."


@dataclass(frozen=True)
class _Opened:
    """A step's files: one of ``flat``, ``unsharded`` and ``universal`` has the optimizer, or none."""

    model: ModelStates | None
    flat: FlatOptimizer | None
    unsharded: Unsharded | None
    universal: Path | None

    def masters(self) -> dict[str, StoredTensor]:
        if self.flat is not None:
            return self.flat.masters()
        if self.universal is not None:
            return zero_universal.masters(self.universal, self.model)
        return {} if self.unsharded is None else self.unsharded.masters()


class DeepSpeed:
    """A folder with ``latest``, or the step's folder that it names."""

    name = "DeepSpeed checkpoint"

    def detects(self, path: Path) -> bool:
        """By DeepSpeed's files, in the folder or in the one inside it that the run names."""
        return _tag_folder(path) is not None and not (path / OPTIMIZER).is_file()

    def files(self, path: Path) -> tuple[FoundFile, ...]:
        """DeepSpeed's, and what the Trainer leaves beside them."""
        folder = _inner(path)
        inside = "" if folder == path else f"{folder.relative_to(path)}/"
        universal, sharded = (any(folder.glob(pattern)) for pattern in ("zero/*/fp32.pt", "*_optim_states.pt"))
        model = f"{inside}*mp_rank_*_model_states.pt"
        optimizer = f"{inside}zero/*/exp_avg_sq.pt" if universal else f"{inside}*_optim_states.pt" if sharded else model
        return (
            found_file(path, CONFIG, "architecture", required=False),
            found_file(path, ADAPTER_CONFIG, "PEFT adapter", required=False),
            found_file(path, f"{inside}zero/*/fp32.pt" if universal else model, "weights", required=True),
            found_file(path, optimizer, ADAM_STATE, required=True),
            found_file(path, "trainer_state.json", "training log", required=False),
            found_file(path, "tokenizer_config.json", "tokenizer", required=False),
        )

    def world_size(self, path: Path) -> int | None:
        """As the model states say, or by the optimizer's files."""
        folder = _inner(path)
        model = ModelStates.open(folder)
        if model is not None and model.world_size is not None:
            return model.world_size
        states = OptimizerStates.open(folder, None)
        return None if states is None else states.count

    def configuration(self, path: Path) -> Path | None:
        """The given folder, or the one around the step's."""
        return next((place for place in _around(path) if (place / CONFIG).is_file()), None)

    def weights(self, path: Path) -> StoredWeights | None:
        """The master weights, and what was not trained as the module has it; None under an adapter.

        Raises:
            InputError: damaged, or files of several steps.
        """
        opened = _opened(_inner(path))
        tensors = _tensors(opened, _inner(path))
        if _is_adapted(tensors):
            return None
        return StoredWeights(tensors, forward=_forward(opened, tensors)) if tensors else None

    def adapter(self, path: Path) -> StoredAdapter | None:
        """The trained tensors of a PEFT model with adapter_config.json beside them.

        Raises:
            InputError: they are an adapter's, and its configuration is not there.
        """
        opened = _opened(_inner(path))
        tensors = _tensors(opened, _inner(path))
        if not _is_adapted(tensors):
            return None
        place = next((place for place in _around(path) if (place / ADAPTER_CONFIG).is_file()), None)
        if place is None:
            raise InputError(
                f"{path} holds the weights of a PEFT adapter and no {ADAPTER_CONFIG}; write it there from the model that was "
                'trained: model.peft_config["default"].save_pretrained(folder)'
            )
        own = {name: tensor for name, tensor in tensors.items() if LEAF.match(name)}
        return StoredAdapter(read_json(place / ADAPTER_CONFIG), own, forward=_forward(opened, own))

    def optimizer(self, path: Path) -> StoredOptimizer | None:
        """Adam's state of any stage.

        Raises:
            InputError: damaged, a rank's file is missing, or files of several steps.
        """
        opened = _opened(_inner(path))
        if opened.universal is not None:
            return zero_universal.optimizer(opened.universal, opened.model)
        if opened.flat is not None:
            return opened.flat.stored()
        return None if opened.unsharded is None else opened.unsharded.stored()

    def trainer_state(self, path: Path) -> TrainerState:
        """trainer_state.json; else the step in the folder's name, or that DeepSpeed counted."""
        folder = _inner(path)
        for place in _around(path):
            found = read_trainer_state(place)
            if found.global_step is not None:
                return found
        named = STEP.search(folder.resolve().name)
        if named is not None:
            return TrainerState(int(named[1]), ())
        model = ModelStates.open(folder)
        return TrainerState(None if model is None else model.step, ())


def _has_files(path: Path) -> bool:
    patterns = ("*_optim_states.pt", "*mp_rank_*_model_states.pt", "zero/*/fp32.pt")
    return any(next(path.glob(pattern), None) is not None for pattern in patterns)


def _tag_folder(path: Path) -> Path | None:
    """The folder of one step's files: the given one, or the one inside it that is named latest, or the only one."""
    if _has_files(path):
        return path
    for name in LATEST:
        if (path / name).is_file():
            tag = (path / name).read_text(errors="replace").strip()
            # A tag is a folder's name; the file may be anything's.
            inside = path / tag if tag and "/" not in tag and "\0" not in tag and len(tag) < 200 else None
            return inside if inside is not None and inside.is_dir() and _has_files(inside) else None
    if (path / OPENRLHF).is_dir():
        return _tag_folder(path / OPENRLHF)
    inside_it = [folder for folder in path.glob("global_step*") if folder.is_dir() and _has_files(folder)]
    return inside_it[0] if len(inside_it) == 1 else None


def _inner(path: Path) -> Path:
    found = _tag_folder(path)
    assert found is not None, "asked of a folder that is not of this format"
    return found


def _around(path: Path) -> tuple[Path, ...]:
    """Where configuration and log may be: the given folder, the step's, and the one around this."""
    folder = _inner(path)
    return tuple(dict.fromkeys((path, folder, folder.parent if folder != path else folder.resolve().parent)))


def _opened(folder: Path) -> _Opened:
    model = ModelStates.open(folder)
    if next(folder.glob("zero/*/fp32.pt"), None) is not None:
        return _Opened(model, None, None, folder)
    files = OptimizerStates.open(folder, None if model is None else model.world_size)
    if model is None:
        raise InputError(
            f"{folder} has no *mp_rank_00_model_states.pt, which names the parameters in the optimizer's files; copy it there"
        )
    if files is not None and "fp32_groups" not in files.states[0] and "fp32_groups_flat" not in files.states[0]:
        return _Opened(model, FlatOptimizer.of(model, files), None, None)
    return _Opened(model, None, Unsharded.of(model, files), None)


def _tensors(opened: _Opened, folder: Path) -> dict[str, StoredTensor]:
    """The master weights, and of the module what these leave out."""
    found = opened.masters()
    model = opened.model
    if model is None:
        return found
    _refuse_other_step(model, found, folder)
    for name, shape in model.frozen.items():
        if name not in found and name in model.module and model.module[name].numel() == 0:
            numel = torch.Size(shape).numel()
            parts, left = [], numel
            for part in model.fragments(name):
                parts.append(part.reshape(-1)[:left])
                left -= parts[-1].numel()
            found[name] = _whole(model, name, shape, parts)
    mastered = {model.module[name].data_ptr() for name in found if name in model.module and model.module[name].numel()}
    for name, value in model.module.items():
        # A tied name holds what the forward was computed with, not the master.
        tied = name in model.tied or value.data_ptr() in mastered
        if name not in found and value.numel() and not (tied and mastered):
            found[name] = _whole(model, name, tuple(value.shape), [value])
    return found


def _whole(model: ModelStates, name: str, shape: tuple[int, ...], parts: list[Tensor]) -> StoredTensor:
    try:
        return FlatTensor.of(shape, parts, mapped=model.mapped)
    except ValueError as error:
        raise InputError(f"{model.path}: {name}: {error}; the file is damaged") from error


def _refuse_other_step(model: ModelStates, masters: Mapping[str, StoredTensor], folder: Path) -> None:
    """The module is the master weights, cast: else the files are of two steps."""
    for name, master in masters.items():
        value = model.module.get(name)
        if value is None or value.numel() == 0:
            continue
        kept = FlatTensor.of(tuple(value.shape), [value], mapped=model.mapped)
        if master.shape != kept.shape:
            raise InputError(
                f"{model.path}: {name} is {kept.shape}, in the optimizer's files {master.shape}; copy one step's"
            )
        for one, other in zip(master.sample(), kept.sample(), strict=True):
            if not torch.equal(one.to(other.dtype).nan_to_num(), other.nan_to_num()):
                raise InputError(
                    f"{model.path} holds other weights than the optimizer's files in {folder.name} ({name} differs): files of "
                    "different steps; copy one step's"
                )


def _is_adapted(names: Mapping[str, object]) -> bool:
    return any(name.startswith(PEFT) or LEAF.match(name) for name in names)


def _forward(opened: _Opened, tensors: Mapping[str, StoredTensor]) -> torch.dtype | None:
    """What the module is held in, where that is another type than the weights'."""
    forward = None if opened.model is None else opened.model.forward
    return None if forward is None or all(tensor.dtype == forward for tensor in tensors.values()) else forward
