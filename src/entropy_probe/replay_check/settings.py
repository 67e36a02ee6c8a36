"""How to replay, and up to what difference two steps count as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from entropy_probe.common.choices import Check, member, number, optional, settle
from entropy_probe.errors import InputError
from entropy_probe.losses.advantages import AdvantageRule
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.pipeline.settings import (
    COUNT,
    POSITIVE,
    Autocast,
    autocast_setting,
    refuse_autocast_elsewhere,
    torch_type,
)

TOLERANCE = 1e-4
"""Net error up to which the two updates count as one; float32's own is 1e-7 to 2e-5 (measured)."""

GRADIENT_TOLERANCE = 1e-3
"""The same of the loss gradient. The update is mostly momentum and says little of it; 1e-6 to 2e-5 measured in float32."""

MIXED_TOLERANCE = 0.05
"""The same under mixed precision, whose 8 bits another order of sums does not repeat (1.2 % measured in bfloat16)."""


@dataclass(frozen=True)
class ReplaySettings:
    """How to replay. None takes what the recorder wrote into the rows (:mod:`entropy_probe.pipeline.recorded`).

    Names and torch types may be given as text: ``ReplaySettings(length_weight="dapo", dtype="float64")``.

    Attributes:
        length_weight: of the training loss; None: by the rows' loss_type.
        advantage: None takes the rows' own if they have any, else dr_grpo.
        max_completion_length: Dr. GRPO's constant.
        max_grad_norm: gradient norm that the trainer clips at; 0 does not clip.
        learning_rate: of this step; None: as recorded, else as stored at N, which is the next step's.
        dtype: of weights and arithmetic, float32 or float64.
        autocast: mixed precision over float32 weights; None: as recorded, else none; "off": none.
        microbatch_size: responses in one forward; None takes what fits.
        memory_bytes: what may be used; None takes what is free.
    """

    length_weight: LengthWeight | None = None
    advantage: AdvantageRule | None = None
    max_completion_length: int | None = None
    max_grad_norm: float | None = None
    learning_rate: float | None = None
    dtype: torch.dtype = torch.float32
    autocast: Autocast = None
    microbatch_size: int | None = None
    memory_bytes: float | None = None

    def __post_init__(self) -> None:
        """Put text into the fields' own types, and refuse values that cannot be meant."""
        settle(self, CHECKS)
        refuse_autocast_elsewhere(self.autocast, self.dtype)


def exact_dtype(what: str, value: object) -> torch.dtype:
    """Of weights whose rounding must not hide what is compared.

    Raises:
        InputError: another type.
    """
    try:
        return torch_type(what, value, (torch.float32, torch.float64))
    except InputError as error:
        raise InputError(f"{error}: a replay in fewer bits would round the very weights that it compares") from error


CHECKS: Mapping[str, Check] = {
    "length_weight": optional(partial(member, kind=LengthWeight)),
    "advantage": optional(partial(member, kind=AdvantageRule)),
    "max_completion_length": COUNT,
    "max_grad_norm": optional(number),
    "learning_rate": optional(number),
    "dtype": exact_dtype,
    "autocast": autocast_setting,
    "microbatch_size": COUNT,
    "memory_bytes": POSITIVE,
}
"""What each field may hold."""
