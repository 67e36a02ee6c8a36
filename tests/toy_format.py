"""A checkpoint format that the package does not know: all that a format takes, in one class."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from entropy_probe.checkpoints import TrainerState, load_checkpoint
from entropy_probe.checkpoints.files.stored import MappedTensor, StoredOptimizer
from entropy_probe.checkpoints.formats.base import FoundFile, StoredAdapter, StoredWeights, found_file


class Toy:
    """toy.pt has weights and moments by name, and the learning rate; config.json is in a folder of its own."""

    name = "toy of the tests"

    def detects(self, path: Path) -> bool:
        return (path / "toy.pt").is_file()

    def files(self, path: Path) -> tuple[FoundFile, ...]:
        return (found_file(path, "toy.pt", "everything", required=True),)

    def world_size(self, path: Path) -> int | None:
        return 7

    def configuration(self, path: Path) -> Path | None:
        return path / "model"

    def weights(self, path: Path) -> StoredWeights | None:
        return StoredWeights({name: MappedTensor.of(tensor) for name, tensor in self._content(path)["weights"].items()})

    def adapter(self, path: Path) -> StoredAdapter | None:
        return None

    def optimizer(self, path: Path) -> StoredOptimizer | None:
        content = self._content(path)
        names = list(content["moments"])
        state = {
            number: {"step": content["step"]} | {key: MappedTensor.of(t) for key, t in content["moments"][name].items()}
            for number, name in enumerate(names)
        }
        groups = [
            {
                **settings,
                "params": [names.index(name) for name in settings["names"]],
                "param_names": settings["names"],
            }
            for settings in content["groups"]
        ]
        return StoredOptimizer(path / "toy.pt", groups, state, exact_names=True)

    def trainer_state(self, path: Path) -> TrainerState:
        return TrainerState(self._content(path)["trained"], ())

    @staticmethod
    def _content(path: Path) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(path / "toy.pt", weights_only=True, mmap=True)
        return content


def write(source: Path, path: Path) -> Path:
    """The checkpoint of a Trainer's folder as a toy."""
    loaded = load_checkpoint(source)
    (path / "model").mkdir(parents=True)
    for file in ("config.json", "generation_config.json"):
        shutil.copy(source / file, path / "model")
    groups = [
        {
            "names": list(g.names),
            "lr": g.learning_rate,
            "betas": (g.beta1, g.beta2),
            "eps": g.eps,
            "weight_decay": g.weight_decay,
            "amsgrad": g.amsgrad,
        }
        for g in loaded.adam.groups
    ]
    moments = {name: {"exp_avg": m.exp_avg, "exp_avg_sq": m.exp_avg_sq} for name, m in loaded.adam.moments.items()}
    (step,) = {m.step for m in loaded.adam.moments.values()}
    content = {
        "weights": loaded.model.state_dict(),
        "moments": moments,
        "groups": groups,
        "step": step,
        "trained": loaded.trainer_step,
    }
    torch.save(content, path / "toy.pt")
    return path
