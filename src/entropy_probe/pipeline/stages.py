"""The stages of a probe, in the order in which it takes them: what each needs of the rest is its task.

Source: docs/method.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from entropy_probe.common.arrays import FloatArray
from entropy_probe.common.evidence import Evidence
from entropy_probe.common.progress import Clock, Progress
from entropy_probe.data.rollouts import RolloutBatch, SpecialIds
from entropy_probe.errors import InputError
from entropy_probe.gradients import (
    Directions,
    Plan,
    Preparation,
    Rules,
    Sides,
    UnitGradients,
    Wanted,
    cross_gradients,
    make_plan,
    prepare,
    refuse_cut,
    response_parts,
    unit_gradients,
)
from entropy_probe.model.measured import Measured
from entropy_probe.model.policy import Policy, check_finite
from entropy_probe.model.virtual_step import at_least_float32, below_float32
from entropy_probe.optimizers.base import Look, OptimizerState, distinct_rates
from entropy_probe.optimizers.clipping import clip_factor, gradient_norm
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.optimizers.rounding import RoundingRule
from entropy_probe.optimizers.step_parts import StepPrediction
from entropy_probe.optimizers.what_if import (
    WhatIf,
    another_clipping,
    another_learning_rate,
    no_momentum,
    without_negative_advantages,
)
from entropy_probe.pipeline.also_moved import AlsoMoved, plan_targets, without_dear_ones
from entropy_probe.pipeline.inputs import (
    check_cross_memory,
    check_evaluation,
    check_interval,
    check_split,
    free_memory,
    times_divided,
    units_on_a_rank,
)
from entropy_probe.pipeline.recorded import TrainersStep
from entropy_probe.pipeline.sampler_weights import may_need_weights, reweighted
from entropy_probe.pipeline.settings import Analyses, Settings
from entropy_probe.pipeline.torch_types import dtype_name
from entropy_probe.pipeline.update import Update, UpdateRule
from entropy_probe.ranks.sharding import Sharding
from entropy_probe.realized.changes import RealizedChange
from entropy_probe.realized.measure import EntropyMeasure
from entropy_probe.realized.resampling import GENERATED_TOGETHER, Resampling, plan_resampling, resample
from entropy_probe.realized.rows import Realizer
from entropy_probe.realized.steps import HELD_OUT, SAME
from entropy_probe.realized.sweep import SweepCurve, sweep
from entropy_probe.report import CheckpointSection, rollout_warnings
from entropy_probe.report.sections.off_policy import OffPolicySection, few_effective_warnings
from entropy_probe.statistics.importance_sampling import base_weights
from entropy_probe.statistics.noise import LEAST_UNITS, NoiseParts, noise_of
from entropy_probe.statistics.two_batches import TwoBatchStatistics, folds_of, two_batch_statistics
from entropy_probe.statistics.u_statistics import CrossStatistics, cross_statistics
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.entropy import EntropyTarget


@dataclass(frozen=True)
class Subject:
    """What is probed, and what the report says of where it came from.

    ``sent_before`` payloads of the ranks' record are the caller's, from before the probe.
    """

    model: nn.Module
    optimizer: OptimizerState
    sharding: Sharding
    batch: RolloutBatch
    evaluation: RolloutBatch | None
    facts: CheckpointSection
    rivals: tuple[str, ...]
    rollouts: str | None
    evaluation_rollouts: str | None
    trainer: TrainersStep
    special: SpecialIds
    notes: tuple[Evidence, ...] = ()
    freeze: tuple[str, ...] = ()
    sent_before: int = 0


@dataclass(frozen=True)
class Task:
    """What follows from a subject and the settings before any gradient is taken.

    Attributes:
        subject: what is probed; its rollouts with what each response counts.
        settings: as asked for.
        policy: the model at θ, as it was prepared.
        target: what X estimates.
        also: what else is differentiated.
        rule: the trainer's loss over the rows that the step consumes.
        update: Y's coefficients by it.
        measured: log-probs of every response token at θ, where coefficients or weights depend on them; else None.
        off_policy: what responses of another policy count in X and in the entropy, and why.
        off_policy_evaluation: the same of the evaluation rollouts.
        geometry: P and η by name, and the type of unit vectors.
        plan: units, and whether their vectors are stored.
        memory_bytes: that may be used, of one rank.
        resampling: None where no fresh responses are asked for.
        progress: told of long work.
    """

    subject: Subject
    settings: Settings
    policy: Policy
    target: EntropyTarget
    also: AlsoMoved
    rule: UpdateRule
    update: Update
    measured: Measured | None
    off_policy: OffPolicySection
    off_policy_evaluation: OffPolicySection
    geometry: Geometry
    plan: Plan
    memory_bytes: float
    resampling: Resampling | None
    progress: Progress

    @property
    def vector_dtype(self) -> torch.dtype:
        """Of unit vectors."""
        return self.geometry.vector_dtype(self.policy.dtype)

    @property
    def unit_weights(self) -> FloatArray | None:
        """W_u / W̄ of every unit, [U], where responses of another policy are weighed."""
        batch = self.subject.batch
        if batch.importance is None:
            return None
        of_prompts = batch.importance.of_prompts(batch.group_sizes).numpy()
        return np.array([of_prompts[prompts.start : prompts.stop].mean() for prompts in self.plan.units.ranges])


def make_task(
    subject: Subject, settings: Settings, earlier: Preparation | None, clock: Clock, progress: Progress
) -> tuple[Task, Preparation]:
    """Check what was given, plan, and prepare the model.

    Raises:
        InputError: the model, the rollouts or the settings do not do.
    """
    model, batch, evaluation = subject.model, subject.batch, subject.evaluation
    if evaluation is not None:
        check_evaluation(evaluation, batch, settings)
    if settings.split is not None:
        check_split(len(batch.groups), settings.split)
    narrow = [p for p in model.parameters() if p.dtype.itemsize < torch.float32.itemsize]
    if subject.sharding.sharded and narrow:
        raise InputError(
            f"sharded weights are {dtype_name(narrow[0].dtype)}, in which a small step would vanish, and FSDP2's "
            "cannot be probed as float32 copies; set dtype to float32 and autocast to bfloat16, or sharding to replicated"
        )
    policy = Policy(model, batch.temperature, autocast=subject.trainer.autocast, sharding=subject.sharding)
    trainable = policy.trainable()
    if not trainable:
        raise InputError(
            "the model has no trainable parameter; is it frozen? Set requires_grad on what the optimizer trains"
        )
    rule = UpdateRule.of(batch, subject.trainer, settings.advantage)
    # What needs no model is refused before anything is computed.
    update = None if rule.needs_forward else rule.update(None)
    weighs = may_need_weights(batch, settings)
    weighs_evaluation = evaluation is not None and may_need_weights(evaluation, settings)
    ranks = subject.sharding.ranks
    memory = settings.memory_bytes if settings.memory_bytes is not None else free_memory(policy.device, ranks)
    geometry = Geometry.of(subject.optimizer, settings.vector_dtype)
    objective = rule.loss.objective
    terms = sum(term is not None for term in (objective.kl, objective.bonus))

    def plan_for(vectors: int) -> Plan:
        return make_plan(
            settings.mode,
            settings.blocks,
            prompts=len(batch.groups),
            parameters=sum(parameter.numel() for parameter in trainable.values()),
            bytes_per_value=geometry.vector_dtype(policy.dtype).itemsize,
            memory_bytes=memory,
            most_held=partial(units_on_a_rank, subject.sharding, batch),
            # Terms of the loss beside the reward's have vectors of their own.
            vectors=vectors + terms,
        )

    plan, also = plan_targets(batch, plan_for, asked=settings.targets)
    check_interval(settings.interval, plan)
    with clock.stage("prepare"):
        # Planned for both batches: the evaluation's rows may be the longer ones.
        rows = batch if evaluation is None else RolloutBatch((*batch.groups, *evaluation.groups), batch.temperature)
        preparation = prepare(
            policy, rows, memory_bytes=memory, microbatch_size=settings.microbatch_size, earlier=earlier
        )
        policy = preparation.applied(policy)
    measured = None
    if update is None or weighs:
        with clock.stage("log_probs"):
            measured = measured_at_theta(policy, batch, progress, entropies=rule.loss.objective.needs_entropies)
    update = rule.update(measured) if update is None else update
    batch, off_policy = reweighted(batch, measured if weighs else None, settings)
    off_policy_evaluation = off_policy
    if evaluation is not None:
        found = None
        if weighs_evaluation:
            with clock.stage("evaluation_log_probs"):
                found = measured_at_theta(policy, evaluation, progress, entropies=False)
        evaluation, off_policy_evaluation = reweighted(evaluation, found, settings)
    subject = replace(subject, batch=batch, evaluation=evaluation)
    target = EntropyTarget(settings.estimator, settings.entropy)
    if not settings.targets:
        backward = Sides(target, update.whole).backward_for_targets(batch)
        plan, also = without_dear_ones(plan, also, preparation.rules, plan_for, backward=backward)
    resampling = None
    if settings.resample:
        resampling = plan_resampling(
            policy,
            batch,
            settings.max_completion_length,
            settings.seed,
            settings.resample_batch or GENERATED_TOGETHER,
        )
    task = Task(
        subject=subject,
        settings=settings,
        policy=policy,
        target=target,
        also=also,
        rule=rule,
        update=update,
        measured=measured,
        off_policy=off_policy,
        off_policy_evaluation=off_policy_evaluation,
        geometry=geometry,
        plan=plan,
        memory_bytes=memory,
        resampling=resampling,
        progress=progress,
    )
    return task, preparation


def measured_at_theta(policy: Policy, batch: RolloutBatch, progress: Progress, *, entropies: bool) -> Measured:
    """Log-probs of every response token, and entropies on request, by a forward of its own.

    Raises:
        InputError: a response without a finite score; its prompt is named.
    """
    found = policy.measure(batch.responses, progress, entropies=entropies)
    check_finite(found.scores, batch.responses)
    return found


def gradients_of_units(task: Task, rules: Rules | None) -> UnitGradients:
    """X_u and Y_u under P, and the step's parts from the other units' updates along them.

    Raises:
        InputError: no gradient reaches a parameter that training did reach.
    """
    settings, policy, units = task.settings, task.policy, task.plan.units

    def steps_of_others(ascent: Mapping[str, Tensor], terms: Sequence[Mapping[str, Tensor]]) -> Look:
        factor = clip_factor(gradient_norm(ascent, policy.sharding), task.subject.trainer.max_grad_norm)
        return task.subject.optimizer.steps_of_others(policy.held(), ascent, factor, units.sizes, terms)

    found = unit_gradients(
        policy,
        task.subject.batch,
        units,
        Sides(task.target, task.update.whole, task.also.given, task.update.terms),
        task.geometry,
        wanted=Wanted(
            task.plan.storage,
            thirds=settings.noise and len(units.ranges) >= LEAST_UNITS and len(set(units.sizes)) == 1,
            look=steps_of_others,
        ),
        rules=rules,
        progress=task.progress,
    )
    refuse_cut(found.cut, task.subject.optimizer, policy.sharding)
    return found


def against_evaluation(task: Task, evaluation: RolloutBatch, rules: Rules | None) -> TwoBatchStatistics:
    """η-weighted statistics of X of the evaluation batch against Y of the update batch.

    Raises:
        InputError: the vectors of both do not fit.
    """
    batch, policy = task.subject.batch, task.policy
    room = task.memory_bytes * times_divided(policy.sharding, evaluation, batch)
    check_cross_memory(len(evaluation.groups) + len(batch.groups), policy.trainable(), task.vector_dtype, room)
    kernel = cross_gradients(
        policy,
        evaluation,
        batch,
        task.target,
        task.update.whole,
        task.geometry,
        rules=rules,
        progress=task.progress,
    )
    importance = evaluation.importance
    weights = None if importance is None else importance.of_prompts(evaluation.group_sizes).numpy()
    return two_batch_statistics(kernel.numpy(), weights)


@dataclass(frozen=True)
class Realizations:
    """The realised changes of the steps, and what is beside them.

    Attributes:
        rows: of the report.
        curves: of a sweep; none where none was asked for.
        folds: of every prompt, where they were held out.
        of_evaluation: what the evaluation batch's scores gave cause to say.
    """

    rows: Sequence[RealizedChange]
    curves: Sequence[SweepCurve]
    folds: Sequence[int] | None
    of_evaluation: Sequence[Evidence]


def realize_steps(task: Task, gradients: UnitGradients, rules: Rules | None) -> Realizations:
    """Every step on every batch that was asked for, with weights and arithmetic of float32 at least."""
    settings, policy, batch, evaluation = task.settings, task.policy, task.subject.batch, task.subject.evaluation
    model, progress = task.subject.model, task.progress
    measures = [EntropyMeasure(task.target, settings.weighting)]
    if task.target.estimator is not Estimator.SCORE:
        measures.append(EntropyMeasure(replace(task.target, estimator=Estimator.SCORE), settings.weighting))
    same_arithmetic = policy.arithmetic_dtype() == policy.dtype and not below_float32(model)
    with at_least_float32(model):
        realizer = Realizer(
            replace(policy, autocast=None),
            task.geometry,
            task.subject.optimizer,
            measures,
            rules if same_arithmetic else None,
            progress,
            max_grad_norm=task.subject.trainer.max_grad_norm,
            rounding=RoundingRule(settings.weight_rounding, settings.seed),
        )
        before = gradients.measured if same_arithmetic else realizer.measured(batch)
        steps = realizer.steps(gradients.ascent)
        rows = realizer.realized(batch, before, steps, SAME, gradients.slope if same_arithmetic else None)
        factors = () if settings.sweep is None else settings.sweep.factors
        curves = list[SweepCurve]()
        if factors:
            curves += sweep(realizer.policy, batch, before, steps, rows, factors, progress)
        if task.resampling is not None:
            rows += resample(realizer.policy, batch, before, steps, rows, task.resampling, progress)
        folds, of_evaluation = None, list[Evidence]()
        if settings.split is not None:
            folds = folds_of(len(batch.groups), settings.split)
            rows += realizer.by_folds(batch, folds, gradients.ascent, task.update.whole)
        if evaluation is not None:
            evaluated = realizer.measured(evaluation)
            held_out = realizer.realized(evaluation, evaluated, steps, HELD_OUT)
            rows += held_out
            if factors:
                curves += sweep(realizer.policy, evaluation, evaluated, steps, held_out, factors, progress)
            of_evaluation = [
                *rollout_warnings.on_policy_warnings(evaluation, evaluated.scores, task.off_policy_evaluation),
                *few_effective_warnings(task.off_policy_evaluation),
                *rollout_warnings.pairing_warnings(
                    evaluation,
                    task.subject.facts.trainer_step,
                    task.subject.trainer.length_weight,
                    task.subject.trainer.loss.name,
                ),
                *rollout_warnings.padding_warnings(evaluation, task.subject.special),
            ]
    return Realizations(rows, curves, folds, of_evaluation)


def noise_by_responses(
    task: Task,
    gradients: UnitGradients,
    directions: Directions,
    statistics: CrossStatistics,
    rules: Rules | None,
) -> NoiseParts | None:
    """How much of the error is within prompts and how much between them, from ``directions`` of thirds of the units."""
    batch = task.subject.batch
    of_x, of_y = response_parts(
        task.policy,
        batch,
        task.target,
        gradients.measured,
        task.update.whole,
        directions,
        rules=rules,
        progress=task.progress,
    )
    x = of_x.numpy()
    if batch.importance is not None:
        # W̄ ties all responses: each also moves it, and with it X̄ of every third.
        shares = batch.importance.weights.numpy() * base_weights(batch.group_sizes)
        x = x - len(batch.groups) * shares[:, None] * (x.sum(axis=0) / len(batch.groups))[None, :]
    return noise_of(statistics, x, of_y.numpy(), batch.group_sizes, task.plan.units.of_prompts)


def without_negatives(task: Task, rules: Rules | None) -> CrossStatistics:
    """η-weighted statistics of X against the Y of responses with positive advantage alone: one more pass over the batch."""
    gradients = unit_gradients(
        task.policy,
        task.subject.batch,
        task.plan.units,
        Sides(task.target, task.rule.without_negatives().update(task.measured).whole),
        task.geometry,
        wanted=Wanted(task.plan.storage),
        rules=rules,
        progress=task.progress,
    )
    return cross_statistics(gradients.step_weighted, weights=task.unit_weights)


def asked_what_ifs(
    asked: Analyses,
    step: StepPrediction,
    delta_h1: CrossStatistics,
    positive: CrossStatistics | None,
    optimizer: OptimizerState,
    norm: float,
    max_grad_norm: float | None,
) -> list[WhatIf]:
    """Those that need no number, and those that the settings give one for."""
    found = [no_momentum(step)]
    if positive is not None:
        found.append(without_negative_advantages(positive.negated))
    if (rate := asked.what_if_learning_rate) is not None:
        found.append(another_learning_rate(step, delta_h1.negated, distinct_rates(optimizer), rate))
    if (limit := asked.what_if_max_grad_norm) is not None:
        factors = (clip_factor(norm, max_grad_norm), clip_factor(norm, limit))
        found.append(another_clipping(step, *factors, limit))
    return found
