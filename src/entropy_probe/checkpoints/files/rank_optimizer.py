"""The optimizer in FSDP ranks' files: FSDP2's by parameter, FSDP1's by flat unit; names are from the model's files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from entropy_probe.checkpoints.files.flat_units import LEAF, units_that_fit
from entropy_probe.checkpoints.files.pieces import FlatTensor, run_of
from entropy_probe.checkpoints.files.rank_files import EXPECTED, RankFiles, live_name
from entropy_probe.checkpoints.files.stored import StoredOptimizer, StoredTensor
from entropy_probe.errors import InputError
from entropy_probe.ranks.same_inputs import digest_of_tensors

OF_MODEL, OF_OPTIMIZER = EXPECTED["model"], EXPECTED["optim"]


class RankOptimizer:
    """The ranks' optimizer files beside the model's."""

    def __init__(self, folder: Path, files: RankFiles) -> None:
        """Look at the groups and at whose state there is.

        Raises:
            InputError: the files hold no optimizer's state_dict.
        """
        self.folder, self.files = folder, files
        self.states: list[Mapping[Any, Any]] = files.dictionaries("state", of=OF_OPTIMIZER)
        self.groups = files.files[0].content.get("param_groups")
        if not isinstance(self.groups, list) or not all(
            isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in self.groups
        ):
            raise InputError(f"{files.files[0].path} holds no param_groups; expected {OF_OPTIMIZER}")
        for state, file in zip(self.states, files.files, strict=True):
            if not all(isinstance(entry, Mapping) for entry in state.values()):
                raise InputError(f"{file.path}: 'state' has no dictionary a parameter; expected {OF_OPTIMIZER}")
        self.indices: list[Any] = [index for group in self.groups for index in group["params"]]
        self.present = [index for index in self.indices if any(index in state for state in self.states)]

    def stored(self) -> StoredOptimizer:
        """FSDP2's where any moment is a DTensor, or there are no flat ones."""
        entries = [entry for state in self.states for entry in state.values()]
        tensors = [value for entry in entries for value in entry.values() if isinstance(value, Tensor) and value.dim()]
        flat = bool(tensors) and all(not isinstance(value, DTensor) and value.dim() == 1 for value in tensors)
        return self._of_units() if flat else self._of_parameters()

    def _step(self, index: object) -> object:
        """Adam's step of an index.

        Raises:
            InputError: ranks have other ones.
        """
        steps = {rank: state[index].get("step") for rank, state in enumerate(self.states) if index in state}
        first = next(iter(steps))
        for rank, step in steps.items():
            if _number(step) != _number(steps[first]):
                one, other = (self.files.files[number].path.name for number in (first, rank))
                raise InputError(
                    f"{self.folder / other} is at Adam's step {_number(step)}, {one} at {_number(steps[first])}: files of "
                    "different steps; copy one step's"
                )
        return _number(steps[first])

    def _of_parameters(self) -> StoredOptimizer:
        state: dict[Any, dict[str, Any]] = {}
        for index in self.present:
            if any(index not in other for other in self.states):
                rank = next(rank for rank, other in enumerate(self.states) if index not in other)
                raise InputError(f"{self.files.files[rank].path} has no state of index {index}, which other ranks have")
            values = [other[index] for other in self.states]
            state[index] = {"step": self._step(index)} if "step" in values[0] else {}
            for key, value in values[0].items():
                if key == "step":
                    continue
                what = f"{key} of index {index}"
                missing = [rank for rank, other in enumerate(values) if key not in other]
                if missing:
                    raise InputError(f"{self.files.files[missing[0]].path} has no {what}, which rank 0 has")
                state[index][key] = (
                    self.files.whole(what, [other[key] for other in values]) if isinstance(value, Tensor) else value
                )
        if all(isinstance(index, str) for index in self.indices):
            return self._named(state, {index: live_name(index) for index in self.indices})
        names = self._names(state) if len(self.groups) == 1 else None
        return StoredOptimizer(self.folder, self.groups, state) if names is None else self._named(state, names)

    def _named(self, state: Mapping[Any, Mapping[str, Any]], names: Mapping[Any, str]) -> StoredOptimizer:
        """By names; those without state were frozen, unless none has one."""
        kept = set(self.present or self.indices)
        groups = []
        for group in self.groups:
            params = [index for index in group["params"] if index in kept]
            groups.append({**group, "params": params, "param_names": [names[index] for index in params]})
        return StoredOptimizer(self.folder, groups, state, exact_names=True)

    def _names(self, state: Mapping[Any, Mapping[str, Any]]) -> dict[Any, str] | None:
        """By index, from the model's files; None where these do not tell."""
        for names, shapes, indices in self._candidates():
            stored = [state.get(index, {}).get("exp_avg_sq") for index in indices]
            if len(names) == len(indices) and all(
                not isinstance(moment, StoredTensor) or moment.shape == shapes[name]
                for name, moment in zip(names, stored, strict=True)
            ):
                return dict(zip(indices, names, strict=True))
        return None

    def _candidates(self) -> Iterator[tuple[list[str], dict[str, tuple[int, ...]], list[Any]]]:
        """Names of parameters, their shapes and the indices that may be theirs: all, tied ones once, and LoRA's own."""
        files = RankFiles.open(self.folder, "model")
        if files is None:
            return
        found = list(files.tensors())
        # Buffers are no DTensors; a single rank may have none of these at all.
        cut = any(isinstance(value, DTensor) for _, _, value in found)
        parameters = {name: tensor for name, tensor, value in found if isinstance(value, DTensor) or not cut}
        shapes = {name: tensor.shape for name, tensor in parameters.items()}
        repeated = _repeated(parameters)
        yield [name for name in parameters if name not in repeated], shapes, self.indices
        yield list(parameters), shapes, self.indices
        adapter = [name for name in parameters if LEAF.match(name)]
        yield adapter, shapes, self.indices
        if len(adapter) == len(parameters):
            # The base was left out of the model's files, and has indices without state.
            yield adapter, shapes, self.present

    def _of_units(self) -> StoredOptimizer:
        if len(self.groups) != 1:
            raise InputError(
                f"{self.folder}: FSDP1's flat optimizer has {len(self.groups)} groups; expected one, as verl's"
            )
        ordered = self._in_order()
        held = {index: [_held(state.get(index, {})) for state in ordered] for index in self.present}
        for names, shapes, indices in self._candidates():
            units = units_that_fit(names, shapes, [held.get(index) for index in indices])
            if units is not None:
                trained = [
                    (index, unit) for index, unit in zip(indices, units, strict=True) if index in held or not held
                ]
                return self._split(trained, names, shapes, ordered)
        first = sum(next(iter(held.values())))
        raise InputError(
            f"{self.folder}: FSDP1's optimizer has {len(self.indices)} flat units, of which the first with state has {first} "
            "elements, and no known way to wrap the model of model_world_size_*.pt gives these (decoder layers; these and "
            "LoRA's modules; the whole model); save with FSDP2 (strategy: fsdp2)"
        )

    def _in_order(self) -> list[Mapping[Any, Any]]:
        """The states of the ranks that together hold one copy, in the order of their parts."""
        files = RankFiles.open(self.folder, "model")
        if files is None or len(files.files) != len(self.states):
            return self.states
        states = files.dictionaries(of=OF_MODEL)
        key = next((key for key, value in states[0].items() if isinstance(value, DTensor)), None)
        if key is None:
            return self.states
        parts = files.parts(str(key), [state[key] for state in states])
        ranks = {part.index: rank for rank, part in reversed(list(enumerate(parts)))}
        return [self.states[ranks[index]] for index in sorted(ranks)]

    def _split(
        self,
        units: Sequence[tuple[Any, Sequence[str]]],
        order: Sequence[str],
        shapes: Mapping[str, tuple[int, ...]],
        ordered: Sequence[Mapping[Any, Any]],
    ) -> StoredOptimizer:
        """By parameter, in the order of ``named_parameters``; units are with the index of their state."""
        place = {name: number for number, name in enumerate(order)}
        listed = sorted((name for _, unit in units for name in unit), key=place.__getitem__)
        number = {name: index for index, name in enumerate(listed)}
        state: dict[int, dict[str, Any]] = {}
        for index, unit in units:
            size, at = sum(math.prod(shapes[name]) for name in unit), 0
            entries = [other[index] for other in ordered if index in other]
            if all(_held(entry) == size for entry in entries):
                # Not cut: every rank has all of it.
                entries = entries[:1]
            for name in unit:
                if entries:
                    state[number[name]] = {"step": self._step(index)}
                    for key, value in entries[0].items():
                        if key != "step":
                            state[number[name]][key] = self._slice(entries, key, value, at, shapes[name])
                at += math.prod(shapes[name])
        group = {**self.groups[0], "params": list(range(len(listed))), "param_names": listed}
        return StoredOptimizer(self.folder, [group], state, exact_names=True)

    def _slice(
        self, entries: Sequence[Mapping[str, Any]], key: str, value: object, at: int, shape: Sequence[int]
    ) -> object:
        if not isinstance(value, Tensor):
            return value
        flat = [entry[key] for entry in entries if isinstance(entry.get(key), Tensor)]
        try:
            run = run_of(flat, at, math.prod(shape))
            return FlatTensor.of(shape, run, mapped=self.files.mapped)
        except ValueError as error:
            raise InputError(
                f"{self.folder}: optim_world_size_*.pt: {key} at {at}: {error}; the files are damaged"
            ) from error


def _number(step: object) -> float | object:
    return step.item() if isinstance(step, Tensor) and step.numel() == 1 else step


def _held(entry: Mapping[str, Any]) -> int:
    moment = entry.get("exp_avg_sq")
    return moment.numel() if isinstance(moment, Tensor) else 0


def _repeated(tensors: Mapping[str, StoredTensor]) -> set[str]:
    """Names under which an earlier matrix is stored again, as the output head is that is tied to the embeddings."""
    seen: set[tuple[tuple[int, ...], bytes]] = set()
    found = set()
    for name, tensor in tensors.items():
        parts = [part for part in tensor.sample() if part.numel()]
        # Matrices of one value are LoRA's that were never trained.
        if len(tensor.shape) < 2 or not any(bool((part != part.flatten()[0]).any()) for part in parts):
            continue
        key = (tensor.shape, digest_of_tensors({str(number): part for number, part in enumerate(parts)}))
        if key in seen:
            found.add(name)
        seen.add(key)
    return found
