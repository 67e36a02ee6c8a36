"""How to probe: what a caller or a command line may choose, and which values are refused before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Final, Literal

import torch

from entropy_probe.common.choices import Check, member, number, optional, settle, shown, truth, whole_number
from entropy_probe.data.units import Mode
from entropy_probe.errors import InputError
from entropy_probe.losses.advantages import AdvantageRule
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.optimizers.preconditioner import ZeroV
from entropy_probe.optimizers.stored_precision import Rounding
from entropy_probe.statistics.importance_sampling import Weighting
from entropy_probe.statistics.intervals import IntervalMethod
from entropy_probe.statistics.linearity import SweepRange
from entropy_probe.targets.entropy import EntropyUnit, Estimator


class ShardingChoice(StrEnum):
    """What each of several ranks holds of the parameters and of Adam's state: all, or FSDP2's shard."""

    REPLICATED = "replicated"
    FSDP2 = "fsdp2"


OFF: Final = "off"
"""No mixed precision, whatever the rows say of the trainer."""

Autocast = torch.dtype | Literal["off"] | None
"""Mixed precision over float32 weights: of a type, off, or None: as the rows say of the trainer."""


@dataclass(frozen=True)
class Settings:
    """How to probe.

    Names and torch types may be given as text, as on the command line: ``Settings(length_weight="dapo", dtype="float64")``.
    What says how the trainer takes its step (length weight, clip, mixed precision, learning rate) is by default what the
    rows say, where they do (:mod:`entropy_probe.pipeline.recorded`).

    Attributes:
        mode: EXACT, BLOCK, or by memory.
        blocks: number of blocks; implies BLOCK.
        estimator: of the entropy and its gradient.
        entropy: per response, or per token (H/T̄).
        weighting: over which responses the realised change normalises its importance weights.
        target_se: a standard error of δH₁, nats, to say how many prompts would reach.
        noise: also say where the noise of δH₁ comes from, by a forward and one or two backwards more.
        interval: how the 95 % interval of δH₁ is made; None takes skewed_t, or jackknife_t where vectors are streamed or units
            are of unequal size.
        split: folds of prompts; the step from all others is realised on each, and δH₁ is taken across them.
        sweep: factors of the learning rate at which every step is realised too, on the same and on evaluation rollouts; or
            the text LOW:HIGH:COUNT, such as 0.1:10:9.
        resample: also draw fresh responses after each step, at the rollouts' temperature and length limit.
        resample_batch: fresh responses drawn at a time; None takes 32. Memory grows with it, and others are drawn.
        learning_rate: of every parameter group. None: of a checkpoint as the rows recorded it, else as the optimizer holds it.
        advantage: None takes the rollouts' own if they have any, else dr_grpo.
        length_weight: of the training loss. None: by the rows' loss_type, and the guide's where they name none.
        max_completion_length: Dr. GRPO's constant; None takes the rollouts' own. Also the limit of fresh responses.
        dtype: of weights and arithmetic, where a checkpoint is loaded.
        autocast: mixed precision over float32 weights, for the gradients only; None: as recorded, "off": none.
        microbatch_size: responses in one forward; None takes what fits.
        memory_bytes: what the probe may use; None takes what is free.
        vector_dtype: of stored unit vectors; None takes that of the weights, float32 at least. bfloat16 halves the memory.
        gradient_checkpointing: layers keep their inputs alone and run once more in the backward; a live model's own setting
            counts too.
        seed: of the validator's test vectors, of fresh responses and of stochastic rounding.
        max_grad_norm: at which the trainer clips the gradient; 0 does not clip. None: as recorded, else no clipping.
        weight_rounding: of an optimizer that holds the weights in bfloat16 or float16; the checkpoint does not say.
        what_if_learning_rate: to say what a step at this learning rate would do.
        what_if_max_grad_norm: to say what a step clipped at this norm would do.
        what_if_no_negatives: to say what the update from responses with advantages above zero alone would do: one more pass.
        what_if_fall: nats, to say which multiple of the learning rate would lower the entropy by them.
        zero_v: P of elements whose v is 0: left out of δH₁ and its step, or 1/ε as the guide has it.
    """

    mode: Mode = Mode.AUTO
    blocks: int | None = None
    estimator: Estimator = Estimator.RAO_BLACKWELL
    entropy: EntropyUnit = EntropyUnit.PER_RESPONSE
    weighting: Weighting = Weighting.GLOBAL
    target_se: float | None = None
    noise: bool = True
    interval: IntervalMethod | None = None
    split: int | None = None
    sweep: SweepRange | None = None
    resample: bool = False
    resample_batch: int | None = None
    learning_rate: float | None = None
    advantage: AdvantageRule | None = None
    length_weight: LengthWeight | None = None
    max_completion_length: int | None = None
    dtype: torch.dtype = torch.float32
    autocast: Autocast = None
    microbatch_size: int | None = None
    memory_bytes: float | None = None
    vector_dtype: torch.dtype | None = None
    gradient_checkpointing: bool = False
    seed: int = 0
    max_grad_norm: float | None = None
    weight_rounding: Rounding = Rounding.NEAREST
    what_if_learning_rate: float | None = None
    what_if_max_grad_norm: float | None = None
    what_if_no_negatives: bool = False
    what_if_fall: float | None = None
    zero_v: ZeroV = ZeroV.LEAVE_OUT

    def __post_init__(self) -> None:
        """Put text into the fields' own types, and refuse values that cannot be meant."""
        settle(self, CHECKS)
        if self.resample_batch is not None and not self.resample:
            raise InputError(
                f"resample_batch is {self.resample_batch}, but no fresh responses are asked for: ask for them by resample, or "
                "drop it"
            )
        if self.seed >= 2**63:
            raise InputError(f"seed is {shown(self.seed)}; expected 0 to 2^63 - 1")
        if self.length_weight is not None and not self.resample:
            refuse_unused_constant(self.max_completion_length, self.length_weight)
        if self.vector_dtype is not None and (self.dtype is torch.float64) is not (self.vector_dtype is torch.float64):
            raise InputError(
                f"vectors in {dtype_name(self.vector_dtype)} with arithmetic in {dtype_name(self.dtype)}: "
                "float64 goes with float64 alone"
            )
        refuse_autocast_elsewhere(self.autocast, self.dtype)


def refuse_unused_constant(constant: int | None, weight: LengthWeight) -> None:
    """Refuse Dr. GRPO's constant beside a length weight that has none.

    Raises:
        InputError: as it says.
    """
    if constant is not None and weight is not LengthWeight.DR_GRPO:
        raise InputError(
            f"max_completion_length is Dr. GRPO's constant; length weight {weight} does not use it, drop it (or ask for fresh "
            "responses, whose limit it is)"
        )


def refuse_autocast_elsewhere(autocast: Autocast, dtype: torch.dtype) -> None:
    """Refuse mixed precision over other weights than those of float32.

    Raises:
        InputError: as it says.
    """
    if isinstance(autocast, torch.dtype) and dtype is not torch.float32:
        raise InputError(
            f"autocast to {dtype_name(autocast)} over {dtype_name(dtype)} weights; mixed precision is over float32 weights: "
            "set dtype float32, or leave autocast out"
        )


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


def sweep_setting(what: str, value: object) -> SweepRange:
    """Factors of the learning rate, from themselves or from text.

    Raises:
        InputError: anything else.
    """
    if isinstance(value, str):
        return SweepRange.parse(value)
    if not isinstance(value, SweepRange):
        raise InputError(f"{what} is {shown(value)}; expected a SweepRange, or LOW:HIGH:COUNT such as '0.1:10:9'")
    return value


POSITIVE = optional(partial(number, above=True))
COUNT = optional(partial(whole_number, least=1))

CHECKS: Mapping[str, Check] = {
    "mode": partial(member, kind=Mode),
    "blocks": optional(whole_number),
    "estimator": partial(member, kind=Estimator),
    "entropy": partial(member, kind=EntropyUnit),
    "weighting": partial(member, kind=Weighting),
    "target_se": POSITIVE,
    "noise": truth,
    "interval": optional(partial(member, kind=IntervalMethod)),
    "split": optional(whole_number),
    "sweep": optional(sweep_setting),
    "resample": truth,
    "resample_batch": COUNT,
    "learning_rate": optional(number),
    "advantage": optional(partial(member, kind=AdvantageRule)),
    "length_weight": optional(partial(member, kind=LengthWeight)),
    "max_completion_length": COUNT,
    "dtype": partial(torch_type, among=(torch.float32, torch.float64, torch.bfloat16, torch.float16)),
    "autocast": autocast_setting,
    "microbatch_size": COUNT,
    "memory_bytes": POSITIVE,
    "vector_dtype": optional(partial(torch_type, among=(torch.float32, torch.float64, torch.bfloat16))),
    "gradient_checkpointing": truth,
    "seed": partial(whole_number, least=0),
    "max_grad_norm": optional(number),
    "weight_rounding": partial(member, kind=Rounding),
    "what_if_learning_rate": POSITIVE,
    "what_if_max_grad_norm": POSITIVE,
    "what_if_no_negatives": truth,
    "what_if_fall": POSITIVE,
    "zero_v": partial(member, kind=ZeroV),
}
"""What each field may hold; how many blocks or folds the prompts allow is looked at where they are known."""
