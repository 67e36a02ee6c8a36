"""What the entropy did after a step, beside its own linear prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

from entropy_probe.common.evidence import Evidence
from entropy_probe.optimizers.stored_precision import Rounding
from entropy_probe.realized.changes import RealizedChange
from entropy_probe.realized.resampling import RESAMPLED
from entropy_probe.realized.steps import HELD_OUT, SAME
from entropy_probe.report.numbers import signed
from entropy_probe.report.rows import Block, Chapter, Grid
from entropy_probe.report.sections.base import Context, Entry
from entropy_probe.statistics.importance_sampling import Weighting

MILD_ESS_FRACTION = 0.95
UNBIASED_RESPONSES = 16

OWN = "adamw"
"""The step of the optimizer itself, as rows name it."""

NOTES = {
    ("preconditioned", SAME): (
        "the step that δH₁ is about, Δθ = η P Ȳ; on the same responses it also holds the diagonal that U_cross leaves out"
    ),
    (OWN, SAME): "the optimizer's own step: momentum, fresh gradient, weight decay",
    ("preconditioned", HELD_OUT): "the step from other prompts' responses than these, so without the diagonal",
    (OWN, HELD_OUT): "the optimizer's own step from other prompts' responses than these",
}


@dataclass(frozen=True)
class RealizedRow(Entry):
    """One realised step beside its own linear prediction; see :mod:`entropy_probe.realized.changes`.

    ``rounded`` is "nearest" or "stochastic" where the step is rounded as the weights are stored, else null. ``weights``:
    "per-decision" where every token's entropy is weighted by the tokens before it, "whole-response" elsewhere; ESS, k̂ and
    ``delta_h_psis`` are of whole responses' weights in both.
    """

    step: str
    batch: str
    method: str
    estimator: str
    entropy: str
    importance_weights: str
    weights: str
    delta_h: float
    se: float
    predicted: float
    entropy_before: float
    entropy_after: float
    ess: float
    ess_fraction: float
    pareto_k: float | None
    pareto_k_limit: float
    delta_h_psis: float | None
    noise_floor: float
    step_norm: float
    note: str
    rounded: str | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, realized: RealizedChange, max_grad_norm: float | None) -> RealizedRow:
        """The record of one realised step; ``max_grad_norm`` is the clip of the optimizer's own."""
        change, weights = realized.change, realized.change.weights
        reasons = {}
        if realized.kept is None:
            reasons["rounded"] = (
                "the step before any rounding of the weights"
                if realized.step == OWN
                else "the preconditioned step is not the optimizer's own, which alone is stored"
            )
        if weights.pareto_reason is not None:
            reasons["pareto_k"] = reasons["delta_h_psis"] = weights.pareto_reason
        elif change.delta_h_smoothed is None:
            reasons["delta_h_psis"] = (
                "smoothing is of weights that are normalised over one batch, not prompt by prompt, by folds or token by token"
            )
        return cls(
            step=realized.step,
            batch=realized.batch,
            method=realized.method,
            estimator=realized.measure.target.estimator.value,
            entropy=realized.measure.target.unit.value,
            importance_weights=realized.measure.weighting.value,
            weights="per-decision" if realized.by_decision else "whole-response",
            delta_h=change.delta_h,
            se=change.se,
            predicted=realized.predicted,
            entropy_before=change.entropy_before,
            entropy_after=change.entropy_after,
            ess=weights.ess,
            ess_fraction=weights.ess_fraction,
            pareto_k=weights.pareto_k,
            pareto_k_limit=weights.pareto_k_limit,
            delta_h_psis=change.delta_h_smoothed,
            noise_floor=realized.noise_floor,
            step_norm=realized.step_norm,
            note=realized.note or _note(realized, max_grad_norm),
            rounded=None if realized.kept is None else realized.kept.how.value,
            null_reasons=reasons,
        )

    @property
    def title(self) -> str:
        """Which step it is of, as text and plots name it."""
        return self.step if self.rounded is None else f"{self.step} rounded {Rounding(self.rounded).adverb}"

    @classmethod
    def shown_of(cls, entries: Sequence[Self], context: Context) -> Sequence[Block]:
        """A line a step, batch and estimator."""
        lines = [
            (
                f"{row.title} ({row.batch}{', resampled' if row.method == RESAMPLED else ''}), {row.estimator}",
                signed(row.delta_h, row.se),
                f"{row.predicted:+.4g}",
                f"{row.ess_fraction:.3f}",
                "none" if row.pareto_k is None else f"{row.pareto_k:.2f}",
                f"{row.noise_floor:.0e}",
            )
            for row in entries
        ]
        notes = list(dict.fromkeys(f"{row.title} ({row.method}): {row.note}" for row in entries))
        limits = sorted({f"{row.pareto_k_limit:.2f}" for row in entries if row.pareto_k is not None})
        if limits:
            notes.append(f"k̂ is too large above {' or '.join(limits)}, the limit for this number of responses")
        missing = {row.null_reasons["pareto_k"] for row in entries if row.pareto_k is None}
        notes += [f"k̂ none: {reason}" for reason in sorted(missing)]
        columns = ("step (batch), estimator", "ΔH realised", "linear term", "ESS/N", "k̂", "floor")
        return (Grid(Chapter(40, f"Realised, after a step ({context.nats})"), columns, lines, notes),)

    @classmethod
    def metrics_of(cls, entries: Sequence[Self]) -> Mapping[str, float | None]:
        """The optimizer's own step, unrounded, on the responses that it is made from, by the estimator that was asked for."""
        for row in entries:
            if (row.step, row.batch, row.rounded) == (OWN, SAME, None) and row.method != RESAMPLED:
                return {
                    "realized": row.delta_h,
                    "realized_se": row.se,
                    "realized_predicted": row.predicted,
                    "ess_fraction": row.ess_fraction,
                }
        return {}


def _note(realized: RealizedChange, max_grad_norm: float | None) -> str:
    note = NOTES[realized.step, realized.batch]
    if realized.step != OWN:
        return note
    note += "; no gradient clipping" if max_grad_norm is None else f"; gradient clipped at {max_grad_norm:g}"
    kept = realized.kept
    return note if kept is None else f"{note}; rounded {kept.how.adverb} as its weights are stored: {kept.said}"


def realized_warnings(rows: Sequence[RealizedChange]) -> list[Evidence]:
    """Low ESS, a heavy tail of weights, or a change below the numerical floor."""
    found = []
    said: set[tuple[str, str]] = set()
    for row in rows:
        weights = row.change.weights
        # All measures of a step on a batch have the same weights.
        first, which = (row.title, row.batch) not in said, f"{row.title} step ({row.batch} batch)"
        said.add((row.title, row.batch))
        if first and weights.is_low:
            found.append(
                Evidence(
                    "low_ess",
                    f"the {which} leaves an effective sample of {weights.ess:.1f} of {len(weights.weights)} responses "
                    f"({100 * weights.ess_fraction:.0f} %)",
                    "Its ΔH rests on a few responses; look at delta_h_psis, or set resample to draw fresh ones after the step",
                )
            )
        smoothed = row.change.delta_h_smoothed
        # k̂ has no scale: weights that are all but equal can have any. It matters where they differ, or smoothing does.
        matters = weights.ess_fraction < MILD_ESS_FRACTION or (
            smoothed is not None and abs(smoothed - row.change.delta_h) > row.change.se
        )
        if first and weights.pareto_k is not None and weights.pareto_k > weights.pareto_k_limit and matters:
            found.append(
                Evidence(
                    "heavy_weights",
                    f"the {which} has importance weights with Pareto k̂ = {weights.pareto_k:.2f}, above "
                    f"{weights.pareto_k_limit:.2f}, the limit for {len(weights.weights)} responses",
                    "Their mean converges slowly; compare delta_h_psis, and give more responses",
                )
            )
        if row.predicted != 0.0 and abs(row.change.delta_h) <= row.noise_floor:
            found.append(
                Evidence(
                    "below_noise_floor",
                    f"the {which} changes entropy by {row.change.delta_h:.1e} ({row.measure.target.estimator}), within the "
                    f"numerical floor of {row.noise_floor:.1e}",
                    "Set dtype to float64",
                )
            )
    return found


def rounding_warnings(rows: Sequence[RealizedChange], how: Rounding) -> list[Evidence]:
    """Weights that the optimizer holds in a narrow type, where most of a small step is lost; or a rounding of none."""
    pairs = [(plain, row, row.kept) for plain, row in pairwise(rows) if plain.kept is None and row.kept is not None]
    if not pairs and how is Rounding.STOCHASTIC:
        return [
            Evidence(
                "no_weights_rounded",
                "stochastic rounding of the weights was asked for, and the optimizer holds none in bfloat16 or float16: its "
                "moments, or the weights, are wider",
                "Leave weight rounding out",
            )
        ]
    if not pairs or not pairs[0][2].moved_in_float32:
        return []
    plain, row, kept = pairs[0]
    unit = row.measure.target.unit.replace("-", " ")
    seen = (
        f"the optimizer holds the weights in {kept.types} and keeps no float32 copy of them: {kept.said}. "
        f"Rounded {kept.how.adverb}, as it is stored, the adamw step changes entropy by {row.change.delta_h:+.3g} nats {unit}, "
        f"unrounded by {plain.change.delta_h:+.3g}; δH₁ and the optimizer's own step to first order are of the unrounded one"
    )
    advice = "Read the rounded rows for what this run does. To move every weight, load the model in float32 (autocast may stay)"
    if kept.how is Rounding.STOCHASTIC:
        advice += "; the rounding is one draw, and another seed gives another"
    else:
        advice += "; if your optimizer rounds stochastically, set weight rounding to stochastic"
    return [Evidence("weights_stored_narrow", seen, advice)]


def weighting_warnings(weighting: Weighting, group_sizes: Sequence[int]) -> list[Evidence]:
    """Importance weights normalised prompt by prompt are biased by a share of about 1/G."""
    least = min(group_sizes)
    if weighting is Weighting.GLOBAL or least >= UNBIASED_RESPONSES:
        return []
    return [
        Evidence(
            "per_prompt_weights",
            f"importance weights are normalised prompt by prompt, and a prompt has {least} responses: that shrinks ΔH by "
            f"a share of about 1/{least}",
            "Normalise importance weights over all responses (global), or give more responses a prompt",
        )
    ]
