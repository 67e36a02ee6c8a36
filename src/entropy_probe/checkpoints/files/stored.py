"""What is on disk, known before it is read: tensors by shape and type, and an optimizer's groups with the state they index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe.checkpoints.files.samples import windows
from entropy_probe.common.evidence import Evidence


@dataclass(frozen=True)
class StoredTensor(ABC):
    """A tensor on disk, whose values are not read yet.

    Attributes:
        shape: of the whole tensor, whoever holds which rows of it.
        dtype: the type of what ``read`` gives.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def read(self, rows: slice | None = None) -> Tensor:
        """The whole tensor, or these rows of dimension 0, on the CPU.

        Rows have memory of their own; the whole tensor may share that of the file.

        Raises:
            InputError: the file is missing or damaged.
        """

    def sample(self) -> list[Tensor]:
        """A few elements, the same on all ranks, that tell one checkpoint from another.

        Raises:
            InputError: the file is missing or damaged.
        """
        if not self.shape:
            return [self.read()]
        return [self.read(window[0])[(slice(None), *window[1:])] for window in windows(self.shape)]


@dataclass(frozen=True)
class MappedTensor(StoredTensor):
    """A tensor that torch has mapped from a file, or that is in memory."""

    tensor: Tensor

    @staticmethod
    def of(tensor: Tensor) -> MappedTensor:
        """The tensor with its shape and type."""
        return MappedTensor(tuple(tensor.shape), tensor.dtype, tensor)

    def read(self, rows: slice | None = None) -> Tensor:
        """The tensor itself, or a copy of the rows: a view of them would keep the mapped file."""
        if rows is None:
            return self.tensor
        return self.tensor[rows].clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class StoredOptimizer:
    """An optimizer's state as ``torch.optim.Optimizer.state_dict()`` has it, with tensors that are not read yet.

    Attributes:
        path: what refusals name.
        groups: ``param_groups``; each lists the indices of its parameters under ``params``, and their names under
            ``param_names`` where these are stored.
        state: by index, the entries of a parameter: for Adam step, exp_avg, exp_avg_sq and amsgrad's max_exp_avg_sq, each a
            :class:`StoredTensor` or a number. Anything else is refused when it is mapped to parameters.
        exact_names: whether ``param_names`` are certain to be the trained model's, so that a name that the model here lacks is
            another model's and nothing is matched by shapes.
        notes: what a report should warn of.
    """

    path: Path
    groups: Sequence[Mapping[str, Any]]
    state: Mapping[Any, Mapping[str, Any]]
    exact_names: bool = False
    notes: tuple[Evidence, ...] = ()

    def sample(self) -> dict[str, Tensor]:
        """Steps, and a few elements of every moment, the same on all ranks.

        Raises:
            InputError: a file or part of one is missing or damaged.
        """
        values = {f"{index} {key}": value for index, entry in self.state.items() for key, value in entry.items()}
        numbers = {name: torch.tensor(value) for name, value in values.items() if isinstance(value, int | float)}
        tensors = {name: value for name, value in values.items() if isinstance(value, StoredTensor)}
        return numbers | sample_of(tensors)


def sample_of(tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """A few elements of every tensor, the same on all ranks; the names say key, whole shape and type.

    Raises:
        InputError: a file or part of one is missing or damaged.
    """
    return {
        f"{key} {tensors[key].shape} {tensors[key].dtype} {number}": part
        for key in sorted(tensors)
        for number, part in enumerate(tensors[key].sample())
    }
