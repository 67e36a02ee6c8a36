"""What a checkpoint's folder lacks and whoever has it can give beside it: a base, names, how the base was quantised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from entropy_probe.checkpoints.files.stored import StoredOptimizer, StoredTensor
from entropy_probe.checkpoints.run_time_quantisation import BaseQuantization
from entropy_probe.common.choices import member, path_of
from entropy_probe.common.files import read_json
from entropy_probe.errors import InputError, some_of


@dataclass(frozen=True)
class Beside:
    """What stands beside a checkpoint whose folder does not hold it; wherever a base's folder is taken, this may be given.

    Attributes:
        base: folder of the base model, for an adapter; for full weights without a configuration the folder that has it.
        names: a JSON file, an object of the checkpoint's parameter names to Hugging Face's; a name that is not in it stays.
        base_quantization: how the base under an adapter was quantised as it was loaded for training; None where it was not.

    Raises:
        InputError: no path, or an unknown quantisation.

    Example:
        >>> from entropy_probe import Beside
        >>> Beside("Qwen/Qwen2.5-0.5B", base_quantization="nf4").base_quantization
        <BaseQuantization.NF4: 'nf4'>
    """

    base: str | Path | None = None
    names: str | Path | None = None
    base_quantization: BaseQuantization | str | None = None

    def __post_init__(self) -> None:
        """Put paths and the name of a quantisation into their own types, and refuse others."""
        for field in ("base", "names"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, path_of(field, getattr(self, field)))
        if self.base_quantization is not None:
            found = member("base_quantization", self.base_quantization, BaseQuantization)
            object.__setattr__(self, "base_quantization", found)

    @staticmethod
    def of(given: str | Path | Beside | None) -> Beside:
        """The record; of a folder, with that as base."""
        return given if isinstance(given, Beside) else Beside(given)

    @property
    def folder(self) -> Path | None:
        """The base's."""
        return None if self.base is None else path_of("base", self.base)

    @property
    def quantization(self) -> BaseQuantization | None:
        """Of the base, as the member."""
        return None if self.base_quantization is None else BaseQuantization(self.base_quantization)

    @property
    def given(self) -> bool:
        """Whether there is a base."""
        return self.base is not None


def read_names(beside: Beside) -> Mapping[str, str] | None:
    """The names' file; None where none was given.

    Raises:
        InputError: it is no object of names, or gives two one name.
    """
    if beside.names is None:
        return None
    file = path_of("names", beside.names)
    found: Mapping[str, Any] = read_json(file)
    wrong = [name for name, other in found.items() if not isinstance(other, str) or not other]
    if wrong or not found:
        what = f"gives {some_of(wrong)} no name" if wrong else "holds no names"
        raise InputError(f"{file} {what}; expected an object of the checkpoint's parameter names to Hugging Face's")
    twice = [name for name in found.values() if list(found.values()).count(name) > 1]
    if twice:
        raise InputError(f"{file} gives two parameters one name, {twice[0]}; expected one for each")
    return found


def renamed_tensors(
    tensors: Mapping[str, StoredTensor], names: Mapping[str, str], beside: Beside
) -> dict[str, StoredTensor]:
    """Tensors by their names in the model.

    Raises:
        InputError: none of the names is a tensor's, or two would have one.
    """
    if not names.keys() & tensors.keys():
        raise InputError(
            f"{beside.names} names {some_of(list(names))}, of which the checkpoint has none; its names are "
            f"{some_of(list(tensors))}"
        )
    found = {names.get(name, name): tensor for name, tensor in tensors.items()}
    if len(found) < len(tensors):
        clash = next(
            new for old, new in names.items() if old in tensors and new != old and new in tensors and new not in names
        )
        raise InputError(f"{beside.names} gives a parameter the name {clash}, which another one of the checkpoint has")
    return found


def renamed_optimizer(stored: StoredOptimizer, names: Mapping[str, str]) -> StoredOptimizer:
    """The optimizer with its parameters' names in the model, where it has names."""
    groups = [
        {**group, "param_names": [names.get(str(name), str(name)) for name in group["param_names"]]}
        if "param_names" in group
        else group
        for group in stored.groups
    ]
    return replace(stored, groups=groups)
