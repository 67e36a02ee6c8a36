"""How the trainer takes its step: what the rows say of it is the default, what a caller says overrides it.

One resolver for a probe and for a replay, of the loss's length weight, the gradient's clip, mixed precision and the learning
rate. A recorder writes into every row ``loss_type`` and ``max_completion_length`` (columns of the schema), ``max_grad_norm``
(0: no clipping), ``mixed_precision`` (accelerate's names) and ``learning_rate``, of the step that consumed the row: the
first parameter group's, or a list with one a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from entropy_probe.common.choices import number, shown
from entropy_probe.common.source import Source
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.errors import InputError
from entropy_probe.losses.length_weights import Average, LengthWeight
from entropy_probe.optimizers.state import AdamState
from entropy_probe.pipeline.recorded_loss import TrainersObjective, trainers_objective
from entropy_probe.pipeline.rows_say import recorded_value, said
from entropy_probe.pipeline.settings import StepSettings
from entropy_probe.pipeline.torch_types import OFF

MIXED_PRECISION = {None: None, "no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Accelerate's names."""

SAME_RATE = 1e-9
"""Relative difference up to which a recorded learning rate is the stored one."""


@dataclass(frozen=True)
class TrainersStep:
    """How the trainer takes its step, as far as it is known, and from where.

    Attributes:
        loss: the training loss.
        max_completion_length: the constant that its average may divide by, or None.
        max_grad_norm: at which the gradient is clipped, above 0; None does not clip.
        max_grad_norm_source: ``unknown`` where nothing says whether the trainer clips.
        autocast: mixed precision over float32 weights, or None.
        mixed: the trainer's arithmetic was of mixed precision, whatever it is repeated in.
        learning_rates: given, one for all groups; recorded, the first group's, or one a group that has parameters; none: as
            the optimizer holds them.
        learning_rate_source: ``unknown`` with the optimizer's own.
    """

    loss: TrainersObjective
    max_completion_length: int | None
    max_grad_norm: float | None
    max_grad_norm_source: Source
    autocast: torch.dtype | None
    mixed: bool
    learning_rates: tuple[float, ...]
    learning_rate_source: Source

    @property
    def length_weight(self) -> Average:
        """How the training loss is averaged over tokens."""
        return self.loss.average

    def of(self, adam: AdamState) -> AdamState:
        """The optimizer's state with the learning rate of this step.

        A given rate is every group's. A recorded number was that of the first group with parameters: where the optimizer's
        groups differ, all are scaled alike, as a schedule does.

        Raises:
            InputError: a recorded number does not tell the other groups' rates, or a list has not one a group.
        """
        if not self.learning_rates:
            return adam
        if len(self.learning_rates) > 1:
            return _with_rates(adam, self.learning_rates)
        (rate,) = self.learning_rates
        if self.learning_rate_source is Source.GIVEN:
            return adam.with_learning_rate(rate)
        stored = [group.learning_rate for group in adam.groups if group.names]
        if not stored or _same_rate(rate, stored[0]):
            return adam
        if len(set(stored)) == 1:
            return adam.with_learning_rate(rate)
        if stored[0] == 0.0:
            raise InputError(
                f"the rows say a learning rate of {rate:g}, the first parameter group's; the optimizer holds 0 there and "
                f"{max(stored):g} in another, so that the others' rates at this step are not known; set the learning rate"
            )
        scaled = (replace(group, learning_rate=rate / stored[0] * group.learning_rate) for group in adam.groups)
        return AdamState(tuple(scaled), adam.moments)


def trainers_step(batch: RolloutBatch, asked: StepSettings, *, assumed: LengthWeight | None) -> TrainersStep:
    """What the rows say of the trainer, under what a caller says.

    Args:
        batch: the rows that the step consumes.
        asked: what overrides them. What is given is not looked for in the rows.
        assumed: the length weight where neither says; None refuses.

    Raises:
        InputError: the rows disagree, or say what is not known or cannot be meant.
    """
    clip, clip_source = asked.max_grad_norm, Source.GIVEN
    if clip is None:
        clip = recorded_number(batch, "max_grad_norm")
        clip_source = Source.UNKNOWN if clip is None else Source.RECORDED
    if asked.learning_rate is not None:
        rates: tuple[float, ...] = (asked.learning_rate,)
        rate_source = Source.GIVEN
    else:
        rates = recorded_rates(batch)
        rate_source = Source.RECORDED if rates else Source.UNKNOWN
    return TrainersStep(
        loss=trainers_objective(batch, asked, assumed=assumed),
        max_completion_length=asked.max_completion_length or batch.responses[0].max_completion_length,
        max_grad_norm=clip or None,
        max_grad_norm_source=clip_source,
        autocast=_autocast(batch, asked),
        mixed=any(row.extra.get("mixed_precision") not in (None, "no") for row in batch.responses),
        learning_rates=rates,
        learning_rate_source=rate_source,
    )


def recorded_number(batch: RolloutBatch, name: str) -> float | None:
    """A number that a recorder wrote into every row, or None.

    Raises:
        InputError: the rows disagree, or it is not a finite number, 0 or above.
    """
    return recorded_value(batch, name, lambda value: number(said(name), value))


def recorded_count(batch: RolloutBatch, name: str) -> int | None:
    """A count, 1 or above, that a recorder wrote into every row, or None.

    Raises:
        InputError: as of :func:`recorded_number`, or it is no such count.
    """
    value = recorded_number(batch, name)
    if value is not None and (value < 1.0 or value != int(value)):
        raise InputError(f"the rows say {name} is {value:g}; expected a whole number, 1 or above")
    return None if value is None else int(value)


def recorded_rates(batch: RolloutBatch) -> tuple[float, ...]:
    """The learning rate that a recorder wrote into every row, several where it is a list, none where there is none.

    Raises:
        InputError: the rows disagree, or it is neither a finite number, 0 or above, nor a list of such.
    """

    def rates(value: object) -> tuple[float, ...]:
        if isinstance(value, Sequence) and not isinstance(value, str) and value:
            return tuple(number(said("learning_rate"), each) for each in value)
        return (number(said("learning_rate"), value),)

    return recorded_value(batch, "learning_rate", rates) or ()


def check_recorded(batch: RolloutBatch) -> None:
    """Refuse rows whose recorded settings will not do, also those that are overridden.

    Raises:
        InputError: see :func:`recorded_number`.
    """
    for name in ("max_grad_norm", "window_share"):
        recorded_number(batch, name)
    recorded_rates(batch)
    for name in ("num_processes", "num_generations"):
        recorded_count(batch, name)


def _autocast(batch: RolloutBatch, asked: StepSettings) -> torch.dtype | None:
    if asked.autocast is not None:
        return None if asked.autocast == OFF else asked.autocast
    if asked.dtype is not torch.float32:
        return None

    def named(value: object) -> str:
        if not isinstance(value, str) or value not in MIXED_PRECISION:
            raise InputError(
                f"the rows say mixed_precision is {shown(value)}; known are {', '.join(filter(None, MIXED_PRECISION))}; set "
                f"autocast to what comes nearest: bfloat16, float16 or {OFF}"
            )
        return value

    return MIXED_PRECISION[recorded_value(batch, "mixed_precision", named)]


def _with_rates(adam: AdamState, rates: Sequence[float]) -> AdamState:
    """One rate a group, of those groups that have parameters."""
    members = [group for group in adam.groups if group.names]
    if len(members) != len(rates):
        raise InputError(
            f"the rows say {len(rates)} learning rates, the optimizer has {len(members)} parameter groups that train; expected "
            "one a group; set the learning rate"
        )
    own = iter(rates)
    groups = (
        replace(group, learning_rate=_nearly(next(own), group.learning_rate)) if group.names else group
        for group in adam.groups
    )
    return AdamState(tuple(groups), adam.moments)


def _nearly(rate: float, stored: float) -> float:
    return stored if _same_rate(rate, stored) else rate


def _same_rate(rate: float, stored: float) -> bool:
    return math.isclose(rate, stored, rel_tol=SAME_RATE)
