"""How to probe: what a caller or a command line may choose, and which values are refused before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from entropy_probe.adam_preconditioner import ZeroV
from entropy_probe.errors import InputError
from entropy_probe.importance_sampling import Weighting
from entropy_probe.linearity import SweepRange
from entropy_probe.scores import AdvantageRule, EntropyUnit, Estimator, LengthWeight
from entropy_probe.stored_precision import Rounding
from entropy_probe.units import Mode


class ShardingChoice(StrEnum):
    """What each of several ranks holds of the parameters and of Adam's state: all, or FSDP2's shard."""

    REPLICATED = "replicated"
    FSDP2 = "fsdp2"


@dataclass(frozen=True)
class Settings:
    """How to probe.

    Attributes:
        mode: EXACT, BLOCK, or by memory.
        blocks: number of blocks; implies BLOCK.
        estimator: of the entropy and its gradient.
        entropy: per response, or per token (H/T̄).
        weighting: over which responses the realised change normalises its importance weights.
        target_se: a standard error of δH₁, nats, to say how many prompts would reach.
        noise: also say where the noise of δH₁ comes from, by a forward and one or two backwards more.
        split: folds of prompts; the step from all others is realised on each, and δH₁ is taken across them.
        sweep: factors of the learning rate at which every step is realised too, on the same and on evaluation rollouts.
        resample: also draw fresh responses after each step, at the rollouts' temperature and length limit.
        learning_rate: replaces the stored one; None keeps it.
        advantage: None takes the rollouts' own if they have any, else dr_grpo.
        length_weight: of the training loss.
        max_completion_length: Dr. GRPO's constant; None takes the rollouts' own. Also the limit of fresh responses.
        dtype: of weights and arithmetic, where a checkpoint is loaded.
        autocast: mixed precision over float32 weights, for the gradients only.
        microbatch_size: responses in one forward; None takes what fits.
        memory_bytes: what the probe may use; None takes what is free.
        vector_dtype: of stored unit vectors; None takes that of the weights, float32 at least. bfloat16 halves the memory.
        gradient_checkpointing: layers keep their inputs alone and run once more in the backward; a live model's own setting
            counts too.
        seed: of the validator's test vectors, of fresh responses and of stochastic rounding.
        max_grad_norm: at which the trainer clips the gradient; None does not clip.
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
    split: int | None = None
    sweep: SweepRange | None = None
    resample: bool = False
    learning_rate: float | None = None
    advantage: AdvantageRule | None = None
    length_weight: LengthWeight = LengthWeight.GUIDE
    max_completion_length: int | None = None
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
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
        """Refuse values that cannot be meant."""
        if self.zero_v not in list(ZeroV):
            raise InputError(f"zero_v is {self.zero_v!r}; expected one of {', '.join(ZeroV)}")
        object.__setattr__(self, "zero_v", ZeroV(self.zero_v))
        if self.microbatch_size is not None and self.microbatch_size < 1:
            raise InputError(f"microbatch size is {self.microbatch_size}; expected at least 1")
        if self.memory_bytes is not None and not 0 < self.memory_bytes < float("inf"):
            raise InputError(f"memory is {self.memory_bytes} bytes; expected a finite number above 0")
        if self.target_se is not None and not 0 < self.target_se < float("inf"):
            raise InputError(f"target standard error is {self.target_se}; expected a finite number of nats above 0")
        for what, value in (
            ("max-grad-norm", self.max_grad_norm),
            ("what-if-learning-rate", self.what_if_learning_rate),
            ("what-if-max-grad-norm", self.what_if_max_grad_norm),
            ("what-if-fall", self.what_if_fall),
        ):
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{what} is {value}; expected a finite number above 0, or leave it out")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; expected 0 to 2^63 - 1")
        used = self.length_weight is LengthWeight.DR_GRPO or self.resample
        if self.max_completion_length is not None and not used:
            raise InputError(
                f"max-completion-length is Dr. GRPO's constant; length weight {self.length_weight} does not use it, drop it "
                "(or give --resample, whose limit it is)"
            )
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise InputError(f"max-completion-length is {self.max_completion_length}; expected at least 1")
        if self.vector_dtype is not None and (self.dtype is torch.float64) is not (self.vector_dtype is torch.float64):
            raise InputError(
                f"vectors in {dtype_name(self.vector_dtype)} with arithmetic in {dtype_name(self.dtype)}: "
                "float64 goes with float64 alone"
            )
        if self.autocast is not None and self.dtype is not torch.float32:
            raise InputError("--autocast goes with --dtype float32: mixed precision is over float32 weights")


def dtype_name(dtype: torch.dtype) -> str:
    """As in ``float32``."""
    return str(dtype).removeprefix("torch.")
