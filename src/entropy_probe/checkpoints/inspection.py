"""What a checkpoint holds and lacks, and the Adam state matched to every trainable parameter, whether or not it will do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from entropy_probe.checkpoints.adam_state import load_adam_state
from entropy_probe.checkpoints.freezing import freeze_matching, freeze_names
from entropy_probe.checkpoints.hf import ModelFolder, load_model, optimizer_file
from entropy_probe.checkpoints.index_names import OptimizerMapping
from entropy_probe.optimizers.preconditioner import ZeroV, preconditioner
from entropy_probe.optimizers.state import moments_problem

EXPECTED_FILES = (
    ("config.json", "architecture", True),
    ("adapter_config.json", "PEFT adapter", False),
    ("*.safetensors", "weights", True),
    ("optimizer.pt", "Adam state", True),
    ("trainer_state.json", "training log", False),
    ("tokenizer_config.json", "tokenizer", False),
)


@dataclass(frozen=True)
class FoundFile:
    """A kind of file, what it is for, the names found, and whether the probe needs one."""

    pattern: str
    purpose: str
    names: tuple[str, ...]
    required: bool


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


def list_files(path: Path, base: Path | None = None) -> list[FoundFile]:
    """The files of a checkpoint folder; an adapter, and who gives a base, needs no config.json there."""
    described = base is not None or (path / "adapter_config.json").is_file()
    return [
        FoundFile(
            pattern,
            purpose,
            tuple(sorted(file.name for file in path.glob(pattern))),
            needed and not (described and pattern == "config.json"),
        )
        for pattern, purpose, needed in EXPECTED_FILES
    ]


def inspect_checkpoint(path: Path, base: Path | None = None, freeze: Sequence[str] = ()) -> Inspection:
    """Load a checkpoint and match its state parameter by parameter, without refusing what a probe would refuse.

    ``freeze`` are regular expressions: parameters in whose names one of them is found were not trained.

    Raises:
        InputError: the weights or the optimizer file cannot be read at all, or no rule maps it.
    """
    optimizer = optimizer_file(path)
    folder = load_model(path, base=base)
    asked = freeze_matching(folder.model, freeze)
    adam, mapping = load_adam_state(optimizer, folder.model)
    freeze_names(folder.model, mapping.frozen)
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
    return Inspection(folder, mapping.said_of(asked), adam.learning_rates, tuple(found), frozen)
