"""From what the probe found to the records of the report."""

from __future__ import annotations

import math
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import nn

from entropy_probe.checkpoints import Checkpoint
from entropy_probe.common.arrays import FloatArray
from entropy_probe.common.evidence import Evidence
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.data.units import Mode, Units
from entropy_probe.gradients import Coverage, Plan, Preparation
from entropy_probe.model.policy import Measured
from entropy_probe.optimizers.adamw_step import clip_factor
from entropy_probe.optimizers.base import OptimizerState, PreconditionerTest, distinct_rates
from entropy_probe.optimizers.preconditioner import ZeroV
from entropy_probe.optimizers.state import AdamState
from entropy_probe.optimizers.step_parts import StepPrediction
from entropy_probe.optimizers.what_if import Fall, WhatIf
from entropy_probe.pipeline.recorded import Source, TrainersStep
from entropy_probe.pipeline.settings import ShardingChoice
from entropy_probe.ranks.collectives import Kind, Payload
from entropy_probe.ranks.sharding import Sharding
from entropy_probe.realized.changes import RealizedChange
from entropy_probe.realized.steps import HELD_OUT, SAME
from entropy_probe.realized.sweep import SweepCurve
from entropy_probe.report.schema import (
    AdamWPart,
    AdamWSection,
    CheckpointSection,
    ConfigSection,
    EngineSection,
    EntropySection,
    FallSection,
    FirstOrder,
    FoldSection,
    NeededSection,
    NoiseSection,
    PreconditionerDots,
    RanksSection,
    RealizedRow,
    Report,
    SentSection,
    SweepSection,
    TwoBatchSection,
    UnitsSection,
    WhatIfRow,
    WhatIfSection,
    ZeroVSection,
)
from entropy_probe.report.sentences import (
    difference_sentence,
    headline,
    preconditioned_sentence,
    step_sentence,
    stored_sentence,
)
from entropy_probe.report.targets_section import TargetSection
from entropy_probe.statistics.importance_sampling import entropy_estimate
from entropy_probe.statistics.needed_units import needed_units
from entropy_probe.statistics.noise import LEAST_UNITS, NoiseParts
from entropy_probe.statistics.two_batches import TwoBatchStatistics, fold_statistics
from entropy_probe.statistics.u_statistics import CrossStatistics
from entropy_probe.targets.base import Sample
from entropy_probe.targets.entropy import EntropyTarget, EntropyUnit

NOTES = {
    (
        "preconditioned",
        SAME,
    ): "the step that δH₁ is about, Δθ = η P Ȳ; on the same responses it also holds the diagonal "
    "that U_cross leaves out",
    ("adamw", SAME): "the optimizer's own step: momentum, fresh gradient, weight decay",
    ("preconditioned", HELD_OUT): "the step from other prompts' responses than these, so without the diagonal",
    ("adamw", HELD_OUT): "the optimizer's own step from other prompts' responses than these",
}

NOT_CLIPPED = {
    Source.GIVEN: "a clip of 0 was given, which is none",
    Source.RECORDED: "the rows recorded a clip of 0, which is none",
    Source.UNKNOWN: "neither settings nor rows say whether the trainer clips, so the gradient is not clipped here",
}


def assemble_report(
    *,
    statistics: CrossStatistics,
    step_statistics: CrossStatistics,
    step_kernel: FloatArray | None,
    plan: Plan,
    batch: RolloutBatch,
    target: EntropyTarget,
    target_se: float | None,
    measured: Measured,
    optimizer: OptimizerState,
    realized: Sequence[RealizedChange],
    sweep: Sequence[SweepCurve],
    two_batches: TwoBatchStatistics | None,
    noise: NoiseParts | None,
    evaluation: RolloutBatch | None,
    folds: Sequence[int] | None,
    step: StepPrediction,
    targets: Sequence[TargetSection],
    gradient_statistics: CrossStatistics | None,
    reached: Collection[str],
    zero_v: ZeroVSection,
    gradient_norm: float,
    trainer: TrainersStep,
    what_ifs: Sequence[WhatIf],
    fall: Fall | None,
    warnings: Sequence[Evidence],
    config: ConfigSection,
    checkpoint: CheckpointSection,
    preparation: Preparation,
    coverage: Coverage,
    ranks: RanksSection,
    timing: Mapping[str, float],
) -> Report:
    """All sections. ``step_statistics`` are those of the η-weighted inner product, in which δH₁ = −U_cross."""
    entropies = target.values(Sample.of(batch, measured)).numpy()
    lengths = np.array(batch.lengths, dtype=np.float64)
    entropy, entropy_se = entropy_estimate(entropies, batch.group_sizes)
    rate, rate_se = entropy_estimate(entropies, batch.group_sizes, lengths)
    now = (rate, "token") if target.unit is EntropyUnit.PER_TOKEN else (entropy, "response")
    first = _first_order(statistics, step_statistics, optimizer, batch, plan.units, target, zero_v)
    adamw = _adamw(step, gradient_statistics, optimizer, reached, gradient_norm, trainer)
    said = preconditioned_sentence(first.delta_h1, first.delta_h1_se, first.delta_h1_ci95, *now)
    if first.delta_h1 != 0.0:
        said = f"{said} {difference_sentence(adamw.spread_factor)}"
    return Report(
        headline=" ".join([headline(adamw, *now), *_stored(realized, now[1])]),
        first_order=replace(first, sentence=said),
        needed=_needed(step_statistics, len(batch.groups) / len(plan.units.ranges), target_se),
        noise=_noise(noise, step_statistics, asked=config.noise),
        two_batches=None if two_batches is None else _two_batches(two_batches, evaluation),
        folds=None if folds is None else _folds(folds, step_kernel, plan),
        adamw=adamw,
        targets=list(targets),
        what_if=WhatIfSection([_what_if(found) for found in what_ifs], None if fall is None else _fall(fall)),
        units=UnitsSection(
            mode=plan.units.mode.value,
            count=len(plan.units.ranges),
            sizes=list(plan.units.sizes),
            prompts=len(batch.groups),
            responses=len(batch.responses),
            tokens=batch.tokens,
            storage=plan.storage.value,
            reason=plan.reason,
        ),
        engine=EngineSection(
            head=preparation.head.value,
            microbatch=preparation.microbatch_size,
            reason=preparation.reason,
            fallback=list(coverage.fallback),
            fallback_share=coverage.fallback_share,
            recomputed=list(coverage.recomputed),
        ),
        ranks=ranks,
        entropy=EntropySection(entropy, entropy_se, rate, rate_se, batch.mean_length),
        realized=[_row(change, trainer.max_grad_norm) for change in realized],
        sweep=[_sweep(curve) for curve in sweep],
        warnings=list(warnings),
        config=config,
        checkpoint=checkpoint,
        timing=dict(timing),
        versions=versions(),
    )


def describe_checkpoint(checkpoint: Checkpoint) -> CheckpointSection:
    """The report's checkpoint section for a folder."""
    folder = checkpoint.folder
    return replace(
        describe_model(checkpoint.model, checkpoint.adam, checkpoint.preconditioner_test),
        path=str(folder.path),
        base=None if folder.base is None else str(folder.base),
        kind=folder.kind,
        architecture=folder.architecture,
        trainer_step=checkpoint.trainer_step,
        mapping=checkpoint.mapping.rule,
    )


def describe_model(model: nn.Module, adam: AdamState, test: PreconditionerTest) -> CheckpointSection:
    """The report's checkpoint section for a live model."""
    steps = sorted({moments.step for moments in adam.moments.values()})
    return CheckpointSection(
        path=None,
        base=None,
        kind=None,
        architecture=None,
        trainer_step=None,
        stored_learning_rates=list(adam.learning_rates),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        frozen_parameters=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        adam_step=steps[0] if len(steps) == 1 else steps,
        mapping="live optimizer, by parameter identity",
        preconditioner_test=PreconditionerDots(test.plain_dot, test.preconditioned_dot),
    )


def describe_ranks(
    sharding: Sharding, prompts: Sequence[int], tokens: Sequence[int], sent: Mapping[Kind, Payload]
) -> RanksSection:
    """The report's section of who shared the work.

    Args:
        sharding: of the model.
        prompts: dealt to each rank.
        tokens: of their responses.
        sent: by kind, the most that any rank handed over.
    """
    chosen = ShardingChoice.FSDP2 if sharding.sharded else ShardingChoice.REPLICATED
    return RanksSection(
        count=sharding.ranks.count,
        sharding=chosen.value if sharding.ranks.count > 1 else None,
        backend=sharding.ranks.backend,
        prompts=list(prompts),
        tokens=list(tokens),
        sent={kind.value: SentSection(payload.elements, payload.bytes) for kind, payload in sent.items()},
    )


def describe_zero_v(treatment: ZeroV, by_name: Mapping[str, int], added: float) -> ZeroVSection:
    """The report's section of elements with v = 0.

    Args:
        treatment: P there.
        by_name: how many have a gradient.
        added: what they add to δH₁ under 1/ε, nats.
    """
    return ZeroVSection(treatment.value, sum(by_name.values()), added)


def versions() -> dict[str, str]:
    """Of Python and of the libraries that a number may depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("entropy-probe", "transformers", "peft", "numpy", "arviz-stats"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _first_order(
    statistics: CrossStatistics,
    step: CrossStatistics,
    optimizer: OptimizerState,
    batch: RolloutBatch,
    units: Units,
    target: EntropyTarget,
    zero_v: ZeroVSection,
) -> FirstOrder:
    """Without its sentence, which the optimizer's own step is in too."""
    rates, delta_h1 = distinct_rates(optimizer), step.negated
    reasons = {name: why for name, why in statistics.null_reasons.items() if name not in {"variance", "ci95"}}
    reasons |= delta_h1.null_reasons(se="delta_h1_se", ci95="delta_h1_ci95")
    if step.se_this_step is None:
        reasons["delta_h1_se_this_step"] = reasons["se_this_step"]
    return FirstOrder(
        estimator=target.estimator.value,
        entropy=target.unit.value,
        u_cross=statistics.u_cross,
        delta_h1=delta_h1.value,
        learning_rate=rates[0] if len(rates) == 1 else rates,
        bars_dot=statistics.bars_dot,
        diag_sum=statistics.diag_sum,
        row_means=statistics.row_means.tolist(),
        unit_ids=[_unit_id(batch, prompts, units.mode) for prompts in units.ranges],
        row_x=statistics.row_x.tolist(),
        row_y=statistics.row_y.tolist(),
        se_plugin=statistics.se_plugin,
        se_jackknife=statistics.se_jackknife,
        se_this_step=statistics.se_this_step,
        se_plugin_guide=statistics.se_plugin_guide,
        zeta1_plugin=statistics.zeta1_plugin,
        zeta1_jackknife=statistics.zeta1_jackknife,
        delta_h1_se=delta_h1.se,
        delta_h1_ci95=None if delta_h1.ci95 is None else list(delta_h1.ci95),
        delta_h1_se_this_step=step.se_this_step,
        interval_method=statistics.interval_method,
        self_test_residual=statistics.self_test_residual,
        zero_v=zero_v,
        sentence="",
        null_reasons=reasons,
    )


def _needed(step: CrossStatistics, prompts_per_unit: float, target_se: float | None) -> NeededSection:
    """How many prompts would do, from the η-weighted statistics."""
    if step.parts is None:
        why = step.null_reasons.get(
            "ci95", "needs the matrix of dots of equal units, to tell what falls as 1/U from 1/U²"
        )
        reasons = {"exclude_zero": why, "reach_target_se": why}
        exclude = reach = None
    else:
        reasons = {}
        exclude = needed_units(step.u_cross, *step.parts, exclude_zero=True)
        reach = None if target_se is None else needed_units(step.u_cross, *step.parts, target_se=target_se)
        if exclude is None:
            reasons["exclude_zero"] = "δH₁ is zero, or ten million units would not do"
        if reach is None:
            reasons["reach_target_se"] = "ten million units would not do"
    if target_se is None:
        reasons["target_se"] = reasons["reach_target_se"] = "target_se is not set"

    def prompts(units: int | None) -> int | None:
        return None if units is None else math.ceil(units * prompts_per_unit)

    return NeededSection(prompts(exclude), target_se, prompts(reach), reasons)


def _noise(parts: NoiseParts | None, step: CrossStatistics, *, asked: bool) -> NoiseSection:
    """Shares of V, or why there are none."""
    names = [field.name for field in fields(NoiseParts)]
    if parts is None or not step.variance:
        if not asked:
            why = "not asked for (noise is switched off)"
        elif step.parts is None:
            why = step.null_reasons.get("ci95", "needs the matrix of dots of equal units")
        elif not step.variance:
            why = "δH₁ has no noise to split"
        else:
            why = f"{len(step.row_means)} units; three thirds need at least {LEAST_UNITS}"
        return NoiseSection(**dict.fromkeys(names), null_reasons=dict.fromkeys(names, why))
    return NoiseSection(**{name: value / step.variance for name, value in asdict(parts).items()})


def _two_batches(found: TwoBatchStatistics, evaluation: RolloutBatch | None) -> TwoBatchSection:
    assert evaluation is not None
    delta_h1 = found.negated
    assert delta_h1.ci95 is not None
    return TwoBatchSection(
        delta_h1=delta_h1.value,
        delta_h1_se=found.se,
        delta_h1_ci95=list(delta_h1.ci95),
        variance_evaluation=found.evaluation,
        variance_update=found.update,
        variance_product=found.product,
        evaluation_prompts=len(evaluation.groups),
        evaluation_responses=len(evaluation.responses),
    )


def _folds(folds: Sequence[int], kernel: FloatArray | None, plan: Plan) -> FoldSection:
    count = len(set(folds))
    if kernel is None or plan.units.mode is not Mode.EXACT:
        why = "needs the matrix of prompts' dots: mode exact, with vectors stored"
        return FoldSection(count, None, None, [], {"delta_h1": why, "delta_h1_se": why})
    found = fold_statistics(kernel, folds)
    delta_h1 = found.estimate.scaled(-1.0)
    reasons = delta_h1.null_reasons(se="delta_h1_se")
    return FoldSection(count, delta_h1.value, delta_h1.se, [-value + 0.0 for value in found.by_fold], reasons)


def _stored(realized: Sequence[RealizedChange], unit: str) -> list[str]:
    """What the headline adds where the optimizer rounds its weights as it stores them: of the first such row."""
    for row in realized:
        if row.kept is not None:
            return [stored_sentence(row.kept.said, row.change.delta_h, row.change.se, unit)]
    return []


def _adamw(
    step: StepPrediction,
    gradient: CrossStatistics | None,
    optimizer: OptimizerState,
    names: Collection[str],
    gradient_norm: float,
    trainer: TrainersStep,
) -> AdamWSection:
    parts = {
        name: AdamWPart(estimate.value, estimate.se, float(at_t) + 0.0, estimate.null_reasons(se="se"))
        for (name, estimate), at_t in zip(step.parts.items(), step.values_v_at_t, strict=True)
    }
    total = step.total
    why = total.null_reasons(se="se", ci95="ci95")
    spread = optimizer.spread_factors(names, clip_factor(gradient_norm, trainer.max_grad_norm))
    factors = optimizer.gradient_factors(names)
    factor: float | list[float] | None = None
    if factors is None:
        told = "parameters of one parameter group differ in their number of steps"
        why |= dict.fromkeys(("gradient_factor", "u_statistic", "u_statistic_se"), told)
    else:
        distinct = list(dict.fromkeys(factors.values()))
        factor = distinct[0] if len(distinct) == 1 else list(factors.values())
        assert gradient is not None
        if gradient.se_this_step is None:
            why["u_statistic_se"] = gradient.null_reasons["se_this_step"]
    if trainer.max_grad_norm is None:
        why["max_grad_norm"] = NOT_CLIPPED[trainer.max_grad_norm_source]
    resolved = [name for name, estimate in step.parts.items() if estimate.excludes_zero]
    return AdamWSection(
        parts=parts,
        total=total.value,
        se=total.se,
        ci95=None if total.ci95 is None else list(total.ci95),
        v_at_t=float(step.values_v_at_t.sum()) + 0.0,
        spread_factor=spread[0] if len(spread) == 1 else spread,
        gradient_factor=factor,
        u_statistic=None if gradient is None else -gradient.u_cross + 0.0,
        u_statistic_se=None if gradient is None else gradient.se_this_step,
        gradient_norm=gradient_norm,
        clip_factor=clip_factor(gradient_norm, trainer.max_grad_norm),
        max_grad_norm=trainer.max_grad_norm,
        max_grad_norm_source=trainer.max_grad_norm_source.value,
        sentence=step_sentence(
            {name: part.value for name, part in parts.items()},
            total.value,
            total.se,
            resolved,
            total_resolved=total.excludes_zero,
            most=step.most(),
        ),
        null_reasons=why,
    )


def _what_if(found: WhatIf) -> WhatIfRow:
    reasons = {} if found.asked is not None else {"asked": "no number is asked about"}
    reasons |= found.delta_h1.null_reasons(value="delta_h1", se="delta_h1_se")
    reasons |= found.adamw.null_reasons(value="adamw", se="adamw_se")
    return WhatIfRow(
        found.name,
        found.asked,
        found.delta_h1.value,
        found.delta_h1.se,
        found.adamw.value,
        found.adamw.se,
        reasons,
    )


def _fall(found: Fall) -> FallSection:
    multiple = found.multiple
    return FallSection(
        found.nats,
        multiple.value,
        None if multiple.ci95 is None else list(multiple.ci95),
        multiple.null_reasons(value="learning_rate_multiple", ci95="learning_rate_multiple_ci95"),
    )


def _unit_id(batch: RolloutBatch, prompts: range, mode: Mode) -> Any:
    ids = [batch.groups[n].prompt_id for n in prompts]
    return ids if mode is Mode.BLOCK else ids[0]


def _row(realized: RealizedChange, max_grad_norm: float | None) -> RealizedRow:
    change, weights = realized.change, realized.change.weights
    reasons = {}
    if realized.kept is None:
        reasons["rounded"] = (
            "the step before any rounding of the weights"
            if realized.step == "adamw"
            else "the preconditioned step is not the optimizer's own, which alone is stored"
        )
    if weights.pareto_reason is not None:
        reasons["pareto_k"] = reasons["delta_h_psis"] = weights.pareto_reason
    elif change.delta_h_smoothed is None:
        reasons["delta_h_psis"] = (
            "smoothing is of weights that are normalised over one batch, not prompt by prompt or by folds"
        )
    return RealizedRow(
        step=realized.step,
        batch=realized.batch,
        method=realized.method,
        estimator=realized.measure.target.estimator.value,
        entropy=realized.measure.target.unit.value,
        importance_weights=realized.measure.weighting.value,
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


def _sweep(curve: SweepCurve) -> SweepSection:
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
    return SweepSection(
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


def _note(realized: RealizedChange, max_grad_norm: float | None) -> str:
    note = NOTES[realized.step, realized.batch]
    if realized.step != "adamw":
        return note
    note += "; no gradient clipping" if max_grad_norm is None else f"; gradient clipped at {max_grad_norm:g}"
    kept = realized.kept
    return note if kept is None else f"{note}; rounded {kept.how.adverb} as its weights are stored: {kept.said}"
