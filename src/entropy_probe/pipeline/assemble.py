"""From what the stages found to the report: each section is built from the pieces that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from entropy_probe.common.evidence import Evidence
from entropy_probe.gradients import Preparation, UnitGradients
from entropy_probe.model.measured import Measured
from entropy_probe.optimizers.base import distinct_rates
from entropy_probe.optimizers.step_parts import StepPrediction
from entropy_probe.optimizers.what_if import Fall, WhatIf
from entropy_probe.pipeline.also_moved import target_sections
from entropy_probe.pipeline.config import config_section
from entropy_probe.pipeline.stages import Realizations, Task
from entropy_probe.ranks.collectives import Kind, Payload
from entropy_probe.report import rollout_warnings
from entropy_probe.report.headline import whole_headline
from entropy_probe.report.schema import Report
from entropy_probe.report.sections import (
    adamw,
    checkpoint,
    engine,
    first_order,
    off_policy,
    realized,
    sweep,
    two_batches,
    zero_v,
)
from entropy_probe.report.sections.entropy import EntropySection
from entropy_probe.report.sections.folds import FoldSection
from entropy_probe.report.sections.needed import NeededSection
from entropy_probe.report.sections.noise import NoiseSection
from entropy_probe.report.sections.ranks import RanksSection
from entropy_probe.report.sections.units import UnitsSection
from entropy_probe.report.sections.what_if import WhatIfSection
from entropy_probe.report.versions import versions
from entropy_probe.statistics.noise import NoiseParts
from entropy_probe.statistics.two_batches import TwoBatchStatistics
from entropy_probe.statistics.u_statistics import CrossStatistics


@dataclass(frozen=True)
class Found:
    """What the stages of a probe found.

    Attributes:
        task: what was asked, of what.
        preparation: of the model.
        gradients: X_u and Y_u, and what was found beside them.
        statistics: of their dots.
        step_statistics: of their η-weighted dots, the inner product in which δH₁ = −U_cross.
        gradient_statistics: of dots that weigh each group as the step weighs its gradient; None where parameters of one
            group differ in that.
        gradient_norm: of Ȳ, before clipping.
        step: what each part of the optimizer's own step does.
        two_batches: with X of the evaluation rollouts; None without them.
        noise: where it comes from; None where it was not taken.
        realizations: what the entropy did after each step.
        what_ifs: other steps.
        fall: the learning rate for a fall that was asked about.
        trained: parameters that no response reaches, though training reached them.
        without_v: elements with v = 0 and a gradient, by parameter that has such.
        sent: by kind, the most that any rank handed over.
    """

    task: Task
    preparation: Preparation
    gradients: UnitGradients
    statistics: CrossStatistics
    step_statistics: CrossStatistics
    gradient_statistics: CrossStatistics | None
    gradient_norm: float
    step: StepPrediction
    two_batches: TwoBatchStatistics | None
    noise: NoiseParts | None
    realizations: Realizations
    what_ifs: Sequence[WhatIf]
    fall: Fall | None
    trained: Sequence[str]
    without_v: Mapping[str, int]
    sent: Mapping[Kind, Payload]

    @property
    def measured(self) -> Measured:
        """Scores and token entropies of the update's rollouts."""
        return self.gradients.measured

    @property
    def zero_v(self) -> zero_v.ZeroVSection:
        """Elements with v = 0 and a gradient."""
        treatment = self.task.settings.zero_v
        return zero_v.ZeroVSection.of(treatment, self.without_v, self.gradients.delta_h1_of_zero_v)


def assemble_report(found: Found, timing: Mapping[str, float]) -> Report:
    """All sections."""
    task, subject, step = found.task, found.task.subject, found.step_statistics
    batch, evaluation, trainer, units = subject.batch, subject.evaluation, subject.trainer, task.plan.units
    folds, kernel, changes = found.realizations.folds, found.gradients.step_weighted.kernel, found.realizations.rows
    entropy = EntropySection.of(batch, found.measured, task.target)
    now, unit = entropy.now(task.target.unit)
    own_step = adamw.AdamWSection.of(
        found.step,
        found.gradient_statistics,
        subject.optimizer,
        found.gradients.ascent,
        found.gradient_norm,
        trainer.max_grad_norm,
        trainer.max_grad_norm_source,
    )
    first = first_order.FirstOrder.of(
        found.statistics,
        step,
        distinct_rates(subject.optimizer),
        first_order.unit_ids(batch, units),
        task.target,
        found.zero_v,
    )
    two = None
    if found.two_batches is not None and evaluation is not None:
        two = two_batches.TwoBatchSection.of(found.two_batches, evaluation, task.off_policy_evaluation)
    return Report(
        headline=whole_headline(own_step, changes, now, unit),
        first_order=first.told(now, unit, own_step.spread_factor),
        needed=NeededSection.of(step, len(batch.groups) / len(units.ranges), task.settings.target_se),
        noise=NoiseSection.of(found.noise, step, asked=task.settings.noise),
        two_batches=two,
        folds=None if folds is None else FoldSection.of(folds, kernel, units.mode, task.unit_weights),
        adamw=own_step,
        off_policy=task.off_policy,
        targets=target_sections(task.also, found.gradients, task.settings.interval, task.unit_weights),
        what_if=WhatIfSection.of(found.what_ifs, found.fall),
        entropy=entropy,
        realized=[realized.RealizedRow.of(change, trainer.max_grad_norm) for change in changes],
        sweep=[sweep.SweepSection.of(curve) for curve in found.realizations.curves],
        units=UnitsSection.of(task.plan, batch),
        engine=engine.EngineSection.of(found.preparation, found.gradients.coverage),
        checkpoint=subject.facts,
        config=config_section(task),
        ranks=_ranks(found),
        warnings=_warnings(found),
        timing=dict(timing),
        versions=versions(),
    )


def _ranks(found: Found) -> RanksSection:
    subject, units = found.task.subject, found.task.plan.units
    batch, count = subject.batch, subject.sharding.ranks.count
    dealt = [units.prompts(share) for share in units.deal(batch.positions, count)]
    tokens = [batch.of_prompts(prompts).tokens for prompts in dealt]
    return RanksSection.of(subject.sharding, [len(prompts) for prompts in dealt], tokens, found.sent)


def _warnings(found: Found) -> list[Evidence]:
    """Those of every section and of the rollouts, in the order in which they are read."""
    task, subject, trainer = found.task, found.task.subject, found.task.subject.trainer
    batch, rows, rule = subject.batch, found.realizations.rows, task.rule
    stored = subject.facts.stored_learning_rates
    return [
        *subject.notes,
        *first_order.learning_rate_warnings(subject.optimizer.group_rates, trainer.learning_rate_source, stored),
        *first_order.interval_warnings(found.statistics, found.step_statistics.negated.ci95),
        *two_batches.two_batch_warnings(found.two_batches),
        *adamw.own_step_warnings(found.step),
        *rollout_warnings.advantage_warnings(rule.largest_advantages, rule.part.group_sizes, trainer.loss.other_terms),
        *rollout_warnings.on_policy_warnings(batch, found.gradients.scores, task.off_policy),
        *off_policy.few_effective_warnings(task.off_policy),
        *rollout_warnings.loss_warnings(
            trainer.length_weight, trainer.loss.source, clip_assumed=rule.takes_ratios and trainer.loss.name is None
        ),
        *rollout_warnings.pairing_warnings(
            batch, subject.facts.trainer_step, trainer.length_weight, trainer.loss.name, trainer.loss.by_micro_batch
        ),
        *rollout_warnings.recorder_warnings(batch),
        *rollout_warnings.padding_warnings(batch, subject.special),
        *checkpoint.parameter_warnings(found.gradients.untouched, found.trained, subject.rivals),
        *zero_v.zero_v_warnings(found.zero_v, found.without_v),
        *engine.coverage_warnings(found.gradients.coverage),
        *realized.rounding_warnings(rows, task.settings.weight_rounding),
        *realized.realized_warnings(rows),
        *sweep.sweep_warnings(found.realizations.curves),
        *(
            replace(warning, seen=f"evaluation rollouts: {warning.seen}")
            for warning in found.realizations.of_evaluation
        ),
        *realized.weighting_warnings(task.settings.weighting, batch.group_sizes),
        *adamw.clipping_warnings(batch, found.gradient_norm, trainer.max_grad_norm),
    ]
