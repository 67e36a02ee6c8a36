"""ZeRO's flat vectors: where each parameter's master weight and moments lie in the ranks' parts, and Adam's groups by name.

Stages 1 and 2 (and the bf16 optimizer without ZeRO) cut a group's parameters, one after the other, into a part a rank; a
parameter may straddle ranks, and ``param_slice_mappings`` says where it starts *within the rank's part*. Stage 3 cuts every
parameter into W pieces of ⌈numel / W⌉ and joins a rank's pieces in the order of ``param_shapes``. Source: DeepSpeed's
``zero_to_fp32.py`` and ``ds_to_universal.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from entropy_probe.checkpoints.files.pieces import FlatTensor
from entropy_probe.checkpoints.files.rank_files import live_name
from entropy_probe.checkpoints.files.stored import StoredOptimizer, StoredTensor
from entropy_probe.checkpoints.files.zero_files import ModelStates, OptimizerStates, Shapes, fragment
from entropy_probe.errors import InputError

Place = Sequence[tuple[int, int, int]]
"""Of a parameter: (rank, start in its part, number of elements), in order."""


@dataclass(frozen=True)
class FlatGroup:
    """One flat vector: the ranks' master parts and Adam's state of them, the parameters in it and their places.

    ``settings`` is the number of the optimizer group that it belongs to.
    """

    master: Sequence[Tensor]
    state: Sequence[Mapping[str, Any]]
    shapes: Shapes
    places: Mapping[str, Place]
    settings: int


@dataclass(frozen=True)
class FlatOptimizer:
    """All flat vectors of the ranks' files, with the settings of every group; ``order`` is the module's, by name."""

    files: OptimizerStates
    vectors: Sequence[FlatGroup]
    groups: Sequence[Mapping[str, Any]]
    order: Mapping[str, int]

    @staticmethod
    def of(model: ModelStates, files: OptimizerStates) -> FlatOptimizer:
        """The vectors of any stage.

        Raises:
            InputError: not DeepSpeed's, of a layout that is not read, or files that do not belong together.
        """
        if model.groups is None:
            raise InputError(
                f"{model.path} has no param_shapes, the names in the optimizer's flat vectors; it is damaged"
            )
        first = files.states[0]
        if "fp32_flat_groups" in first:
            masters, inner, places = "fp32_flat_groups", "optimizer_state_dict", _pieces_of_each
        elif "single_partition_of_fp32_groups" in first:
            masters, inner, places = "single_partition_of_fp32_groups", "base_optimizer_state", _runs
        else:
            raise InputError(
                f"{files.path} holds {sorted(map(str, first))[:6]}; expected the flat master weights of ZeRO 1, 2 or 3"
            )
        by_rank = [_base(files, rank, inner) for rank in range(files.count)]
        groups = by_rank[0]["param_groups"]
        vectors = []
        for number, shapes in enumerate(model.groups):
            master = [_vector(files, rank, masters, number, len(model.groups)) for rank in range(files.count)]
            owner = next((at for at, group in enumerate(groups) if number in group["params"]), None)
            if owner is None:
                raise InputError(
                    f"{files.path}: no group of the optimizer lists its flat vector {number}; the file is damaged"
                )
            vectors.append(
                FlatGroup(
                    master=master,
                    state=[base["state"].get(number, {}) for base in by_rank],
                    shapes=shapes,
                    places=places(files, number, shapes, master),
                    settings=owner,
                )
            )
        return FlatOptimizer(files, vectors, groups, {name: number for number, name in enumerate(model.module)})

    def masters(self) -> dict[str, StoredTensor]:
        """The master weights by name."""
        return {
            name: self._tensor(name, shape, vector, list(vector.master))
            for vector in self.vectors
            for name, shape in vector.shapes.items()
        }

    def stored(self) -> StoredOptimizer:
        """Adam's groups and state, by names that are certain.

        Raises:
            InputError: ranks are at different steps, or their state does not cover a parameter.
        """
        names: list[list[str]] = [[] for _ in self.groups]
        state: dict[int, dict[str, Any]] = {}
        index: dict[str, int] = {}
        for vector in self.vectors:
            steps = self._steps(vector)
            for name, shape in vector.shapes.items():
                index[name] = len(index)
                names[vector.settings].append(name)
                entry: dict[str, Any] = {} if steps is None else {"step": steps}
                for key, value in vector.state[0].items():
                    if key != "step":
                        entry[key] = self._moment(vector, key, value, name, shape)
                if any(key != "step" for key in entry):
                    state[index[name]] = entry
        groups = []
        for group, listed in zip(self.groups, names, strict=True):
            # Ranks may have dealt them out in another order, to have equal shares.
            listed.sort(key=lambda name: self.order.get(name, len(self.order)))
            settings = adam_settings(group, self.files)
            groups.append({**settings, "params": [index[name] for name in listed], "param_names": listed})
        return StoredOptimizer(self.files.path.parent, groups, state, exact_names=True)

    def _steps(self, vector: FlatGroup) -> object:
        """Adam's step of a vector: in its state, or as DeepSpeed's own Adam keeps it in the group."""
        found = [entry.get("step", self.groups[vector.settings].get("step")) for entry in vector.state]
        numbers = [step.item() if isinstance(step, Tensor) and step.numel() == 1 else step for step in found]
        for file, step in zip(self.files.files, numbers, strict=True):
            if step != numbers[0]:
                raise InputError(
                    f"{file.path} is at Adam's step {step}, {self.files.path.name} at {numbers[0]}: files of different steps; "
                    "copy one step's"
                )
        return numbers[0]

    def _moment(self, vector: FlatGroup, key: str, value: object, name: str, shape: tuple[int, ...]) -> object:
        # What is no flat vector is told by its name when it is mapped to parameters.
        if not isinstance(value, Tensor) or value.dim() != 1 or value.numel() < vector.master[0].numel():
            return value
        flat = [entry.get(key) for entry in vector.state]
        parts = [part for part in flat if isinstance(part, Tensor)]
        if len(parts) != len(flat):
            rank = next(rank for rank, part in enumerate(flat) if not isinstance(part, Tensor))
            raise InputError(f"{self.files.files[rank].path} has no {key}, which rank 0 has; the file is damaged")
        return self._tensor(name, shape, vector, parts)

    def _tensor(self, name: str, shape: tuple[int, ...], vector: FlatGroup, flat: Sequence[Tensor]) -> StoredTensor:
        pieces = [flat[rank][start : start + length] for rank, start, length in vector.places[name]]
        try:
            return FlatTensor.of(shape, pieces or [flat[0][:0]], mapped=self.files.mapped)
        except ValueError as error:
            raise InputError(
                f"{self.files.path.parent}: the ranks' optim_states.pt do not hold {name} together ({error}); are they all of "
                "one checkpoint?"
            ) from error


def adam_settings(group: Mapping[str, Any], files: OptimizerStates | None = None) -> Mapping[str, Any]:
    """A group as torch's Adam would write it, from DeepSpeed's own Adam, which has no amsgrad.

    Raises:
        InputError: without bias correction, which no step here takes.
    """
    corrected = group.get("bias_correction")
    if corrected is None or "max_grad_norm" in group or "max_coeff" in group:
        return group
    if not corrected:
        where = "the optimizer" if files is None else str(files.path)
        raise InputError(f"{where} was trained without bias correction; the probe knows Adam with it")
    told = files.settings("optimizer") if files is not None else {}
    parameters = told.get("params")
    l2 = (
        str(told.get("type", "")).lower() == "adam"
        and isinstance(parameters, Mapping)
        and parameters.get("adam_w_mode", True) is False
    )
    return {"amsgrad": False, "decoupled_weight_decay": not l2, **group}


def _base(files: OptimizerStates, rank: int, key: str) -> Mapping[str, Any]:
    found, path = files.states[rank].get(key), files.files[rank].path
    if isinstance(found, list):
        raise InputError(
            f"{path} was saved with elastic_checkpoint, which leaves the settings of the groups out; save without it"
        )
    if (
        not isinstance(found, Mapping)
        or not isinstance(found.get("state"), Mapping)
        or not all(isinstance(entry, Mapping) for entry in found["state"].values())
        or not isinstance(found.get("param_groups"), list)
        or not all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in found["param_groups"])
    ):
        raise InputError(f"{path} holds no state and param_groups under {key}; the file is damaged")
    return found


def _vector(files: OptimizerStates, rank: int, key: str, number: int, expected: int) -> Tensor:
    found, path = files.states[rank].get(key), files.files[rank].path
    if not isinstance(found, Sequence) or len(found) != expected or not isinstance(found[number], Tensor):
        held = len(found) if isinstance(found, Sequence) else type(found).__name__
        raise InputError(
            f"{path} has {held} under {key}, the model states name {expected} groups; copy one step's files"
        )
    vector: Tensor = found[number]
    return vector.reshape(-1)


def _pieces_of_each(files: OptimizerStates, number: int, shapes: Shapes, master: Sequence[Tensor]) -> dict[str, Place]:
    """Stage 3."""
    found: dict[str, Place] = {}
    at = 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        each = -(-numel // files.count)
        lengths = [max(0, min(each, numel - rank * each)) for rank in range(files.count)]
        found[name] = [(rank, at, length) for rank, length in enumerate(lengths) if length]
        at += each
    for rank, part in enumerate(master):
        if part.numel() < at:
            raise InputError(
                f"{files.files[rank].path} holds {part.numel()} elements of group {number}, the shapes of its parameters want "
                f"{at} of each of {files.count} ranks; is it of another checkpoint?"
            )
    return found


def _runs(files: OptimizerStates, number: int, shapes: Shapes, master: Sequence[Tensor]) -> dict[str, Place]:
    """Stages 1 and 2: by the ranks' mappings, or one parameter after the other where they have none."""
    mappings = [state.get("param_slice_mappings") for state in files.states]
    found: dict[str, list[tuple[int, int, int]]] = {name: [] for name in shapes}
    if all(mapping is None for mapping in mappings):
        return _one_after_the_other(shapes, master)
    for rank, mapping in enumerate(mappings):
        path = files.files[rank].path
        if not isinstance(mapping, Sequence) or number >= len(mapping) or not isinstance(mapping[number], Mapping):
            raise InputError(f"{path} has no param_slice_mappings for group {number}; the file is damaged")
        for key, value in mapping[number].items():
            where, name = fragment(value), live_name(str(key))
            if where is None or name not in found:
                raise InputError(
                    f"{path} has {name} in group {number}, where the model states do not; copy one step's files"
                )
            found[name].append((rank, *where))
    return dict(found)


def _one_after_the_other(shapes: Shapes, master: Sequence[Tensor]) -> dict[str, Place]:
    found: dict[str, Place] = {}
    begins = [sum(part.numel() for part in master[:rank]) for rank in range(len(master))]
    at = 0
    for name, shape in shapes.items():
        end = at + math.prod(shape)
        found[name] = [
            (rank, max(at - begin, 0), min(end, begin + part.numel()) - max(at, begin))
            for rank, (begin, part) in enumerate(zip(begins, master, strict=True))
            if max(at, begin) < min(end, begin + part.numel())
        ]
        at = end
    return found
