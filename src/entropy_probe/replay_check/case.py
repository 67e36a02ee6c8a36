"""A replayed step beside the real update: what causes of a difference are tried on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from entropy_probe.checkpoints import TrainerState
from entropy_probe.common.progress import Progress
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.gradients import loss_gradient
from entropy_probe.losses.length_weights import Average
from entropy_probe.model.measured import Measured
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.adamw_step import AdamWStep, adamw_step
from entropy_probe.optimizers.state import AdamState
from entropy_probe.pipeline.recorded import TrainersStep
from entropy_probe.pipeline.update import UpdateRule
from entropy_probe.replay_check.settings import GRADIENT_TOLERANCE, MIXED_TOLERANCE, TOLERANCE
from entropy_probe.replay_check.update_comparison import GradientComparison, UpdateComparison, compare_updates
from entropy_probe.targets.base import TokenPair

COARSE = 0.01
"""Share of the update that storing the weights costs, above which they do not tell whether it was computed right."""


@dataclass(frozen=True)
class Replayed:
    """A step as it was replayed, and the real update.

    Attributes:
        policy: at θ.
        batch: the rollouts.
        before: θ by name.
        after: θ⁺ by name.
        adam: the optimizer's state at θ.
        rule: the trainer's loss over these rows.
        measured: log-probs (and entropies, where the loss needs them) at θ.
        whole: the coefficients by it.
        trainer: how the step was taken: loss, clip, mixed precision, learning rate.
        num_generations: responses a prompt, where the rows say.
        ascent: Ȳ.
        step: the replayed step.
        update: it against the real one.
        recovered: the gradient that the trainer's optimizer was given, or None.
        gradients: the replayed optimizer's gradient against it, or None.
        log: of the checkpoint after the step.
        number: of the step, N + 1, or None.
        padding: token ids that stand for padding.
    """

    policy: Policy
    batch: RolloutBatch
    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    adam: AdamState
    rule: UpdateRule
    measured: Measured
    whole: Tensor | TokenPair
    trainer: TrainersStep
    num_generations: int | None
    ascent: Mapping[str, Tensor]
    step: AdamWStep
    update: UpdateComparison
    recovered: Mapping[str, Tensor] | None
    gradients: GradientComparison | None
    log: TrainerState
    number: int | None
    padding: tuple[int, ...]

    @property
    def length_weight(self) -> Average:
        """Of the training loss."""
        return self.trainer.length_weight

    @property
    def max_completion_length(self) -> int | None:
        """Dr. GRPO's constant, where it is known."""
        return self.trainer.max_completion_length

    @property
    def max_grad_norm(self) -> float | None:
        """That the step was clipped at, or None."""
        return self.trainer.max_grad_norm

    @property
    def mixed(self) -> bool:
        """The trainer's arithmetic was of mixed precision."""
        return self.trainer.mixed

    @property
    def coarse(self) -> bool:
        """The weights are stored in too few bits to show an error of the computation."""
        return self.update.rounding_expected > COARSE

    @property
    def tolerance(self) -> float:
        """Net error up to which two updates count as the same; of coarse weights only a larger one than rounding's shows."""
        loose = MIXED_TOLERANCE if self.mixed else TOLERANCE
        return max(MIXED_TOLERANCE, self.update.rounding_expected) if self.coarse else loose

    @property
    def gradient_tolerance(self) -> float:
        """Relative error up to which two gradients do. Coarse weights go with moments of as few bits."""
        return MIXED_TOLERANCE if self.mixed or self.coarse else GRADIENT_TOLERANCE

    @property
    def matched(self) -> bool:
        """The replayed step is the trainer's: by weights and gradient, where both tell, and never by coarse weights alone."""
        if self.update.error_net > self.tolerance:
            return False
        if self.gradients is None:
            return not self.coarse
        return self.gradients.relative_error <= self.gradient_tolerance

    @property
    def untold(self) -> bool:
        """Nothing tells whether it is."""
        return self.coarse and self.gradients is None and self.update.error_net <= self.tolerance

    @property
    def logged_norm(self) -> float | None:
        """The gradient norm before clipping that the trainer logged for this step."""
        return None if self.number is None else self.log.logged("grad_norm", self.number)

    def compared(self, step: AdamWStep) -> UpdateComparison:
        """Another step against the real update."""
        return against(self.before, step, self.after, self.adam)

    @property
    def moved(self) -> dict[str, Tensor]:
        """The real update θ⁺ − θ, float64."""
        return {name: self.after[name].double() - theta.double() for name, theta in self.before.items()}

    def stepped(self, ascent: Mapping[str, Tensor], adam: AdamState | None = None) -> AdamWStep:
        """The step along another direction, or from another state, clipped as the replayed one."""
        return adamw_step(self.before, adam or self.adam, ascent, max_grad_norm=self.max_grad_norm)

    def along(self, whole: Tensor | TokenPair, progress: Progress) -> dict[str, Tensor]:
        """Ȳ of other coefficients."""
        return mean_ascent(self.policy, self.batch, whole, progress, "gradient of a suspicion")


def mean_ascent(
    policy: Policy, batch: RolloutBatch, whole: Tensor | TokenPair, progress: Progress, description: str
) -> dict[str, Tensor]:
    """Ȳ = (1/B) Σ of what the coefficients multiply, by parameter name."""
    scaled = whole.scaled(1.0 / len(batch.groups)) if isinstance(whole, TokenPair) else whole / len(batch.groups)
    return loss_gradient(policy, batch.responses, scaled, progress=progress, description=description)


@dataclass(frozen=True)
class Cause:
    """What may have been otherwise, in words, and the step that would follow.

    ``fitted``: a factor was chosen so that it fits, which more specific causes may explain.
    """

    code: str
    seen: str
    advice: str
    step: AdamWStep
    fitted: bool = False


def against(
    before: Mapping[str, Tensor], step: AdamWStep, after: Mapping[str, Tensor], adam: AdamState
) -> UpdateComparison:
    """A step against the real update, with the roundings of its optimizer."""
    decays = {
        name: group.learning_rate * group.weight_decay
        for name, group in adam.group_of().items()
        if group.decoupled_weight_decay
    }
    return compare_updates(before, step.deltas, after, decays)
