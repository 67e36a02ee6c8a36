"""``torch.save`` of an optimizer's state_dict, such as the Trainer's ``optimizer.pt``.

It holds ``{"state": {index: {...}}, "param_groups": [...]}``, or names in the place of indices. It is read with
``weights_only=True``: nothing pickled is ever executed. Moments that bitsandbytes or torchao stored in codes are dequantised as
they are read.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe.checkpoints.files.bitsandbytes_state import adam_of_bitsandbytes
from entropy_probe.checkpoints.files.other_optimizers import ADVICE, FOREIGN_CODE
from entropy_probe.checkpoints.files.stored import MappedTensor, StoredOptimizer
from entropy_probe.checkpoints.files.torchao_state import CLASSES, Coded, adam_of_torchao, coded
from entropy_probe.errors import InputError, one_line, out_of_memory

INSIDE = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
"""What wrappers put inside of parameters' names."""

NAMED_CODE = re.compile(r"GLOBAL ([\w.]+)")
"""In torch's refusal to unpickle with weights alone: what the file would import."""


def read_optimizer_file(path: Path) -> StoredOptimizer:
    """The groups and the state by index; tensors are mapped and not yet read.

    Raises:
        InputError: no file, not loadable without executing a pickle, no optimizer's state_dict, or that of another optimizer
            of bitsandbytes.
    """
    saved = _read(path)
    state, groups = saved["state"], saved["param_groups"]
    _refuse_malformed(state, groups, path)
    if not any(isinstance(param, str) for group in groups for param in group["params"]):
        return stored_optimizer(path, groups, state)
    return by_names(path, groups, state)


def by_names(
    path: Path, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Mapping[str, Any]]
) -> StoredOptimizer:
    """The same of groups and state by parameters' names, as FSDP gives them.

    Raises:
        InputError: as above, or a name that is listed twice.
    """
    names = [INSIDE.sub("", str(name)) for group in groups for name in group["params"]]
    index = {name: number for number, name in enumerate(names)}
    if len(index) < len(names):
        twice = next(name for number, name in enumerate(names) if index[name] != number)
        raise InputError(f"{path}: 'param_groups' list {twice} twice; the file is damaged")
    indexed = []
    for group in groups:
        own = [INSIDE.sub("", str(name)) for name in group["params"]]
        indexed.append({**group, "params": [index[name] for name in own], "param_names": own})
    entries = {INSIDE.sub("", str(name)): entry for name, entry in state.items()}
    strays = sorted(entries.keys() - index.keys())
    if strays:
        raise InputError(f"{path}: 'state' holds {strays[0]}, which no group lists; the file is damaged")
    found = stored_optimizer(path, indexed, {index[name]: entry for name, entry in entries.items()})
    return replace(found, exact_names=True)


def stored_optimizer(
    path: Path, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Mapping[str, Any]]
) -> StoredOptimizer:
    """A state_dict's groups and state, as Adam's where bitsandbytes or torchao wrote it.

    Raises:
        InputError: another optimizer of bitsandbytes, or codes that are damaged.
    """
    try:
        stored = {index: {key: _stored(value) for key, value in entry.items()} for index, entry in state.items()}
    except ValueError as error:
        raise InputError(f"{path} holds {error}; the optimizer state is damaged") from error
    return adam_of_bitsandbytes(adam_of_torchao(StoredOptimizer(path, groups, stored)), ADVICE)


def _stored(value: object) -> object:
    if isinstance(value, Coded):
        return coded(value)
    # What else there may be is refused when it is mapped to names.
    dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_complex()
    return MappedTensor.of(value) if isinstance(value, Tensor) and dense else value


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; the probe needs Adam's state (a Trainer leaves it out with save_only_model=True)"
        )
    try:
        with torch.serialization.safe_globals([(Coded, name) for name in CLASSES]):
            # Mapped: ranks on one machine share its pages, and one that keeps a part reads no more.
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        if out_of_memory(error):
            raise
        raise InputError(_unreadable(path, error)) from error
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        found = sorted(map(str, saved))[:5] if isinstance(saved, dict) else type(saved).__name__
        raise InputError(
            f"{path} holds {found}; expected the keys 'state' and 'param_groups' of an optimizer's state_dict"
        )
    return saved


def _unreadable(path: Path, error: Exception) -> str:
    code = NAMED_CODE.search(str(error))
    if code is not None:
        name = code.group(1)
        owner = next((of for prefix, of in FOREIGN_CODE if name.startswith(prefix)), None)
        told = "is not read" if owner is None else f"holds the state of {owner}, which is not read"
        return f"{path} {told}: it names {name}, and weights_only=True runs no code; {ADVICE}"
    return (
        f"{path} cannot be read with weights_only=True ({one_line(error, 160)}); expected torch.save of an optimizer's "
        "state_dict"
    )


def _refuse_malformed(state: object, groups: object, path: Path) -> None:
    if not isinstance(state, Mapping) or not all(isinstance(entry, Mapping) for entry in state.values()):
        raise InputError(
            f"{path}: 'state' is not a dictionary with a dictionary for each parameter; the file is damaged"
        )
    if not isinstance(groups, list) or not groups:
        raise InputError(f"{path}: 'param_groups' is not a list of groups; the file is damaged")
    if not all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups):
        raise InputError(
            f"{path}: a group of 'param_groups' is not a dictionary with a list 'params'; the file is damaged"
        )
    listed = {index for group in groups for index in group["params"] if isinstance(index, int)}
    strays = sorted(index for index in state if isinstance(index, int) and index not in listed)
    if strays:
        raise InputError(
            f"{path}: 'state' holds index {strays[0]}, which no group lists: group sizes do not fit it; the file is damaged"
        )
