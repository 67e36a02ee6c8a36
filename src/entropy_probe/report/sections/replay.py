"""Sections of a replay's report: the update, the gradient, and what the trainer logged.

:mod:`entropy_probe.replay_check.sections` builds them, since only there is known what a replay found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from entropy_probe.report.numbers import listed, none
from entropy_probe.report.rows import Block, Chapter, Row, Rows
from entropy_probe.report.sections.base import Context, Section

UPDATE = Chapter(10, "The update, replayed against the real one")
BESIDE = Chapter(20, "Recomputed, beside the trainer's log and moments")

WORST_SHOWN = 3
"""Parameters with the largest errors that are shown."""


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
class UpdateSection(Section):
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

    def net(self, error: float) -> str:
        """A net error in words."""
        return "within rounding" if within_rounding(error, self.rounding_expected) else f"{error:.1e}"

    def shown(self, context: Context) -> Sequence[Block]:
        """The errors, and the parameters that most of them are in."""
        parts = ", ".join(f"{name.replace('_', ' ')} {size:.3g}" for name, size in self.part_norms.items())
        rows = [
            Row("relative L2 error", f"{self.relative_error:.2e}", f"over {context.parameters:,} trainable parameters"),
            Row(
                "rounding explains",
                f"{self.rounding_expected:.2e}",
                f"at most {self.rounding_floor:.2e}: half an ulp each",
            ),
            Row("net of rounding", self.net(self.error_net), f"up to {self.tolerance:g} counts as the same step"),
            Row(
                "cosine",
                none(self.null_reasons, "cosine") if self.cosine is None else f"{self.cosine:.9f}",
                f"norm ratio {self.norm_ratio:.6g}",
            ),
            Row("‖Δθ‖", f"{self.update_norm:.4g}", f"parts, as shares of it: {parts}"),
            *(
                Row(
                    "" if place else "most of it in",
                    "did not move" if row.relative_error is None else f"{row.relative_error:.2e}",
                    f"{row.name}, {100 * row.share:.2g} % of the squared error",
                )
                for place, row in enumerate(self.parameters[:WORST_SHOWN])
            ),
        ]
        return (Rows(UPDATE, rows),)


@dataclass(frozen=True)
class LoggedSection(Section):
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

    def shown(self, context: Context) -> Sequence[Block]:
        """Each figure, and what the log has for it."""
        entropy = f"{self._beside('entropy', self.entropy_logged)}; nats per token before the update"
        rows = (
            Row("entropy", f"{self.entropy:.6g}", entropy),
            Row("gradient norm", f"{self.grad_norm:.6g}", self._beside("grad_norm", self.grad_norm_logged)),
            Row(
                "learning rate",
                listed(self.learning_rate),
                self._beside("learning_rate", self.learning_rate_logged),
            ),
        )
        return (Rows(BESIDE, rows),)

    def _beside(self, name: str, value: float | None) -> str:
        return f"log: {self.null_reasons[f'{name}_logged']}" if value is None else f"logged {value:.6g}"


@dataclass(frozen=True)
class GradientSection(Section):
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

    def shown(self, context: Context) -> Sequence[Block]:
        """The clip, and the error beside what the moments show."""
        clip = "not clipped" if self.max_grad_norm is None else f"clipped at {self.max_grad_norm:g}"
        error = (
            none(self.null_reasons, "relative_error") if self.relative_error is None else f"{self.relative_error:.2e}"
        )
        rows = (
            Row("clipping", f"{self.clip_factor:.4g}", f"{clip} ({self.max_grad_norm_from})"),
            Row(
                "gradient error",
                error,
                f"against the one in Adam's moments at N+1; up to {self.tolerance:g} counts as the same",
            ),
        )
        return (Rows(BESIDE, rows),)
