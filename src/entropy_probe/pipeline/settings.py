"""How to probe: what a caller or a command line may choose, and which values are refused before anything is read.

Settings have four parts: the trainer's loss and step, the target that is differentiated, how it is computed, and which
analyses go with it. A field stands in its part alone, with its type, default, check and help; the command line builds its
options from them.
"""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from entropy_probe.common.choices import member, number, optional, shown, truth, whole_number
from entropy_probe.common.fields import Part, described, setting
from entropy_probe.data.units import Mode
from entropy_probe.errors import InputError
from entropy_probe.losses.advantages import AdvantageRule
from entropy_probe.losses.kl import KLEstimator
from entropy_probe.losses.length_weights import HAS_CONSTANT, Average, LengthWeight, LossAggregation
from entropy_probe.losses.named import LossName
from entropy_probe.optimizers.preconditioner import ZeroV
from entropy_probe.optimizers.stored_precision import Rounding
from entropy_probe.pipeline.torch_types import Autocast, autocast_setting, dtype_name, torch_type
from entropy_probe.statistics.importance_sampling import Weighting
from entropy_probe.statistics.intervals import IntervalMethod
from entropy_probe.statistics.linearity import SweepRange
from entropy_probe.targets.choices import EntropyUnit, Estimator, SamplerWeights


class ShardingChoice(StrEnum):
    """What each of several ranks holds of the parameters and of Adam's state.

    ``replicated``: all of both; the unit vectors alone are parted. ``fsdp2``: FSDP2's shard, a rank's rows of every parameter.
    docs/scaling.md says which wins where.

    Example:
        >>> from entropy_probe import ShardingChoice
        >>> ShardingChoice("fsdp2")
        <ShardingChoice.FSDP2: 'fsdp2'>
    """

    REPLICATED = "replicated"
    FSDP2 = "fsdp2"


def refuse_unused_constant(constant: int | None, weight: Average) -> None:
    """Refuse Dr. GRPO's constant beside a length weight that has none.

    Raises:
        InputError: as it says.
    """
    if constant is not None and weight not in HAS_CONSTANT:
        raise InputError(
            f"max_completion_length is Dr. GRPO's constant; length weight {weight} does not use it, drop it (or ask for fresh "
            "responses, whose limit it is)"
        )


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


def seed_number(what: str, value: object) -> int:
    """A seed of torch's generators.

    Raises:
        InputError: anything else.
    """
    seed = whole_number(what, value, least=0)
    if seed >= 2**63:
        raise InputError(f"{what} is {shown(seed)}; expected 0 to 2^63 - 1")
    return seed


POSITIVE = optional(partial(number, above=True))
COUNT = optional(partial(whole_number, least=1))


@described
@dataclass(frozen=True)
class TrainersLoss(Part):
    """The trainer's loss, clip and learning rate; None takes what the rows say (:mod:`entropy_probe.pipeline.recorded`)."""

    length_weight: LengthWeight | None = setting(
        None,
        optional(partial(member, kind=LengthWeight)),
        "How the training loss weighs lengths. Default: by the rows' loss_type; where they name none, a probe takes guide.",
    )
    advantage: AdvantageRule | None = setting(
        None,
        optional(partial(member, kind=AdvantageRule)),
        "Rule of the advantages. Default: given where the rows have them, else dr_grpo.",
    )
    max_completion_length: int | None = setting(
        None,
        COUNT,
        "Constant of length weight dr_grpo; also the limit of fresh responses. Default: the rows' own.",
        "L",
    )
    max_grad_norm: float | None = setting(
        None,
        optional(number),
        "Norm at which the trainer clips the gradient; 0 for no clipping. Default: as the rows recorded it, else none.",
        "X",
    )
    learning_rate: float | None = setting(
        None,
        optional(number),
        "Learning rate of every parameter group. Default: as the rows of a checkpoint recorded it, else the optimizer's own.",
        "X",
    )


@described
@dataclass(frozen=True)
class LossTerms(Part):
    """What the loss is made of; None takes what the rows say (:mod:`entropy_probe.pipeline.recorded_loss`)."""

    loss_type: LossName | None = setting(
        None,
        optional(partial(member, kind=LossName)),
        "The trainer's loss, by its published name. Default: the rows' loss_type.",
        "NAME",
    )
    loss_agg: LossAggregation | None = setting(
        None,
        optional(partial(member, kind=LossAggregation)),
        "How the loss is averaged over tokens and responses, by verl's names; in the place of a length weight.",
        "MODE",
    )
    beta: float | None = setting(
        None, optional(number), "Coefficient of the KL term to the reference. Default: as the rows say, else 0.", "X"
    )
    kl_estimator: KLEstimator | None = setting(
        None,
        optional(partial(member, kind=KLEstimator)),
        "Estimator of the KL term. Default: as the rows say, else k3.",
    )
    entropy_coef: float | None = setting(
        None, optional(number), "Coefficient of the entropy bonus. Default: as the rows say, else 0.", "X"
    )
    epsilon_low: float | None = setting(
        None,
        optional(number),
        "How far below 1 the loss clips the importance ratio. Default: as the rows say; needed where it is not 1.",
        "X",
    )
    epsilon_high: float | None = setting(
        None,
        optional(number),
        "How far above 1 it clips it (of cispo, the largest ratio). Default: as the rows say, else epsilon_low.",
        "X",
    )


@described
@dataclass(frozen=True)
class Arithmetic(Part):
    """In which types the step is computed, and how much of it at a time."""

    dtype: torch.dtype = setting(
        torch.float32,
        partial(torch_type, among=(torch.float32, torch.float64, torch.bfloat16, torch.float16)),
        "Type of weights and arithmetic, where a checkpoint is loaded.",
    )
    autocast: Autocast = setting(
        None,
        autocast_setting,
        "Mixed precision over float32 weights, for the gradients alone. Default: as the rows recorded it, else none.",
    )
    microbatch_size: int | None = setting(None, COUNT, "Responses in one forward. Default: what fits.", "N")
    memory_bytes: float | None = setting(
        None,
        POSITIVE,
        "Memory that may be used: unit vectors take at most half of it, activations a quarter. Default: what is free.",
        "BYTES",
    )

    def __post_init__(self) -> None:
        """Refuse mixed precision over other weights than those of float32."""
        super().__post_init__()
        if isinstance(self.autocast, torch.dtype) and self.dtype is not torch.float32:
            raise InputError(
                f"autocast to {dtype_name(self.autocast)} over {dtype_name(self.dtype)} weights; mixed precision is over "
                "float32 weights: set dtype float32, or leave autocast out"
            )


@dataclass(frozen=True)
class StepSettings(LossTerms, Arithmetic, TrainersLoss):
    """What a probe and a replay are both told: how the trainer takes its step, and in which arithmetic to repeat it."""

    def __post_init__(self) -> None:
        """Refuse two ways of averaging the loss."""
        super().__post_init__()
        if self.loss_agg is not None and self.length_weight is not None:
            raise InputError(
                f"loss_agg is {self.loss_agg} and length_weight {self.length_weight}, which both say how the loss is averaged; "
                "give one of them"
            )


@described
@dataclass(frozen=True)
class Loss(LossTerms, TrainersLoss):
    """How the trainer takes its step: its loss, clip and learning rate, and how its optimizer rounds."""

    weight_rounding: Rounding = setting(
        Rounding.NEAREST,
        partial(member, kind=Rounding),
        "How the optimizer rounds weights that it holds in bfloat16 or float16; the checkpoint does not say.",
    )


@described
@dataclass(frozen=True)
class Target(Part):
    """What is differentiated, along which step, and what is realised."""

    estimator: Estimator = setting(
        Estimator.RAO_BLACKWELL,
        partial(member, kind=Estimator),
        "Estimator of the entropy and its gradient; score: from the responses' log-probs alone, with more noise.",
    )
    entropy: EntropyUnit = setting(
        EntropyUnit.PER_RESPONSE,
        partial(member, kind=EntropyUnit),
        "Entropy per response, or per token: H over the mean length.",
    )
    weighting: Weighting = setting(
        Weighting.GLOBAL,
        partial(member, kind=Weighting),
        "Over which responses the realised change normalises its importance weights.",
    )
    sampler_weights: SamplerWeights = setting(
        SamplerWeights.AUTO,
        partial(member, kind=SamplerWeights),
        "How rows of another policy count: by the ratio of whole responses, of the tokens before each position, or once (off); "
        "auto: by their effective sample size.",
    )
    zero_v: ZeroV = setting(
        ZeroV.LEAVE_OUT,
        partial(member, kind=ZeroV),
        "Elements with v = 0: left out of P, δH₁ and its step, or with P = 1/ε (guide).",
    )

    def __post_init__(self) -> None:
        """Refuse weights by token where the estimator weighs whole responses."""
        super().__post_init__()
        if self.sampler_weights is SamplerWeights.PREFIX and self.estimator is Estimator.SCORE:
            raise InputError(
                "sampler_weights is prefix, but the score estimator weighs whole responses alone; set sampler_weights to "
                "response or auto, or estimator to rao-blackwell"
            )


@described
@dataclass(frozen=True)
class Compute(Arithmetic):
    """How it is computed: units, types, memory and the seed."""

    mode: Mode = setting(
        Mode.AUTO,
        partial(member, kind=Mode),
        "exact: a prompt is a unit; block: a run of prompts is one; auto: by memory.",
    )
    blocks: int | None = setting(None, optional(whole_number), "Number of blocks; implies mode block.", "M")
    vector_dtype: torch.dtype | None = setting(
        None,
        optional(partial(torch_type, among=(torch.float32, torch.float64, torch.bfloat16))),
        "Type of stored unit vectors; bfloat16 halves their memory. Default: that of the weights, float32 at least.",
    )
    gradient_checkpointing: bool = setting(
        False,
        truth,
        "Recompute layers in the backward: less memory, a forward more. A live model's own setting counts too.",
    )
    seed: int = setting(
        0,
        seed_number,
        "Seed of the preconditioner's test vectors, of fresh responses and of stochastic rounding.",
    )

    def __post_init__(self) -> None:
        """Refuse vectors of float64 beside other arithmetic, and the reverse."""
        super().__post_init__()
        if self.vector_dtype is not None and (self.dtype is torch.float64) is not (self.vector_dtype is torch.float64):
            raise InputError(
                f"vectors in {dtype_name(self.vector_dtype)} with arithmetic in {dtype_name(self.dtype)}: "
                "float64 goes with float64 alone"
            )


@described
@dataclass(frozen=True)
class Analyses(Part):
    """What is found out beside the prediction: its error, the range of the step, other steps."""

    target_se: float | None = setting(
        None,
        POSITIVE,
        "Say how many prompts would bring the standard error of δH₁ down to this.",
        "NATS",
    )
    noise: bool = setting(
        True, truth, "Say where the noise of δH₁ comes from; a forward and one or two backwards more."
    )
    targets: bool = setting(
        False,
        truth,
        "Say what the step does to expected reward and response length even where their vectors make units fewer, or "
        "streamed; by default it is said where they fit beside the entropy's.",
    )
    interval: IntervalMethod | None = setting(
        None,
        optional(partial(member, kind=IntervalMethod)),
        "How the 95 % interval of δH₁ is made. Default: skewed_t, or jackknife_t where vectors are streamed or units are "
        "of unequal size.",
    )
    split: int | None = setting(
        None,
        optional(whole_number),
        "Hold prompts out in K folds: the step from the others is realised on each, and δH₁ is taken across folds.",
        "K",
    )
    sweep: SweepRange | None = setting(
        None,
        optional(sweep_setting),
        "Realise the steps at so many factors of the learning rate too, as in 0.1:10:9.",
        "LOW:HIGH:COUNT",
    )
    resample: bool = setting(False, truth, "Draw fresh responses after each step too: for a low effective sample size.")
    resample_batch: int | None = setting(
        None,
        COUNT,
        "Fresh responses drawn at a time; default 32. Fewer take less memory, and another number draws others.",
        "N",
    )
    what_if_learning_rate: float | None = setting(
        None, POSITIVE, "Also say what a step at this learning rate would do.", "X"
    )
    what_if_max_grad_norm: float | None = setting(
        None, POSITIVE, "Also say what a step clipped at this norm would do.", "X"
    )
    what_if_no_negatives: bool = setting(
        False,
        truth,
        "Also say what responses with advantages above zero alone would do; one more pass over the batch.",
    )
    what_if_fall: float | None = setting(
        None, POSITIVE, "Say which multiple of the learning rate would lower the entropy by this.", "NATS"
    )

    def __post_init__(self) -> None:
        """Refuse a number of fresh responses where none are asked for."""
        super().__post_init__()
        if self.resample_batch is not None and not self.resample:
            raise InputError(
                f"resample_batch is {self.resample_batch}, but no fresh responses are asked for: ask for them by resample, or "
                "drop it"
            )


PARTS: tuple[type[Part], ...] = (Loss, Target, Compute, Analyses)

POSITIONS = (
    "mode", "blocks", "estimator", "entropy", "weighting", "target_se", "noise", "interval", "split", "sweep", "resample",
    "resample_batch", "learning_rate", "advantage", "length_weight", "max_completion_length", "dtype", "autocast",
    "microbatch_size", "memory_bytes", "vector_dtype", "gradient_checkpointing", "seed", "max_grad_norm", "weight_rounding",
    "what_if_learning_rate", "what_if_max_grad_norm", "what_if_no_negatives", "what_if_fall", "zero_v",
)  # fmt: skip
"""Places of the fields that were there before the parts, so that a call by position means what it meant. New ones follow."""

if TYPE_CHECKING:

    class Positions:
        """Decides only the order of the fields, which the parts define."""

else:
    Positions = make_dataclass("Positions", [(name, Any, None) for name in POSITIONS], frozen=True)


@described
@dataclass(frozen=True)
class Settings(Loss, Target, Compute, Analyses, StepSettings, Positions):
    """How to probe: the fields of all four parts, which ``loss``, ``target``, ``compute`` and ``analyses`` give one by one.

    Names and torch types may be given as text, as on the command line: ``Settings(length_weight="dapo", dtype="float64")``.
    What says how the trainer takes its step (length weight, clip, mixed precision, learning rate) is by default what the
    rows say, where they do (:mod:`entropy_probe.pipeline.recorded`).

    Raises:
        InputError: a name that is not known (the known ones are listed), a number out of range, or two settings that contradict
            each other.

    Example:
        >>> from entropy_probe import Settings
        >>> settings = Settings(length_weight="dapo", max_grad_norm=1.0, dtype="float64", sweep="0.1:10:9")
        >>> Settings(length_weight="token-mean")
        Traceback (most recent call last):
        entropy_probe.errors.InputError: length_weight is 'token-mean'; known are guide, dr_grpo, grpo, dapo, bnpo, luspo
    """

    def __post_init__(self) -> None:
        """Refuse what its parts refuse, and a constant that neither loss nor fresh responses would use."""
        super().__post_init__()
        if self.length_weight is not None and not self.resample:
            refuse_unused_constant(self.max_completion_length, self.length_weight)

    @property
    def loss(self) -> Loss:
        """How the trainer takes its step."""
        return self.part(Loss)

    @property
    def target(self) -> Target:
        """What is differentiated and realised."""
        return self.part(Target)

    @property
    def compute(self) -> Compute:
        """How it is computed."""
        return self.part(Compute)

    @property
    def analyses(self) -> Analyses:
        """What is found out beside the prediction."""
        return self.part(Analyses)
