"""Tensors by name: those that a trainer must hold and those that it may, of the shapes that it gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from entropy_probe.errors import InputError

Tensors = Mapping[str, Any]
"""A trainer's batch: tensors, or lists of them, by its names."""


def listed(tensor: Tensor) -> list[Any]:
    """A tensor's values in Python's own types; numbers of any precision exactly."""
    return tensor.detach().cpu().tolist()


def needed(tensors: Tensors, name: str) -> Any:
    """What a trainer holds under a name.

    Raises:
        InputError: nothing.
    """
    value = tensors.get(name)
    if value is None:
        there = ", ".join(key for key, held in tensors.items() if held is not None) or "none"
        raise InputError(f"there is no {name} among the tensors ({there}); give what the trainer holds at its step")
    return value


def tensor_of(name: str, value: object, dimensions: int) -> Tensor:
    """A tensor with so many dimensions.

    Raises:
        InputError: it is none, or has others.
    """
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is a {type(value).__name__}; expected a tensor")
    if value.ndim != dimensions:
        raise InputError(
            f"{name} has shape {list(value.shape)}; expected {dimensions} dimension{'s' * (dimensions > 1)}"
        )
    return value


def matrix(tensors: Tensors, name: str, shape: tuple[int, int] | None = None) -> list[list[Any]]:
    """A padded tensor, rows by places, row by row.

    Raises:
        InputError: it is missing, no tensor of two dimensions, or of another shape than its neighbours.
    """
    tensor = tensor_of(name, needed(tensors, name), 2)
    if not len(tensor):
        raise InputError(f"{name} has no rows; expected those of a step")
    if shape is not None and tuple(tensor.shape) != shape:
        raise InputError(
            f"{name} has shape {list(tensor.shape)}; expected {list(shape)}, rows by places as its neighbours"
        )
    return listed(tensor)


def vector(tensors: Tensors, name: str, length: int) -> list[Any] | None:
    """One value a row, from a tensor or a list; None where the trainer has none.

    Raises:
        InputError: another number of values.
    """
    value = tensors.get(name)
    if value is None:
        return None
    values = listed(value.flatten()) if isinstance(value, Tensor) else list(value)
    if len(values) != length:
        raise InputError(f"{name} has {len(values)} values for {length} rows; expected one each")
    return values


def flags(name: str, values: Sequence[Any]) -> list[bool]:
    """A mask's ones as true.

    Raises:
        InputError: it holds something else than 0 and 1.
    """
    other = next((value for value in values if value not in (0, 1)), None)
    if other is not None:
        raise InputError(f"{name} holds {other}; expected a mask of 0 and 1")
    return [bool(value) for value in values]
