"""The JSON of ``entropy-probe replay``, schema 1: plain records. Every number is finite, or null with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from entropy_probe.common.evidence import Evidence
from entropy_probe.report.schema import check_content

REPLAY_SCHEMA = 1


def within_rounding(error_net: float, rounding_expected: float) -> bool:
    """The net error is too small beside the expected rounding to be a figure of its own."""
    return error_net <= rounding_expected / 10


@dataclass(frozen=True)
class ParameterRow:
    """One parameter: relative L2 error over it (null where it did not move), and its share of the squared error of all."""

    name: str
    relative_error: float | None
    share: float


@dataclass(frozen=True)
class UpdateSection:
    """The computed update against the real one, θ of N+1 less θ of N; see :mod:`entropy_probe.replay_check.update_comparison`.

    ``error_net`` is ``relative_error`` without what rounding explains, and up to ``tolerance`` counts as the same step.
    ``part_norms`` are of momentum, fresh gradient and weight decay, over ‖Δ‖ real. ``parameters``: largest share first.
    """

    relative_error: float
    error_net: float
    rounding_floor: float
    rounding_expected: float
    tolerance: float
    cosine: float | None
    norm_ratio: float
    update_norm: float
    part_norms: Mapping[str, float]
    parameters: list[ParameterRow]
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GradientSection:
    """The loss gradient −Ȳ: its norm before clipping, and after it against the one that Adam's moments at N+1 show.

    ``scale`` is the factor that brings the unclipped gradient nearest to the recovered one. ``relative_error`` up to
    ``tolerance`` counts as the same gradient.
    """

    norm: float
    max_grad_norm: float | None
    max_grad_norm_from: str
    clip_factor: float
    relative_error: float | None
    cosine: float | None
    norm_ratio: float | None
    scale: float | None
    tolerance: float
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LoggedSection:
    """Recomputed figures beside those of ``trainer_state.json``.

    ``entropy`` as TRL logs it: the mean over micro-batches of the token-weighted mean of H_t, nats per token, before the
    update. ``grad_norm``: before clipping. ``learning_rate``: of the step from N to N+1.
    """

    entropy: float
    entropy_logged: float | None
    grad_norm: float
    grad_norm_logged: float | None
    learning_rate: float | list[float]
    learning_rate_logged: float | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Suspicion:
    """A cause that was tried: what was seen, what to do, and the net error that is left with it (null: cannot be tried)."""

    code: str
    seen: str
    advice: str
    error_net: float | None


@dataclass(frozen=True)
class ReplayConfig:
    """What was asked for, as it was resolved."""

    before: str
    after: str
    base: str | None
    rollouts: str
    freeze: list[str]
    step: int | None
    advantage: str
    length_weight: str
    max_completion_length: int | None
    learning_rate: float | None
    temperature: float
    dtype: str
    autocast: str | None
    microbatch: int
    device: str


@dataclass(frozen=True)
class ReplayReport:
    """The whole JSON. ``headline`` is the sentence that a person reads first; ``tried`` counts the causes that were tested."""

    headline: str
    matched: bool
    update: UpdateSection
    gradient: GradientSection
    logged: LoggedSection
    suspicions: list[Suspicion]
    tried: int
    warnings: list[Evidence]
    kind: str
    responses: int
    prompts: int
    parameters: int
    config: ReplayConfig
    timing: Mapping[str, float]
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object.

        Raises:
            AssertionError: a number is not finite, or a null has no reason: a fault of ours.
        """
        content = {"schema": REPLAY_SCHEMA, **asdict(self)}
        check_content(content, (content["update"], content["gradient"], content["logged"]))
        return content
