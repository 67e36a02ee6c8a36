"""DeepSpeed without ZeRO: ``torch.optim``'s own state_dict, by index, and in float16 runs the master weights beside it.

In float32 the module has the weights. The float16 optimizers keep float32 masters without names: a list a group
(``fp32_groups``), or one flat vector a group (``fp32_groups_flat``). Each is found among the module's tensors by its values,
which are the master's own, cast: groups are filled in the order of ``named_parameters``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe.checkpoints.files.pieces import FlatTensor
from entropy_probe.checkpoints.files.saved import dictionary
from entropy_probe.checkpoints.files.stored import StoredOptimizer, StoredTensor
from entropy_probe.checkpoints.files.zero_files import OF_MODEL, ModelStates, OptimizerStates
from entropy_probe.checkpoints.files.zero_flat import adam_settings
from entropy_probe.errors import InputError

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@dataclass(frozen=True)
class Unsharded:
    """The optimizer as one rank has it for all.

    Attributes:
        path: of the file.
        groups: ``param_groups``.
        state: by index.
        named: by group, the name and the master of every parameter; None where the module's weights are the masters.
        mapped: whether tensors are pages of the file.
    """

    path: Path
    groups: Sequence[Mapping[str, Any]]
    state: Mapping[Any, Mapping[str, Any]]
    named: Sequence[Sequence[tuple[str, Tensor]]] | None
    mapped: bool

    @staticmethod
    def of(model: ModelStates, files: OptimizerStates | None) -> Unsharded | None:
        """From the model states, or the optimizer states beside them; None where neither has an optimizer.

        Raises:
            InputError: no state_dict of an optimizer, or masters that are not the module's.
        """
        if files is not None:
            content, path, mapped = files.states[0], files.path, files.mapped
        elif model.files[0].content.get("optimizer") is None:
            return None
        else:
            content, path, mapped = dictionary(model.files[0], "optimizer", of=OF_MODEL), model.path, model.mapped
        base = content.get("optimizer_state_dict", content)
        if (
            not isinstance(base, Mapping)
            or not isinstance(base.get("state"), Mapping)
            or not all(isinstance(entry, Mapping) for entry in base["state"].values())
            or not isinstance(base.get("param_groups"), list)
            or not all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in base["param_groups"])
        ):
            raise InputError(f"{path} holds an optimizer without state and param_groups; the file is damaged")
        masters = content.get("fp32_groups", content.get("fp32_groups_flat"))
        named = None
        if masters is not None:
            named = [_named(model, list(group) if isinstance(group, list) else [group], path) for group in masters]
        return Unsharded(path, base["param_groups"], base["state"], named, mapped)

    def masters(self) -> dict[str, StoredTensor]:
        """The master weights by name; none where the module has them."""
        return {
            name: FlatTensor.of(tuple(master.shape), [master], mapped=self.mapped)
            for group in self.named or ()
            for name, master in group
        }

    def stored(self) -> StoredOptimizer:
        """By index; by names where masters told them."""
        if self.named is None:
            state = {index: {key: self._whole(value) for key, value in e.items()} for index, e in self.state.items()}
            return StoredOptimizer(self.path, [adam_settings(group) for group in self.groups], state)
        groups, state = [], {}
        number = 0
        for group, named in zip(self.groups, self.named, strict=True):
            flat = len(group["params"]) == 1 and len(named) > 1
            at, first = 0, number
            for place, (_, master) in enumerate(named):
                entry = dict(self.state.get(group["params"][0 if flat else place], {}))
                if flat:
                    cut = {key: value for key, value in entry.items() if isinstance(value, Tensor) and value.dim() == 1}
                    entry |= {key: value[at : at + master.numel()].view(master.shape) for key, value in cut.items()}
                entry.setdefault("step", group.get("step"))
                if any(key in entry for key in MOMENTS):
                    state[number] = {key: self._whole(value) for key, value in entry.items()}
                at += master.numel()
                number += 1
            indices = list(range(first, number))
            groups.append({**adam_settings(group), "params": indices, "param_names": [name for name, _ in named]})
        return StoredOptimizer(self.path, groups, state, exact_names=True)

    def _whole(self, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        if value.numel() == 1 and value.dim() == 0:
            return value.item()
        dense = value.layout is torch.strided and not value.is_complex()
        return FlatTensor.of(tuple(value.shape), [value], mapped=self.mapped) if dense else value


def _named(model: ModelStates, masters: Sequence[object], path: Path) -> list[tuple[str, Tensor]]:
    """The module's names of a group's masters, cut apart where they are one flat vector."""
    found: list[tuple[str, Tensor]] = []
    names = iter([(name, value) for name, value in model.module.items() if name not in model.tied])
    for master in masters:
        if not isinstance(master, Tensor):
            raise InputError(f"{path} holds a {type(master).__name__} among the master weights; the file is damaged")
        rest = master
        while rest.numel():
            for name, value in names:
                own = rest.reshape(-1)[: value.numel()]
                if own.numel() == value.numel() and torch.equal(own.to(value.dtype), value.reshape(-1)):
                    found.append((name, own.view(value.shape)))
                    rest = rest.reshape(-1)[value.numel() :]
                    break
            else:
                raise InputError(
                    f"{path}: the master weights after {found[-1][0] if found else 'the first'} are none of the module's, in "
                    "the order of its names; are the files of one step?"
                )
    return found
