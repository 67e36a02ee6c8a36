"""What a checkpoint holds and lacks, and the Adam state matched to every trainable parameter, whether or not it will do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from entropy_probe.checkpoints.beside import Beside
from entropy_probe.checkpoints.files.other_optimizers import refuse_other_optimizer
from entropy_probe.checkpoints.files.stored import StoredOptimizer, StoredTensor
from entropy_probe.checkpoints.formats.base import FoundFile
from entropy_probe.checkpoints.formats.foreign import refuse_foreign
from entropy_probe.checkpoints.formats.registry import format_of, refuse_misplaced
from entropy_probe.checkpoints.index_names import OptimizerMapping
from entropy_probe.checkpoints.loading import load_matched
from entropy_probe.checkpoints.records import ModelFolder
from entropy_probe.optimizers.preconditioner import ZeroV, preconditioner
from entropy_probe.optimizers.state import MOMENTS, moments_problem


@dataclass(frozen=True)
class FolderFacts:
    """What a folder is before anything in it is loaded.

    Attributes:
        format: the name of its format.
        step: the trainer's, None where the folder does not say.
        world_size: how many ranks wrote it, None where it does not say.
        files: the kinds of files that the format has.
    """

    format: str
    step: int | None
    world_size: int | None
    files: tuple[FoundFile, ...]


@dataclass(frozen=True)
class MatchedParameter:
    """A trainable parameter and its Adam state; ``problem`` says why it will not do, or None. ``median_p`` is that of P."""

    name: str
    shape: tuple[int, ...]
    group: int
    learning_rate: float
    weight_decay: float
    step: int | None
    median_p: float | None
    problem: str | None


@dataclass(frozen=True)
class StoredParameter:
    """A stored tensor, and Adam's state of the same name; ``moments`` are those that are there, ``step`` None without."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    moments: tuple[str, ...]
    step: int | None


@dataclass(frozen=True)
class Listing:
    """What a folder stores where nothing can be matched; ``reason`` says what is missing, ``unnamed`` counts states without a
    name."""

    reason: str
    parameters: tuple[StoredParameter, ...]
    unnamed: int


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's model, how optimizer indices became names, and every trainable parameter."""

    folder: ModelFolder
    mapping: OptimizerMapping
    learning_rates: tuple[float, ...]
    parameters: tuple[MatchedParameter, ...]
    frozen: int

    @property
    def problems(self) -> int:
        """How many trainable parameters have no usable Adam state."""
        return sum(parameter.problem is not None for parameter in self.parameters)


def look_into(path: Path, base: Path | Beside | None = None) -> FolderFacts:
    """A folder's format and files; whoever gives a base needs no config.json there.

    Raises:
        InputError: no folder, or none of a format that is read; another framework's is named, also beside a configuration.
    """
    known = format_of(path)
    files = tuple(
        replace(file, required=False) if Beside.of(base).given and file.pattern == "config.json" else file
        for file in known.files(path)
    )
    if any(file.required and not file.names for file in files):
        refuse_foreign(path)
    return FolderFacts(known.name, known.trainer_state(path).global_step, known.world_size(path), files)


def list_stored(path: Path, base: Path | Beside | None = None) -> Listing | None:
    """Names, shapes and steps, where a folder lacks the optimizer or what describes the model; None where it has both.

    Raises:
        InputError: no folder of a format that is read, or damaged, or an optimizer that is not read.
    """
    known = format_of(path)
    optimizer, adapter, weights = known.optimizer(path), known.adapter(path), known.weights(path)
    if optimizer is None:
        refuse_misplaced(path)
        reason = (
            "no Adam state is here, and a probe needs it; the checkpoint was saved without the optimizer (a Trainer leaves it "
            "out with save_only_model=True)"
        )
    elif Beside.of(base).given:
        return None
    elif adapter is None and weights is not None and known.configuration(path) is None:
        reason = "no config.json is here; give as base the folder of the model that training started from, to match and probe"
    elif adapter is not None and weights is None and not adapter.settings.get("base_model_name_or_path"):
        reason = "the base under the adapter is neither here nor named; give its folder as base, to match and probe"
    else:
        return None
    if optimizer is not None:
        refuse_other_optimizer(optimizer)
    tensors = {**(weights.tensors if weights is not None else {}), **(adapter.tensors if adapter is not None else {})}
    named = {} if optimizer is None else _by_name(optimizer)
    found = [
        StoredParameter(name, stored.shape, str(stored.dtype).removeprefix("torch."), *_told(named.get(name, {})))
        for name, stored in tensors.items()
    ]
    count = 0 if optimizer is None else len(optimizer.state)
    return Listing(reason, tuple(found), count - sum(bool(parameter.moments) for parameter in found))


def _by_name(optimizer: StoredOptimizer) -> dict[str, Mapping[str, Any]]:
    return {
        str(name): optimizer.state.get(index, {})
        for group in optimizer.groups
        for index, name in zip(group["params"], group.get("param_names", ()), strict=False)
    }


def _told(entry: Mapping[str, Any]) -> tuple[tuple[str, ...], int | None]:
    step = entry.get("step")
    step = step.read() if isinstance(step, StoredTensor) else step
    return tuple(key for key in MOMENTS if key in entry), None if step is None else int(step)


def inspect_checkpoint(path: Path, base: Path | Beside | None = None, freeze: Sequence[str] = ()) -> Inspection:
    """Load a checkpoint and match its state parameter by parameter, without refusing what a probe would refuse.

    ``freeze`` are regular expressions: parameters in whose names one of them is found were not trained.

    Raises:
        InputError: the weights or the optimizer file cannot be read at all, or no rule maps it.
    """
    matched = load_matched(path, base=base, freeze=freeze)
    folder, adam = matched.folder, matched.adam
    groups = adam.group_of()
    numbers = {name: number for number, group in enumerate(adam.groups) for name in group.names}
    found = []
    for name, p in folder.model.named_parameters():
        if not p.requires_grad:
            continue
        moments, group = adam.moments.get(name), groups[name]
        problem = moments_problem(moments, p.shape)
        sound = moments if problem is None else None
        found.append(
            MatchedParameter(
                name=name,
                shape=tuple(p.shape),
                group=numbers[name],
                learning_rate=group.learning_rate,
                weight_decay=group.weight_decay,
                step=None if sound is None else sound.step,
                median_p=None if sound is None else float(preconditioner(sound, group, ZeroV.GUIDE).median()),
                problem=problem,
            )
        )
    frozen = sum(not p.requires_grad for p in folder.model.parameters())
    return Inspection(folder, matched.mapping, adam.learning_rates, tuple(found), frozen)
