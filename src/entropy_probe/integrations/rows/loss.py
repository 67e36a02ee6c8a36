"""A trainer's loss as its settings say it, and the columns in which every row carries it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from entropy_probe.losses.corrections import CorrectionMode
from entropy_probe.losses.kl import KLEstimator
from entropy_probe.losses.length_weights import LossAggregation
from entropy_probe.losses.named import LossName
from entropy_probe.losses.token_loss import RatioLevel

DECLARED = ("loss_type", "max_completion_length")
"""Columns of the schema itself; the others are read from a row's further columns."""


@dataclass(frozen=True)
class TrainersLoss:
    """What a trainer's settings say of its loss. A field is a column of that name; None leaves it out.

    Attributes:
        loss_type: the formula a token.
        loss_agg: how it is averaged; None for the loss's own average.
        epsilon_low: of the clip.
        epsilon_high: of the clip.
        clip_ratio_c: of dual clip.
        beta: the coefficient of a KL term in the loss. One in the reward is in the advantages.
        kl_estimator: of that term.
        kl_agg: how that term is averaged, where not as the loss.
        use_bias_correction_kl: whether its estimate is multiplied by the ratio.
        kl_tau: of DPPO's squared log-ratio.
        entropy_coef: what multiplies the mean entropy.
        importance_sampling_level: whose ratio the loss takes.
        importance_sampling_mode: of a correction for the sampler; None for none.
        importance_sampling_clip_min: the least ratio of that correction.
        importance_sampling_clip_max: the largest.
        max_completion_length: the constant that an average divides by.
        loss_scale: what multiplies the whole update.

    Example:
        >>> from dataclasses import replace
        >>> from entropy_probe.integrations.rows import VERL_DEFAULTS
        >>> replace(VERL_DEFAULTS, epsilon_high=0.28).columns()["epsilon_high"]
        0.28
    """

    loss_type: LossName
    loss_agg: LossAggregation | None = None
    epsilon_low: float | None = None
    epsilon_high: float | None = None
    clip_ratio_c: float | None = None
    beta: float | None = None
    kl_estimator: KLEstimator | None = None
    kl_agg: LossAggregation | None = None
    use_bias_correction_kl: bool | None = None
    kl_tau: float | None = None
    entropy_coef: float | None = None
    importance_sampling_level: RatioLevel | None = None
    importance_sampling_mode: CorrectionMode | None = None
    importance_sampling_clip_min: float | None = None
    importance_sampling_clip_max: float | None = None
    max_completion_length: int | None = None
    loss_scale: float | None = None

    def columns(self) -> dict[str, Any]:
        """The columns that have a value, names as text."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: str(value) if isinstance(value, str) else value for name, value in values.items() if value is not None
        }
