"""How to replay, and up to what difference two steps count as one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from entropy_probe.common.fields import described, setting
from entropy_probe.errors import InputError
from entropy_probe.pipeline.settings import StepSettings
from entropy_probe.pipeline.torch_types import torch_type

TOLERANCE = 1e-4
"""Net error up to which the two updates count as one; float32's own is 1e-7 to 2e-5 (measured)."""

GRADIENT_TOLERANCE = 1e-3
"""The same of the loss gradient. The update is mostly momentum and says little of it; 1e-6 to 2e-5 measured in float32."""

MIXED_TOLERANCE = 0.05
"""The same under mixed precision, whose 8 bits another order of sums does not repeat (1.2 % measured in bfloat16)."""


def exact_dtype(what: str, value: object) -> torch.dtype:
    """Of weights whose rounding must not hide what is compared.

    Raises:
        InputError: another type.
    """
    try:
        return torch_type(what, value, (torch.float32, torch.float64))
    except InputError as error:
        raise InputError(f"{error}: a replay in fewer bits would round the very weights that it compares") from error


@described
@dataclass(frozen=True)
class ReplaySettings(StepSettings):
    """How to replay. None takes what the recorder wrote into the rows (:mod:`entropy_probe.pipeline.recorded`).

    Names and torch types may be given as text: ``ReplaySettings(length_weight="dapo", dtype="float64")``.

    Raises:
        InputError: a name that is not known (the known ones are listed), or a number out of range.

    Example:
        >>> from entropy_probe import ReplaySettings
        >>> settings = ReplaySettings(length_weight="dapo", max_grad_norm=1.0)
    """

    dtype: torch.dtype = setting(torch.float32, exact_dtype, "Weights and arithmetic, float32 or float64.")
