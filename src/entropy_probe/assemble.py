"""From what the probe found to the records of the report."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from entropy_probe.adam_preconditioner import AdamState, PreconditionerTest
from entropy_probe.checkpoints import Checkpoint
from entropy_probe.gradients import Coverage, Plan, Preparation
from entropy_probe.importance_sampling import entropy_estimate
from entropy_probe.realized import RealizedChange
from entropy_probe.report.schema import (
    CheckpointSection,
    ConfigSection,
    EngineSection,
    EntropySection,
    Evidence,
    FirstOrder,
    PreconditionerDots,
    RealizedRow,
    Report,
    UnitsSection,
)
from entropy_probe.report.text import headline
from entropy_probe.rollouts import RolloutBatch
from entropy_probe.u_statistics import CrossStatistics
from entropy_probe.units import Mode, Units

NOTES = {
    "preconditioned": "the step that δH₁ is about, Δθ = η P Ȳ; on the same responses it also holds the diagonal that U_cross "
    "leaves out",
    "adamw": "the optimizer's real step: momentum, fresh gradient, weight decay; no gradient clipping",
}


def assemble_report(
    *,
    statistics: CrossStatistics,
    step_statistics: CrossStatistics,
    plan: Plan,
    batch: RolloutBatch,
    scores: Tensor,
    adam: AdamState,
    realized: Sequence[RealizedChange],
    warnings: Sequence[Evidence],
    config: ConfigSection,
    checkpoint: CheckpointSection,
    preparation: Preparation,
    coverage: Coverage,
    timing: Mapping[str, float],
) -> Report:
    """All sections. ``step_statistics`` are those of the η-weighted inner product, in which δH₁ = −U_cross."""
    entropy, entropy_se = entropy_estimate(scores.numpy(), batch.group_sizes)
    first = _first_order(statistics, step_statistics, adam, batch, plan.units, config.estimator)
    return Report(
        headline=headline(first.delta_h1, first.delta_h1_se, first.delta_h1_ci95, entropy),
        first_order=first,
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
        entropy=EntropySection(entropy, entropy_se, entropy / batch.mean_length, batch.mean_length),
        realized=[_row(change, config.estimator) for change in realized],
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
        stored_learning_rates=list(checkpoint.stored_learning_rates),
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
    adam: AdamState,
    batch: RolloutBatch,
    units: Units,
    estimator: str,
) -> FirstOrder:
    rates = adam.learning_rates
    reasons = {name: why for name, why in statistics.null_reasons.items() if name not in {"variance", "ci95"}}
    if statistics.ci95 is None:
        reasons["delta_h1_se"] = reasons["delta_h1_ci95"] = statistics.null_reasons["ci95"]
    return FirstOrder(
        estimator=estimator,
        u_cross=statistics.u_cross,
        # + 0.0 turns the −0.0 of a zero learning rate into 0.0.
        delta_h1=-step.u_cross + 0.0,
        learning_rate=rates[0] if len(rates) == 1 else list(rates),
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
        delta_h1_se=step.se,
        delta_h1_ci95=None if step.ci95_of_minus is None else list(step.ci95_of_minus),
        interval_method=statistics.interval_method,
        self_test_residual=statistics.self_test_residual,
        null_reasons=reasons,
    )


def _unit_id(batch: RolloutBatch, prompts: range, mode: Mode) -> Any:
    ids = [batch.groups[n].prompt_id for n in prompts]
    return ids if mode is Mode.BLOCK else ids[0]


def _row(realized: RealizedChange, estimator: str) -> RealizedRow:
    change, weights = realized.change, realized.change.weights
    reasons = {}
    if weights.pareto_reason is not None:
        reasons["pareto_k"] = reasons["delta_h_psis"] = weights.pareto_reason
    return RealizedRow(
        step=realized.step,
        batch="same",
        method=realized.method,
        estimator=estimator,
        delta_h=change.delta_h,
        se=change.se,
        predicted=realized.predicted,
        entropy_before=change.entropy_before,
        entropy_after=change.entropy_after,
        ess=weights.ess,
        ess_fraction=weights.ess_fraction,
        pareto_k=weights.pareto_k,
        delta_h_psis=change.delta_h_smoothed,
        noise_floor=realized.noise_floor,
        step_norm=realized.step_norm,
        note=NOTES[realized.step],
        null_reasons=reasons,
    )
