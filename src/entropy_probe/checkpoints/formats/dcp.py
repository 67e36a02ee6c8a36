"""torch.distributed.checkpoint (DCP) folders under any root: torchtitan's, prime-rl's, AReaL's, NeMo-RL's and others.

    torchtitan  checkpoint/step-N/                <name>            optimizer.state.<name>.exp_avg
    prime-rl    checkpoints/step_N/trainer/       app.model.<name>  app.optimizers.state.<name>.exp_avg
    AReaL                                         dcp.model.<name>  dcp.optim.state.<name>.exp_avg
    NeMo-RL     step_N/policy/weights, optimizer  model.<name>      optim.optim.state.<name>.exp_avg

The root of the optimizer is what stands before ``state.<name>.exp_avg_sq``, that of the model what stands before the same
names. Settings are by group, ``param_groups.0.lr``, or by parameter, ``param_groups.<name>.lr``. Names are
the live model's, Hugging Face's or its author's own. There is no configuration in the folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_probe.checkpoints.files.distributed import DistributedFolder
from entropy_probe.checkpoints.files.optimizer_pt import INSIDE
from entropy_probe.checkpoints.files.stored import StoredOptimizer, StoredTensor
from entropy_probe.checkpoints.files.trainer_state import TrainerState, read_trainer_state
from entropy_probe.checkpoints.formats.accelerate_sharded import MODEL_FOLDER as ACCELERATES_MODEL
from entropy_probe.checkpoints.formats.accelerate_sharded import OPTIMIZER_FOLDER as ACCELERATES_OPTIMIZER
from entropy_probe.checkpoints.formats.base import ADAM_STATE, FoundFile, StoredAdapter, StoredWeights, found_file
from entropy_probe.checkpoints.formats.trainer import ADAPTER_CONFIG, CONFIG, OPTIMIZER, adapter_without_config
from entropy_probe.common.files import read_json
from entropy_probe.errors import InputError

METADATA = ".metadata"
INNER = ("trainer", "policy", "actor", "dist_ckpt", "weights", "")
"""Folders inside of a step's, most telling first; NeMo-RL's weights have the optimizer beside them."""
OPTIMIZER_FOLDER = "optimizer"
NOT_WHOLE = (OPTIMIZER_FOLDER, ACCELERATES_OPTIMIZER, ACCELERATES_MODEL)
"""Folders of shards that are a part of the checkpoint around them."""
STEP = re.compile(r"(?:global_)?(?:step|iter)[-_]?(\d+)")
RANK = re.compile(r"__(\d+)_\d+\.distcp")
STATE = re.compile(r"(?P<root>(?:[^.]+\.)*?)state\.(?P<name>.+)\.(?P<field>[^.]+)")
NO_MODEL = re.compile(
    r"(?:app\.)?(?:optimizers?|optim|lr_schedulers?|schedulers?|train_state|dataloader|progress|rng|client_state|extra_state)\."
)
"""What is beside a model whose names begin at the root."""
MODEL_ROOTS = ("app.model.", "dcp.model.", "model.")
"""Where no optimizer tells the names; the last only of a folder in which every tensor has it."""


class DcpFolder:
    """A step's folder, the one inside it that has the shards, or a run's with a single step."""

    name = "torch.distributed.checkpoint (DCP) folder, as torchtitan, prime-rl, AReaL and NeMo-RL write it"

    def detects(self, path: Path) -> bool:
        """By .metadata, in the folder or in one inside it; not Megatron's, which has its own names and layouts."""
        return not (path / OPTIMIZER).is_file() and _shards(path) is not None

    def files(self, path: Path) -> tuple[FoundFile, ...]:
        """Shards, of model and optimizer alike, and the tokenizer that some write beside them."""
        model, optimizer = _folders(path)
        inside = [_relative(folder, path) for folder in dict.fromkeys((model, optimizer))]
        return (
            found_file(path, CONFIG, "architecture", required=False),
            found_file(path, f"{inside[0]}*.distcp", "weights in shards", required=True),
            found_file(path, f"{inside[-1]}*.distcp", f"{ADAM_STATE} in shards", required=True),
            found_file(path, "**/tokenizer_config.json", "tokenizer", required=False),
        )

    def world_size(self, path: Path) -> int | None:
        """Every rank writes files under its number."""
        files = (file for folder in _folders(path) for file in folder.glob("*.distcp"))
        ranks = [int(named.group(1)) for file in files if (named := RANK.fullmatch(file.name))]
        return max(ranks) + 1 if ranks else None

    def configuration(self, path: Path) -> Path | None:
        """The folder itself, where someone has put config.json into it."""
        places = dict.fromkeys((path, *_folders(path)))
        return next((place for place in places if (place / CONFIG).is_file()), None)

    def weights(self, path: Path) -> StoredWeights | None:
        """What is under the model's root; None beside an adapter."""
        tensors = _Contents.open(path).weights()
        return None if not tensors or _of_adapter(tensors) is not None else StoredWeights(tensors)

    def adapter(self, path: Path) -> StoredAdapter | None:
        """An adapter's tensors, with adapter_config.json.

        Raises:
            InputError: without its configuration.
        """
        tensors = _Contents.open(path).weights()
        found = _of_adapter(tensors)
        if found is None:
            return None
        for place in dict.fromkeys((path, *_folders(path))):
            if (place / ADAPTER_CONFIG).is_file():
                return StoredAdapter(read_json(place / ADAPTER_CONFIG), tensors)
        raise InputError(adapter_without_config(path, found))

    def optimizer(self, path: Path) -> StoredOptimizer | None:
        """All that is under the optimizer's root; None where no tensor is.

        Raises:
            InputError: damaged, or without settings.
        """
        return _Contents.open(path).optimizer()

    def trainer_state(self, path: Path) -> TrainerState:
        """The step in the name of the folder, or of one around it or inside."""
        model, _ = _folders(path)
        found = read_trainer_state(path)
        places = (model.resolve(), *model.resolve().parents[:3])
        steps = [int(named[1]) for place in places if (named := STEP.fullmatch(place.name))]
        return TrainerState(steps[0], ()) if found.global_step is None and steps else found


@dataclass(frozen=True)
class _Contents:
    """The opened shards of model and optimizer, which may be in one folder."""

    model: DistributedFolder
    state: DistributedFolder

    @staticmethod
    def open(path: Path) -> _Contents:
        model, optimizer = _folders(path)
        opened = DistributedFolder.open(model)
        return _Contents(opened, opened if optimizer == model else DistributedFolder.open(optimizer))

    def weights(self) -> dict[str, StoredTensor]:
        tensors = self.model.tensors()
        outside = tuple(dict.fromkeys(match["root"] for match in _entries(self.state.keys)))
        root = self._root(tensors, outside)
        return {
            INSIDE.sub("", key.removeprefix(root)): tensor
            for key, tensor in tensors.items()
            if key.startswith(root) and not key.startswith(outside) and not (root == "" and NO_MODEL.match(key))
        }

    def _root(self, tensors: Mapping[str, StoredTensor], outside: tuple[str, ...]) -> str:
        """What stands before the names that the optimizer knows."""
        trained = [match["name"] for match in _entries(self.state.keys)]
        own = [key for key in tensors if not key.startswith(outside)] if outside else list(tensors)
        for name in trained:
            roots = sorted((key.removesuffix(name) for key in own if key == name or key.endswith(f".{name}")), key=len)
            if roots:
                return roots[0]
        return next((root for root in MODEL_ROOTS[:-1] if any(key.startswith(root) for key in own)), self._common(own))

    @staticmethod
    def _common(own: Sequence[str]) -> str:
        # A causal language model has names outside "model." too, its head's for one, or is itself called otherwise.
        last = MODEL_ROOTS[-1]
        return last if own and all(key.startswith(last) for key in own if not NO_MODEL.match(key)) else ""

    def optimizer(self) -> StoredOptimizer | None:
        folder = self.state
        found: dict[str, dict[str, dict[str, Any]]] = {}
        tensors = folder.tensors()
        roots = dict.fromkeys(match["root"] for match in _entries(tensors))
        for key, tensor in tensors.items():
            for root in roots:
                match = STATE.fullmatch(key.removeprefix(root)) if key.startswith(f"{root}state.") else None
                if match is not None:
                    found.setdefault(root, {}).setdefault(match["name"], {})[match["field"]] = tensor
                    break
        if not found:
            return None
        groups: list[dict[str, Any]] = []
        state: dict[int, dict[str, Any]] = {}
        for root, entries in found.items():
            settings = _settings(folder, f"{root}param_groups.", entries)
            steps = [key for key in folder.keys if key.startswith(f"{root}state.") and key not in tensors]
            for key, value in folder.settings(steps).items():  # a step that is a plain number
                match = STATE.fullmatch(key.removeprefix(root))
                if match is not None and match["name"] in entries:
                    entries[match["name"]][match["field"]] = value
            for group in settings:
                names = group.pop("params")
                first = sum(len(other["params"]) for other in groups)
                indices = list(range(first, first + len(names)))
                groups.append({**group, "params": indices, "param_names": [INSIDE.sub("", name) for name in names]})
                state |= {index: entries[name] for index, name in zip(indices, names, strict=True) if name in entries}
        return StoredOptimizer(folder.path, groups, state, exact_names=True)


def _entries(keys: Any) -> Iterator[re.Match[str]]:
    """Of keys of optimizers' states that hold a moment."""
    for key in keys:
        match = STATE.fullmatch(key)
        if match is not None and match["field"] in ("exp_avg_sq", "exp_avg", "momentum_buffer", "exp_avg_sq_row"):
            yield match


def _settings(folder: DistributedFolder, prefix: str, entries: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups with the names of their parameters under ``params``: settings by group, or by parameter, alike ones as one."""
    keys = [key for key in folder.keys if key.startswith(prefix)]
    tensors = folder.tensors()
    values = folder.settings([key for key in keys if key not in tensors])
    values |= {key: tensors[key].read() for key in keys if key in tensors}
    by_group: dict[int, dict[str, Any]] = {}
    by_name: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        number, _, name = key.removeprefix(prefix).partition(".")
        if number.isdecimal() and name:
            by_group.setdefault(int(number), {})[name] = value
        else:
            parameter, _, setting = key.removeprefix(prefix).rpartition(".")
            by_name.setdefault(parameter, {})[setting] = value
    if by_group:
        groups = [by_group[number] for number in sorted(by_group)]
        if not all(isinstance(group.get("params"), list) for group in groups):
            raise InputError(
                f"{folder.path} holds groups of an optimizer ({prefix}) without their parameters' names (params)"
            )
        return [{**group, "params": [str(name) for name in group["params"]]} for group in groups]
    if not by_name:
        raise InputError(
            f"{folder.path} holds Adam's moments and no settings of it ({prefix}); the folder is incomplete"
        )
    alike: dict[str, dict[str, Any]] = {}
    for parameter in (name for name in entries if name in by_name):
        own = alike.setdefault(repr(sorted(by_name[parameter].items())), {**by_name[parameter], "params": []})
        own["params"].append(parameter)
    lost = [name for name in entries if name not in by_name]
    if lost:
        raise InputError(f"{folder.path} holds Adam's moments of {lost[0]} and no settings for it ({prefix})")
    return list(alike.values())


def _of_adapter(tensors: Mapping[str, StoredTensor]) -> str | None:
    return next((key for key in tensors if ".lora_" in key or key.startswith("base_model.model.")), None)


def _shards(path: Path) -> Path | None:
    """The folder of the model's shards, in the given one or below; None where there is none, or it is Megatron's."""
    for inner in ("", *INNER):
        for place in (path / inner, path / inner / "weights", path / inner / "trainer"):
            others = (place / "common.pt").is_file() or place.name in NOT_WHOLE
            if (place / METADATA).is_file() and not others:
                return place
    steps = [step for folder in (path, path / "checkpoint", path / "checkpoints") for step in _steps(folder)]
    return _shards(steps[0]) if len(steps) == 1 else None


def _steps(folder: Path) -> list[Path]:
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    return [place for place in inside if place.is_dir() and STEP.fullmatch(place.name)]


def _folders(path: Path) -> tuple[Path, Path]:
    """Of the model, and of the optimizer."""
    model = _shards(path)
    assert model is not None, "asked of a folder that is not of this format"
    beside = model.parent / OPTIMIZER_FOLDER
    return model, beside if model.name == "weights" and (beside / METADATA).is_file() else model


def _relative(folder: Path, path: Path) -> str:
    return "" if folder == path else f"{folder.relative_to(path)}/"
