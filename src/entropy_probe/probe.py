"""The probe: what will the next step do to the entropy, how sure are we, and what did it do?

:func:`probe` reads as the method does: fresh scores, coefficients, unit gradients under Adam's geometry, the U-statistic, then
the realised step. Source: guide section 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from entropy_probe import diagnostics
from entropy_probe.adam_preconditioner import AdamState, Preconditioners, validate_preconditioner
from entropy_probe.adam_step import StepsOfOthers, clip_factor, gradient_norm, gradient_weights
from entropy_probe.assemble import assemble_report, describe_checkpoint, describe_model, describe_ranks
from entropy_probe.checkpoints import load_checkpoint, load_sharded_checkpoint, sharding_of
from entropy_probe.collectives import ALONE, Ranks, Sharding
from entropy_probe.errors import InputError
from entropy_probe.gradients import (
    Plan,
    Preparation,
    Rules,
    cross_gradients,
    make_plan,
    marked,
    prepare,
    response_parts,
    unit_gradients,
)
from entropy_probe.inputs import (
    check_cross_memory,
    check_evaluation,
    check_split,
    free_memory,
    read_evaluation,
    resolve_advantages,
    resolve_length_weights,
    times_divided,
)
from entropy_probe.noise import LEAST_UNITS, NoiseParts, noise_of
from entropy_probe.policy import Measured, Policy, check_fits, end_token_ids, input_limits
from entropy_probe.progress import Clock, Progress, Silent
from entropy_probe.realized import HELD_OUT, SAME, EntropyMeasure
from entropy_probe.realized_rows import Realizer
from entropy_probe.report import CheckpointSection, ConfigSection, Evidence, Report
from entropy_probe.resampling import plan_resampling, resample
from entropy_probe.rollouts import RolloutBatch, read_batch
from entropy_probe.same_inputs import (
    check_same_inputs,
    digest_of_adam,
    digest_of_batch,
    digest_of_settings,
    digest_of_tensors,
)
from entropy_probe.scores import (
    EntropyTarget,
    Estimator,
)
from entropy_probe.settings import Settings, ShardingChoice, dtype_name
from entropy_probe.step_parts import Estimate, StepPrediction, predict_parts
from entropy_probe.sweep import SweepCurve, sweep
from entropy_probe.two_batches import TwoBatchStatistics, folds_of, two_batch_statistics
from entropy_probe.u_statistics import CrossStatistics, FloatArray, cross_statistics
from entropy_probe.virtual_step import at_least_float32, below_float32
from entropy_probe.what_if import (
    WhatIf,
    another_clipping,
    another_learning_rate,
    learning_rate_for_fall,
    no_momentum,
    without_negative_advantages,
)
from entropy_probe.wrappers import unwrap

DEFAULTS = Settings()


@dataclass(frozen=True)
class ProbeResult:
    """The report, K_uw = XS_u · YS_w over all parameters (None where vectors were streamed), and what to hand to the next probe
    of the same model."""

    report: Report
    kernel: FloatArray | None
    preparation: Preparation


def probe_checkpoint(
    checkpoint: Path,
    rollouts: Path,
    settings: Settings = DEFAULTS,
    *,
    evaluation_rollouts: Path | None = None,
    base: Path | None = None,
    temperature: float | None = None,
    device: str | torch.device = "cpu",
    ranks: Ranks = ALONE,
    sharding: ShardingChoice = ShardingChoice.REPLICATED,
    progress: Progress | None = None,
) -> ProbeResult:
    """Load a checkpoint folder and a rollouts file, and probe.

    Several ranks share the work, and each gets the same report; every rank must call it, with the same arguments.

    Raises:
        InputError: anything that is wrong with either, in one line.
    """
    clock = Clock()
    ranks.sent.clear()
    with clock.stage("load"):
        batch = read_batch(rollouts, temperature)
        evaluation = None if evaluation_rollouts is None else read_evaluation(evaluation_rollouts, temperature)
        _check_same_arguments(ranks, batch, evaluation, settings, None)
        load = (
            load_checkpoint if sharding is ShardingChoice.REPLICATED else partial(load_sharded_checkpoint, ranks=ranks)
        )
        loaded = load(
            checkpoint,
            base=base,
            dtype=settings.dtype,
            device=device,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
        )
        for rows in (batch, evaluation):
            if rows is not None:
                check_fits(rows, loaded.folder.vocabulary, loaded.folder.context_length)
    subject = _Subject(
        loaded.model,
        loaded.adam,
        sharding_of(loaded.model, ranks),
        batch,
        evaluation,
        describe_checkpoint(loaded),
        loaded.mapping.rivals,
        str(rollouts),
        None if evaluation_rollouts is None else str(evaluation_rollouts),
    )
    return _probe(subject, settings, clock, progress or Silent(), None)


def probe(
    model: nn.Module,
    adam: AdamState,
    batch: RolloutBatch,
    settings: Settings = DEFAULTS,
    *,
    evaluation: RolloutBatch | None = None,
    preparation: Preparation | None = None,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
) -> ProbeResult:
    """Probe a live model; it is left as it was, gradients, flags and random state included.

    Args:
        model: a causal language model (``model(input_ids=, attention_mask=, use_cache=).logits``), DDP-wrapped or not.
        adam: its optimizer's state (:func:`entropy_probe.adam_preconditioner.state_of_optimizer`).
        batch: rollouts (:func:`entropy_probe.rollouts.group_rollouts`).
        settings: see :class:`Settings`; ``dtype`` is the model's own and ``learning_rate`` overrides the optimizer's.
        evaluation: other rollouts of the same policy, from which X is taken against this batch's update; one response a prompt
            will do for Rao-Blackwell (``group_rollouts(rows, least_responses=1)``).
        preparation: of an earlier probe of this very model (``result.preparation``); None finds it anew.
        ranks: who share the work (``Ranks.of_group()``), every one of whom must call with the same batch; by default this
            process does all of it, so that one rank of a job may probe by itself. What one rank alone refuses in the rollouts,
            all refuse; a fault of one (out of memory) is for the job to end, as torchrun does.
        progress: told of long work.

    Raises:
        InputError: the optimizer's state, the rollouts or the preparation do not do.
    """
    if torch.is_inference_mode_enabled():
        raise InputError(
            "torch.inference_mode() is active, where no gradient can be taken; call the probe outside of it"
        )
    ranks.sent.clear()
    _check_same_arguments(ranks, batch, evaluation, settings, preparation)
    model = unwrap(model)
    if settings.learning_rate is not None:
        adam = adam.with_learning_rate(settings.learning_rate)
    sharding = sharding_of(model, ranks)
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    test = validate_preconditioner(adam, shapes, seed=settings.seed, sharding=sharding)
    for rows in (batch, evaluation):
        if rows is not None:
            check_fits(rows, *input_limits(model))
    settings = replace(settings, dtype=next(model.parameters()).dtype)
    subject = _Subject(model, adam, sharding, batch, evaluation, describe_model(model, adam, test), (), None, None)
    return _probe(subject, settings, Clock(), progress or Silent(), preparation)


@dataclass(frozen=True)
class _Subject:
    """What is probed, and what the report says of where it came from."""

    model: nn.Module
    adam: AdamState
    sharding: Sharding
    batch: RolloutBatch
    evaluation: RolloutBatch | None
    facts: CheckpointSection
    rivals: tuple[str, ...]
    rollouts: str | None
    evaluation_rollouts: str | None


def _check_same_arguments(
    ranks: Ranks,
    batch: RolloutBatch,
    evaluation: RolloutBatch | None,
    settings: Settings,
    preparation: Preparation | None,
) -> None:
    """Before anything that one rank may refuse by itself: the others would wait for it."""
    if ranks.count == 1:
        return
    known = None if preparation is None else (preparation.head, preparation.chunked, preparation.longest)
    check_same_inputs(
        ranks,
        {
            "rollouts": digest_of_batch(batch),
            "evaluation rollouts": digest_of_batch(evaluation),
            "settings": digest_of_settings(settings, known),
        },
    )


def _check_same_state(subject: _Subject) -> None:
    """Weights and moments where all ranks have all; of shards every rank has others."""
    if subject.sharding.ranks.count == 1:
        return
    steps = {name: moments.step for name, moments in subject.adam.moments.items()}
    found = {"optimizer settings": digest_of_settings(subject.adam.groups, steps)}
    if subject.sharding.replicated:
        weights = {name: p.detach() for name, p in subject.model.named_parameters()}
        buffers = {name: b for name, b in subject.model.named_buffers() if b.numel()}
        found |= {"weights": digest_of_tensors(weights | buffers), "optimizer state": digest_of_adam(subject.adam)}
    check_same_inputs(subject.sharding.ranks, found)


def _probe(
    subject: _Subject, settings: Settings, clock: Clock, progress: Progress, preparation: Preparation | None
) -> ProbeResult:
    with marked(subject.model) if settings.gradient_checkpointing else nullcontext():
        return _probe_as_marked(subject, settings, clock, progress, preparation)


def _probe_as_marked(
    subject: _Subject, settings: Settings, clock: Clock, progress: Progress, preparation: Preparation | None
) -> ProbeResult:
    model, adam, batch, evaluation = subject.model, subject.adam, subject.batch, subject.evaluation
    ranks = subject.sharding.ranks
    _check_same_state(subject)
    if evaluation is not None:
        check_evaluation(evaluation, batch, settings)
    if settings.split is not None:
        check_split(len(batch.groups), settings.split)
    narrow = [p for p in model.parameters() if p.dtype.itemsize < torch.float32.itemsize]
    if subject.sharding.sharded and narrow:
        raise InputError(
            f"sharded weights are {dtype_name(narrow[0].dtype)}, in which a small step would vanish, and FSDP2's "
            "cannot be probed as float32 copies; use --dtype float32 --autocast bfloat16, or --sharding replicated"
        )
    policy = Policy(model, batch.temperature, autocast=settings.autocast, sharding=subject.sharding)
    trainable = policy.trainable()
    if not trainable:
        raise InputError(
            "the model has no trainable parameter; is it frozen? Set requires_grad on what the optimizer trains"
        )
    target = EntropyTarget(settings.estimator, settings.entropy)
    p = Preconditioners(adam)
    rates = {name: group.learning_rate for name, group in adam.group_of().items()}

    advantages, rule = resolve_advantages(batch, settings.advantage)
    y_coefficients = advantages * resolve_length_weights(batch, settings)

    memory = settings.memory_bytes if settings.memory_bytes is not None else free_memory(policy.device, ranks)
    vector_dtype = settings.vector_dtype or torch.promote_types(policy.dtype, torch.float32)
    plan = make_plan(
        settings.mode,
        settings.blocks,
        prompts=len(batch.groups),
        parameters=sum(parameter.numel() for parameter in trainable.values()),
        bytes_per_value=vector_dtype.itemsize,
        memory_bytes=memory * times_divided(subject.sharding, batch),
    )
    with clock.stage("prepare"):
        # Planned for both batches: the evaluation's rows may be the longer ones.
        rows = batch if evaluation is None else RolloutBatch((*batch.groups, *evaluation.groups), batch.temperature)
        preparation = prepare(
            policy, rows, memory_bytes=memory, microbatch_size=settings.microbatch_size, earlier=preparation
        )
        policy = preparation.applied(policy)
    resampling = None
    if settings.resample:
        resampling = plan_resampling(policy, batch, settings.max_completion_length, settings.seed)

    def steps_of_others(ascent: Mapping[str, Tensor]) -> StepsOfOthers:
        factor = clip_factor(gradient_norm(ascent, policy.sharding), settings.max_grad_norm)
        return StepsOfOthers(policy.held(), adam, ascent, factor, plan.units.sizes)

    with clock.stage("gradients"):
        gradients = unit_gradients(
            policy,
            batch,
            plan.units,
            target,
            y_coefficients,
            p,
            rates,
            storage=plan.storage,
            vector_dtype=vector_dtype,
            thirds=settings.noise and len(plan.units.ranges) >= LEAST_UNITS and len(set(plan.units.sizes)) == 1,
            rules=preparation.rules,
            look=steps_of_others,
            progress=progress,
        )
    scores = gradients.scores
    statistics = cross_statistics(gradients.total)
    two_batches = None
    if evaluation is not None:
        room = memory * times_divided(subject.sharding, evaluation, batch)
        check_cross_memory(len(evaluation.groups) + len(batch.groups), trainable, vector_dtype, room)
        with clock.stage("evaluation"):
            two_batches = against_evaluation(
                policy,
                evaluation,
                batch,
                target,
                y_coefficients,
                p,
                rates,
                vector_dtype,
                gradients.rules or preparation.rules,
                progress,
            )

    with clock.stage("realized"):
        preparation = replace(preparation, rules=gradients.rules or preparation.rules)
        measures = [EntropyMeasure(target, settings.weighting)]
        if target.estimator is not Estimator.SCORE:
            measures.append(EntropyMeasure(replace(target, estimator=Estimator.SCORE), settings.weighting))
        same_arithmetic = policy.autocast is None and not below_float32(model)
        with at_least_float32(model):
            realizer = Realizer(
                replace(policy, autocast=None),
                p,
                rates,
                adam,
                measures,
                preparation.rules if same_arithmetic else None,
                progress,
                max_grad_norm=settings.max_grad_norm,
            )
            before = Measured(scores, gradients.token_entropies) if same_arithmetic else realizer.measured(batch)
            steps = realizer.steps(gradients.ascent)
            realized = realizer.realized(batch, before, steps, SAME)
            factors = () if settings.sweep is None else settings.sweep.factors
            curves = list[SweepCurve]()
            if factors:
                curves += sweep(realizer.policy, batch, before, steps, realized, factors, progress)
            if resampling is not None:
                realized += resample(realizer.policy, batch, before, steps, realized, resampling, progress)
            folds, of_evaluation = None, list[Evidence]()
            if settings.split is not None:
                folds = folds_of(len(batch.groups), settings.split)
                realized += realizer.by_folds(batch, folds, gradients.ascent, y_coefficients)
            if evaluation is not None:
                evaluated = realizer.measured(evaluation)
                held_out = realizer.realized(evaluation, evaluated, steps, HELD_OUT)
                realized += held_out
                if factors:
                    curves += sweep(realizer.policy, evaluation, evaluated, steps, held_out, factors, progress)
                of_evaluation = [
                    *diagnostics.on_policy_warnings(evaluation, evaluated.scores),
                    *diagnostics.pairing_warnings(evaluation, subject.facts.trainer_step, settings.length_weight),
                    *diagnostics.end_token_warnings(evaluation, end_token_ids(model)),
                ]

    # Only now: an absurd learning rate, which would overflow here, has been refused by its step.
    step_statistics = cross_statistics(gradients.step_weighted)
    noise: NoiseParts | None = None
    if gradients.third_directions is not None and step_statistics.parts is not None:
        with clock.stage("noise"):
            x_directions, y_directions = gradients.third_directions
            of_x, of_y = response_parts(
                policy,
                batch,
                target,
                Measured(scores, gradients.token_entropies),
                y_coefficients,
                x_directions,
                y_directions,
                rules=preparation.rules,
                progress=progress,
            )
            noise = noise_of(step_statistics, of_x.numpy(), of_y.numpy(), batch.group_sizes, plan.units)
    norm = gradient_norm(gradients.ascent, policy.sharding)
    weights = gradient_weights(adam, gradients.ascent, clip_factor(norm, settings.max_grad_norm))
    gradient_statistics = None if weights is None else cross_statistics(gradients.weighted(weights))
    assert gradients.looked is not None
    step = predict_parts(gradients.looked.along, gradients.looked.kernel, plan.units.sizes)
    positive = None
    if settings.what_if_no_negatives:
        with clock.stage("what-if"):
            positive = without_negatives(
                policy, batch, plan, target, y_coefficients, p, rates, vector_dtype, preparation.rules, progress
            )
    what_ifs = asked_what_ifs(settings, step, step_statistics, positive, adam, norm)
    fall = None if settings.what_if_fall is None else learning_rate_for_fall(step, settings.what_if_fall)

    warnings = [
        *diagnostics.learning_rate_warnings(adam, settings.learning_rate is not None),
        *diagnostics.interval_warnings(statistics, step_statistics.ci95_of_minus),
        *diagnostics.two_batch_warnings(two_batches),
        *diagnostics.advantage_warnings(advantages, batch.group_sizes),
        *diagnostics.on_policy_warnings(batch, scores),
        *diagnostics.pairing_warnings(batch, subject.facts.trainer_step, settings.length_weight),
        *diagnostics.end_token_warnings(batch, end_token_ids(model)),
        *diagnostics.parameter_warnings(gradients.untouched, gradients.ascent, adam, subject.rivals, policy.sharding),
        *diagnostics.coverage_warnings(gradients.coverage),
        *diagnostics.realized_warnings(realized),
        *diagnostics.sweep_warnings(curves),
        *(replace(warning, seen=f"evaluation rollouts: {warning.seen}") for warning in of_evaluation),
        *diagnostics.weighting_warnings(settings.weighting, batch.group_sizes),
        *diagnostics.clipping_warnings(batch, norm, settings.max_grad_norm),
    ]
    dealt = [plan.units.prompts(share) for share in plan.units.deal(batch.positions, ranks.count)]
    report = assemble_report(
        statistics=statistics,
        step_statistics=step_statistics,
        step_kernel=gradients.step_weighted.kernel,
        plan=plan,
        batch=batch,
        target=target,
        target_se=settings.target_se,
        measured=Measured(scores, gradients.token_entropies),
        adam=adam,
        realized=realized,
        sweep=curves,
        two_batches=two_batches,
        noise=noise,
        evaluation=evaluation,
        folds=folds,
        step=step,
        gradient_statistics=gradient_statistics,
        reached=gradients.ascent,
        gradient_norm=norm,
        what_ifs=what_ifs,
        fall=fall,
        warnings=warnings,
        config=ConfigSection(
            mode=settings.mode,
            blocks=settings.blocks,
            estimator=settings.estimator,
            entropy=settings.entropy,
            importance_weights=settings.weighting,
            evaluation_rollouts=subject.evaluation_rollouts,
            noise=settings.noise,
            split=settings.split,
            sweep=None if settings.sweep is None else [settings.sweep.low, settings.sweep.high, settings.sweep.count],
            resample=settings.resample,
            rollouts=subject.rollouts,
            advantage=rule,
            length_weight=settings.length_weight,
            max_completion_length=settings.max_completion_length,
            learning_rate=settings.learning_rate,
            temperature=batch.temperature,
            dtype=dtype_name(settings.dtype),
            autocast=None if settings.autocast is None else dtype_name(settings.autocast),
            microbatch_size=settings.microbatch_size,
            vector_dtype=dtype_name(vector_dtype),
            gradient_checkpointing=settings.gradient_checkpointing,
            memory_bytes=settings.memory_bytes,
            device=str(policy.device),
            seed=settings.seed,
            max_grad_norm=settings.max_grad_norm,
        ),
        checkpoint=subject.facts,
        preparation=preparation,
        coverage=gradients.coverage,
        ranks=describe_ranks(
            subject.sharding,
            [len(prompts) for prompts in dealt],
            [batch.of_prompts(prompts).tokens for prompts in dealt],
            ranks.most_sent(),
        ),
        timing=clock.seconds(),
    )
    return ProbeResult(report, gradients.total.kernel, preparation)


def without_negatives(
    policy: Policy,
    batch: RolloutBatch,
    plan: Plan,
    target: EntropyTarget,
    coefficients: Tensor,
    p: Mapping[str, Tensor],
    rates: Mapping[str, float],
    vector_dtype: torch.dtype,
    rules: Rules,
    progress: Progress,
) -> CrossStatistics:
    """η-weighted statistics of X against the Y of responses with positive advantage alone: one more pass over the batch."""
    gradients = unit_gradients(
        policy,
        batch,
        plan.units,
        target,
        coefficients.clamp(min=0.0),
        p,
        rates,
        storage=plan.storage,
        vector_dtype=vector_dtype,
        rules=rules,
        progress=progress,
    )
    return cross_statistics(gradients.step_weighted)


def asked_what_ifs(
    settings: Settings,
    step: StepPrediction,
    delta_h1: CrossStatistics,
    positive: CrossStatistics | None,
    adam: AdamState,
    norm: float,
) -> list[WhatIf]:
    """Those that need no number, and those that the settings give one for."""

    def estimate(found: CrossStatistics) -> Estimate:
        return Estimate(-found.u_cross, found.se, "" if found.se is not None else found.null_reasons["variance"])

    found = [no_momentum(step)]
    if positive is not None:
        found.append(without_negative_advantages(estimate(positive)))
    if (rate := settings.what_if_learning_rate) is not None:
        found.append(another_learning_rate(step, estimate(delta_h1), adam.learning_rates, rate))
    if (limit := settings.what_if_max_grad_norm) is not None:
        factors = (clip_factor(norm, settings.max_grad_norm), clip_factor(norm, limit))
        found.append(another_clipping(step, *factors, limit))
    return found


def against_evaluation(
    policy: Policy,
    evaluation: RolloutBatch,
    batch: RolloutBatch,
    target: EntropyTarget,
    coefficients: Tensor,
    p: Mapping[str, Tensor],
    rates: Mapping[str, float],
    vector_dtype: torch.dtype,
    rules: Rules,
    progress: Progress,
) -> TwoBatchStatistics:
    """η-weighted statistics of X of the evaluation batch against Y of the update batch."""
    kernel = cross_gradients(
        policy,
        evaluation,
        batch,
        target,
        coefficients,
        p,
        rates,
        vector_dtype=vector_dtype,
        rules=rules,
        progress=progress,
    )
    return two_batch_statistics(kernel.numpy())
