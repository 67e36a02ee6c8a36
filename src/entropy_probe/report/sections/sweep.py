"""Realised changes along a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from entropy_probe.common.evidence import Evidence
from entropy_probe.realized.sweep import SweepCurve
from entropy_probe.report.rows import Block, Chapter, Grid
from entropy_probe.report.sections.base import Context, Entry

SWEEP = Chapter(50, "Along the step, α times the learning rate")


@dataclass(frozen=True)
class SweepSection(Entry):
    """One step's realised changes at factors ``alphas`` of the learning rate; lists have one entry a factor.

    ``predicted`` is α times the estimator's own linear term, ``second_order`` ½ α² ``curvature``, to be added to it;
    ``curvature`` is d²ΔH/dα² by a central difference of ``curvature_h``. ``linear_until`` is the largest α up to which realised
    is within 10 % of predicted (``linear_beyond``: even at the largest factor). ``slope`` and ``r_squared`` are of log abs(ΔH)
    over log α up to it.
    """

    step: str
    batch: str
    estimator: str
    entropy: str
    alphas: list[float]
    delta_h: list[float]
    se: list[float]
    predicted: list[float]
    second_order: list[float] | None
    ess: list[float]
    ess_fraction: list[float]
    noise_floor: list[float]
    curvature: float | None
    curvature_error: float
    curvature_h: float
    linear_until: float | None
    linear_beyond: bool
    slope: float | None
    r_squared: float | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, curve: SweepCurve) -> SweepSection:
        """The record of one curve."""
        row, linear, second = curve.row, curve.linear, curve.curvature
        reasons = {}
        if linear.reason is not None:
            reasons["linear_until"] = linear.reason
        if curve.slope_reason is not None:
            reasons["slope"] = reasons["r_squared"] = curve.slope_reason
        if not second.resolved:
            reasons["curvature"] = reasons["second_order"] = (
                f"{second.value:.1e} by a difference of {second.h:.2g}, within its own error of {second.error:.1e}"
            )
        return cls(
            step=row.step,
            batch=row.batch,
            estimator=row.measure.target.estimator.value,
            entropy=row.measure.target.unit.value,
            alphas=list(curve.alphas),
            delta_h=[change.delta_h for change in curve.changes],
            se=[change.se for change in curve.changes],
            predicted=[alpha * row.predicted for alpha in curve.alphas],
            second_order=[second.second_order(alpha) for alpha in curve.alphas] if second.resolved else None,
            ess=[change.weights.ess for change in curve.changes],
            ess_fraction=[change.weights.ess_fraction for change in curve.changes],
            noise_floor=list(curve.noise_floors),
            curvature=second.value if second.resolved else None,
            curvature_error=second.error,
            curvature_h=second.h,
            linear_until=linear.until,
            linear_beyond=linear.is_bound,
            slope=None if curve.slope is None else curve.slope.exponent,
            r_squared=None if curve.slope is None else curve.slope.r_squared,
            null_reasons=reasons,
        )

    @property
    def title(self) -> str:
        """Which step it is of, on which batch, by which estimator."""
        return f"{self.step} ({self.batch}), {self.estimator}"

    @classmethod
    def shown_of(cls, entries: Sequence[Self], context: Context) -> Sequence[Block]:
        """A line a curve."""
        lines = []
        for curve in entries:
            until = "none" if curve.linear_until is None else f"{curve.linear_until:.3g}"
            lines.append(
                (
                    curve.title,
                    f"{until} or more" if curve.linear_beyond else until,
                    "none" if curve.curvature is None else f"{curve.curvature:+.3g}",
                    "none" if curve.slope is None else f"{curve.slope:.4f}",
                    f"{curve.ess_fraction[0]:.3f} … {curve.ess_fraction[-1]:.3f}",
                    f"{curve.alphas[0]:g} … {curve.alphas[-1]:g}",
                )
            )
        missing: dict[str, list[str]] = {}
        for curve in entries:
            for name, why in curve.null_reasons.items():
                missing.setdefault(f"{curve.title}: {why}", []).append(name)
        notes = ["linear: realised within 10 % of its own linear term for all smaller α"]
        notes += [f"{' and '.join(names)} none, {why}".replace("_", " ") for why, names in missing.items()]
        columns = ("step (batch), estimator", "linear until α", "d²ΔH/dα²", "log-log slope", "ESS/N", "at α")
        return (Grid(SWEEP, columns, lines, notes),)


def sweep_warnings(curves: Sequence[SweepCurve]) -> list[Evidence]:
    """A step beyond its own linear range: δH₁ and the linear terms do not describe it."""
    return [
        Evidence(
            "beyond_linear",
            f"the {curve.row.step} step ({curve.row.batch} batch, {curve.row.measure.target.estimator}) is linear up to "
            f"{curve.linear.until:.2g} of its learning rate only",
            "Read the realised change instead of the prediction, or take a smaller learning rate",
        )
        for curve in curves
        if curve.linear.until is not None and curve.linear.until < 1.0 and not curve.linear.is_bound
    ]
