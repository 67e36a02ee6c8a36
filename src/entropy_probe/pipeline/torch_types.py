"""Torch types as settings hold them: themselves, or their names; and mixed precision, which may also be off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import torch

from entropy_probe.common.choices import shown
from entropy_probe.errors import InputError

OFF: Final = "off"
"""No mixed precision, whatever the rows say of the trainer."""

Autocast = torch.dtype | Literal["off"] | None
"""Mixed precision over float32 weights: of a type, off, or None: as the rows say of the trainer."""


def torch_type(what: str, value: object, among: Sequence[torch.dtype]) -> torch.dtype:
    """One of these torch types, from itself or from its name, with ``torch.`` before it or not.

    Raises:
        InputError: none of them; they are listed.
    """
    for known in among:
        if value is known or (isinstance(value, str) and value in {str(known), dtype_name(known)}):
            return known
    raise InputError(f"{what} is {shown(value)}; known are {', '.join(map(dtype_name, among))}")


def dtype_name(dtype: torch.dtype) -> str:
    """As in ``float32``."""
    return str(dtype).removeprefix("torch.")


def autocast_setting(what: str, value: object) -> Autocast:
    """A field of the type :data:`Autocast`.

    Raises:
        InputError: anything else.
    """
    if value is None:
        return None
    if isinstance(value, str) and value == OFF:
        return OFF
    try:
        return torch_type(what, value, (torch.bfloat16, torch.float16))
    except InputError as error:
        raise InputError(f"{error}, {OFF}") from error


def autocast_name(autocast: Autocast) -> str | None:
    """As in ``bfloat16``, or off."""
    return dtype_name(autocast) if isinstance(autocast, torch.dtype) else autocast
