"""How to replay: what is given, and what the recorder wrote into the rows where nothing is given."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch

from entropy_probe.diagnostics import LENGTH_WEIGHT_OF_LOSS
from entropy_probe.errors import InputError
from entropy_probe.rollouts import RolloutBatch
from entropy_probe.scores import AdvantageRule, LengthWeight

TOLERANCE = 1e-4
"""Net error up to which the two updates count as one; float32's own is 1e-7 to 2e-5 (measured)."""

GRADIENT_TOLERANCE = 1e-3
"""The same of the loss gradient. The update is mostly momentum and says little of it; 1e-6 to 2e-5 measured in float32."""

MIXED_TOLERANCE = 0.05
"""The same under mixed precision, whose 8 bits another order of sums does not repeat (1.2 % measured in bfloat16)."""

LARGEST = sys.float_info.max

MIXED_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Accelerate's names."""


@dataclass(frozen=True)
class ReplaySettings:
    """How to replay. None takes what the recorder wrote into the rows.

    Attributes:
        length_weight: of the training loss; None: by the rows' loss_type.
        advantage: None takes the rows' own if they have any, else dr_grpo.
        max_completion_length: Dr. GRPO's constant.
        max_grad_norm: gradient norm that the trainer clips at; 0 does not clip.
        learning_rate: of this step; None: as stored at N, which is the next step's.
        dtype: of weights and arithmetic, float32 or float64.
        autocast: mixed precision over float32 weights; None: as recorded, else none.
        microbatch_size: responses in one forward; None takes what fits.
        memory_bytes: what may be used; None takes what is free.
    """

    length_weight: LengthWeight | None = None
    advantage: AdvantageRule | None = None
    max_completion_length: int | None = None
    max_grad_norm: float | None = None
    learning_rate: float | None = None
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    microbatch_size: int | None = None
    memory_bytes: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if self.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"replay in {str(self.dtype).removeprefix('torch.')} would round the very weights that it compares; "
                "expected float32 or float64"
            )
        if self.max_grad_norm is not None and not 0.0 <= self.max_grad_norm < math.inf:
            raise InputError(
                f"max-grad-norm is {self.max_grad_norm}; expected a finite number, 0 or above (0 does not clip)"
            )


def resolve_length_weight(batch: RolloutBatch, settings: ReplaySettings) -> LengthWeight:
    """That of the training loss.

    Raises:
        InputError: neither the settings nor the rows say.
    """
    if settings.length_weight is not None:
        return settings.length_weight
    loss = batch.responses[0].loss_type
    known = LENGTH_WEIGHT_OF_LOSS.get(loss or "")
    if known is None:
        found = "the rows name no loss_type" if loss is None else f"loss_type {loss} is not known"
        raise InputError(
            f"{found}; give --length-weight with the trainer's loss: dapo (TRL's default), grpo, dr_grpo or bnpo"
        )
    return known


def recorded_number(batch: RolloutBatch, name: str) -> float | None:
    """A number that the recorder wrote into every row, or None.

    Raises:
        InputError: the rows disagree, or it is not a finite number, 0 or above.
    """
    values = [row.extra.get(name) for row in batch.responses]
    value = values[0]
    other = next((v for v in values if v != value and v is not value), value)
    if other is not value:
        raise InputError(
            f"the rows disagree about {name} ({str(value)[:20]} and {str(other)[:20]}); one step has one value"
        )
    if value is None:
        return None
    # The bound first: an int of any size compares with a float, but not every one becomes one.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST:
        raise InputError(f"the rows say {name} is {str(value)[:20]}; expected a finite number, 0 or above")
    return float(value)


def recorded_count(batch: RolloutBatch, name: str) -> int | None:
    """A count, 1 or above, that the recorder wrote into every row, or None.

    Raises:
        InputError: as of :func:`recorded_number`, or it is no such count.
    """
    value = recorded_number(batch, name)
    if value is not None and (value < 1.0 or value != int(value)):
        raise InputError(f"the rows say {name} is {value:g}; expected a whole number, 1 or above")
    return None if value is None else int(value)


def check_recorded(batch: RolloutBatch) -> None:
    """Refuse rows whose recorded settings will not do, before anything is computed.

    Raises:
        InputError: see :func:`recorded_number`.
    """
    for name in ("max_grad_norm", "learning_rate"):
        recorded_number(batch, name)
    for name in ("num_processes", "num_generations"):
        recorded_count(batch, name)


def resolve_max_grad_norm(batch: RolloutBatch, settings: ReplaySettings) -> tuple[float | None, str]:
    """The norm to clip at, or None, and where that came from."""
    given = settings.max_grad_norm
    value, source = (given, "given") if given is not None else (recorded_number(batch, "max_grad_norm"), "recorded")
    if value is None:
        return None, "unknown"
    return (value if value > 0.0 else None), source


def resolve_autocast(batch: RolloutBatch, settings: ReplaySettings) -> torch.dtype | None:
    """The type of mixed precision, or None; in float64 there is none.

    Raises:
        InputError: it was asked for in float64.
    """
    if settings.autocast is not None:
        if settings.dtype is not torch.float32:
            raise InputError("--autocast goes with --dtype float32: mixed precision is over float32 weights")
        return settings.autocast
    recorded = batch.responses[0].extra.get("mixed_precision")
    return MIXED_PRECISION.get(str(recorded)) if settings.dtype is torch.float32 else None


def trained_mixed(batch: RolloutBatch) -> bool:
    """The recorder says that the trainer's arithmetic was of mixed precision, whatever it is replayed in."""
    return str(batch.responses[0].extra.get("mixed_precision")) in MIXED_PRECISION
