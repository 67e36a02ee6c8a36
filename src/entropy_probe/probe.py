"""The probe: what will the next step do to the entropy, how sure are we, and what did it do?

:func:`probe` reads as the method does: fresh scores, coefficients, unit gradients under Adam's geometry, the U-statistic, then
the realised step. Source: guide section 6.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from entropy_probe import diagnostics
from entropy_probe.adam_preconditioner import AdamState, Preconditioners, validate_preconditioner
from entropy_probe.adam_step import StepDirections, clip_factor, gradient_norm, gradient_weights
from entropy_probe.assemble import assemble_report, describe_checkpoint, describe_model
from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.errors import InputError
from entropy_probe.gradients import (
    VECTOR_SHARE,
    Plan,
    Preparation,
    Rules,
    Storage,
    cross_gradients,
    make_plan,
    marked,
    prepare,
    unit_gradients,
)
from entropy_probe.importance_sampling import Weighting
from entropy_probe.policy import Measured, Policy, check_fits, end_token_ids, input_limits
from entropy_probe.progress import Progress, Silent
from entropy_probe.realized import HELD_OUT, SAME, EntropyMeasure
from entropy_probe.realized_rows import Realizer
from entropy_probe.report import CheckpointSection, ConfigSection, Evidence, Report
from entropy_probe.rollouts import RolloutBatch, read_batch
from entropy_probe.scores import (
    AdvantageRule,
    EntropyTarget,
    EntropyUnit,
    Estimator,
    LengthWeight,
    advantages_from_rewards,
    length_weights,
)
from entropy_probe.step_parts import Estimate, StepPrediction, predict_parts
from entropy_probe.two_batches import TwoBatchStatistics, folds_of, two_batch_statistics
from entropy_probe.u_statistics import CrossStatistics, FloatArray, cross_statistics
from entropy_probe.units import Mode
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


@dataclass(frozen=True)
class Settings:
    """How to probe.

    Attributes:
        mode: EXACT, BLOCK, or by memory.
        blocks: number of blocks; implies BLOCK.
        estimator: of the entropy and its gradient.
        entropy: per response, or per token (H/T̄).
        weighting: over which responses the realised change normalises its importance weights.
        target_se: a standard error of δH₁, nats, to say how many prompts would reach.
        split: folds of prompts; the step from all others is realised on each, and δH₁ is taken across them.
        learning_rate: replaces the stored one; None keeps it.
        advantage: None takes the rollouts' own if they have any, else dr_grpo.
        length_weight: of the training loss.
        max_completion_length: Dr. GRPO's constant; None takes the rollouts' own.
        dtype: of weights and arithmetic, where a checkpoint is loaded.
        autocast: mixed precision over float32 weights, for the gradients only.
        microbatch_size: responses in one forward; None takes what fits.
        memory_bytes: what the probe may use; None takes what is free.
        vector_dtype: of stored unit vectors; None takes that of the weights, float32 at least. bfloat16 halves the memory.
        gradient_checkpointing: layers keep their inputs alone and run once more in the backward; a live model's own setting
            counts too.
        seed: of the validator's test vectors.
        max_grad_norm: at which the trainer clips the gradient; None does not clip.
        what_if_learning_rate: to say what a step at this learning rate would do.
        what_if_max_grad_norm: to say what a step clipped at this norm would do.
        what_if_fall: nats, to say which multiple of the learning rate would lower the entropy by them.
    """

    mode: Mode = Mode.AUTO
    blocks: int | None = None
    estimator: Estimator = Estimator.RAO_BLACKWELL
    entropy: EntropyUnit = EntropyUnit.PER_RESPONSE
    weighting: Weighting = Weighting.GLOBAL
    target_se: float | None = None
    split: int | None = None
    learning_rate: float | None = None
    advantage: AdvantageRule | None = None
    length_weight: LengthWeight = LengthWeight.GUIDE
    max_completion_length: int | None = None
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    microbatch_size: int | None = None
    memory_bytes: float | None = None
    vector_dtype: torch.dtype | None = None
    gradient_checkpointing: bool = False
    seed: int = 0
    max_grad_norm: float | None = None
    what_if_learning_rate: float | None = None
    what_if_max_grad_norm: float | None = None
    what_if_fall: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if self.microbatch_size is not None and self.microbatch_size < 1:
            raise InputError(f"microbatch size is {self.microbatch_size}; expected at least 1")
        if self.memory_bytes is not None and not 0 < self.memory_bytes < float("inf"):
            raise InputError(f"memory is {self.memory_bytes} bytes; expected a finite number above 0")
        if self.target_se is not None and not 0 < self.target_se < float("inf"):
            raise InputError(f"target standard error is {self.target_se}; expected a finite number of nats above 0")
        for what, value in (
            ("max-grad-norm", self.max_grad_norm),
            ("what-if-learning-rate", self.what_if_learning_rate),
            ("what-if-max-grad-norm", self.what_if_max_grad_norm),
            ("what-if-fall", self.what_if_fall),
        ):
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{what} is {value}; expected a finite number above 0, or leave it out")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; expected 0 to 2^63 - 1")
        if self.max_completion_length is not None and self.length_weight is not LengthWeight.DR_GRPO:
            raise InputError(
                f"max-completion-length is Dr. GRPO's constant; length weight {self.length_weight} does not use it, drop it"
            )
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise InputError(f"max-completion-length is {self.max_completion_length}; expected at least 1")
        if self.vector_dtype is not None and (self.dtype is torch.float64) is not (self.vector_dtype is torch.float64):
            raise InputError(
                f"vectors in {_name(self.vector_dtype)} with arithmetic in {_name(self.dtype)}: float64 goes with float64 alone"
            )
        if self.autocast is not None and self.dtype is not torch.float32:
            raise InputError("--autocast goes with --dtype float32: mixed precision is over float32 weights")


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
    settings: Settings = Settings(),
    *,
    evaluation_rollouts: Path | None = None,
    base: Path | None = None,
    temperature: float | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> ProbeResult:
    """Load a checkpoint folder and a rollouts file, and probe.

    Raises:
        InputError: anything that is wrong with either, in one line.
    """
    clock = Clock()
    with clock.stage("load"):
        batch = read_batch(rollouts, temperature)
        evaluation = None if evaluation_rollouts is None else read_evaluation(evaluation_rollouts, temperature)
        loaded = load_checkpoint(
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
    settings: Settings = Settings(),
    *,
    evaluation: RolloutBatch | None = None,
    preparation: Preparation | None = None,
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
        progress: told of long work.

    Raises:
        InputError: the optimizer's state, the rollouts or the preparation do not do.
    """
    if torch.is_inference_mode_enabled():
        raise InputError(
            "torch.inference_mode() is active, where no gradient can be taken; call the probe outside of it"
        )
    model = unwrap(model)
    if settings.learning_rate is not None:
        adam = adam.with_learning_rate(settings.learning_rate)
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    test = validate_preconditioner(adam, shapes, seed=settings.seed)
    for rows in (batch, evaluation):
        if rows is not None:
            check_fits(rows, *input_limits(model))
    settings = replace(settings, dtype=next(model.parameters()).dtype)
    subject = _Subject(model, adam, batch, evaluation, describe_model(model, adam, test), (), None, None)
    return _probe(subject, settings, Clock(), progress or Silent(), preparation)


@dataclass(frozen=True)
class _Subject:
    """What is probed, and what the report says of where it came from."""

    model: nn.Module
    adam: AdamState
    batch: RolloutBatch
    evaluation: RolloutBatch | None
    facts: CheckpointSection
    rivals: tuple[str, ...]
    rollouts: str | None
    evaluation_rollouts: str | None


def _probe(
    subject: _Subject, settings: Settings, clock: Clock, progress: Progress, preparation: Preparation | None
) -> ProbeResult:
    with marked(subject.model) if settings.gradient_checkpointing else nullcontext():
        return _probe_as_marked(subject, settings, clock, progress, preparation)


def _probe_as_marked(
    subject: _Subject, settings: Settings, clock: Clock, progress: Progress, preparation: Preparation | None
) -> ProbeResult:
    model, adam, batch, evaluation = subject.model, subject.adam, subject.batch, subject.evaluation
    if evaluation is not None:
        check_evaluation(evaluation, batch, settings)
    if settings.split is not None:
        check_split(len(batch.groups), settings.split)
    policy = Policy(model, batch.temperature, autocast=settings.autocast)
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

    memory = settings.memory_bytes if settings.memory_bytes is not None else free_memory(policy.device)
    vector_dtype = settings.vector_dtype or torch.promote_types(policy.dtype, torch.float32)
    plan = make_plan(
        settings.mode,
        settings.blocks,
        prompts=len(batch.groups),
        parameters=sum(parameter.numel() for parameter in trainable.values()),
        bytes_per_value=vector_dtype.itemsize,
        memory_bytes=memory,
    )
    with clock.stage("prepare"):
        # Planned for both batches: the evaluation's rows may be the longer ones.
        rows = batch if evaluation is None else RolloutBatch((*batch.groups, *evaluation.groups), batch.temperature)
        preparation = prepare(
            policy, rows, memory_bytes=memory, microbatch_size=settings.microbatch_size, earlier=preparation
        )
        policy = preparation.applied(policy)

    def directions(ascent: Mapping[str, Tensor]) -> StepDirections:
        factor = clip_factor(gradient_norm(ascent), settings.max_grad_norm)
        return StepDirections(trainable, adam, ascent, factor)

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
            rules=preparation.rules,
            look=directions,
            progress=progress,
        )
    scores = gradients.scores
    statistics = cross_statistics(gradients.total)
    two_batches = None
    if evaluation is not None:
        check_cross_memory(len(evaluation.groups) + len(batch.groups), trainable, vector_dtype, memory)
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
            folds, of_evaluation = None, list[Evidence]()
            if settings.split is not None:
                folds = folds_of(len(batch.groups), settings.split)
                realized += realizer.by_folds(batch, folds, gradients.ascent, y_coefficients)
            if evaluation is not None:
                evaluated = realizer.measured(evaluation)
                realized += realizer.realized(evaluation, evaluated, steps, HELD_OUT)
                of_evaluation = [
                    *diagnostics.on_policy_warnings(evaluation, evaluated.scores),
                    *diagnostics.pairing_warnings(evaluation, subject.facts.trainer_step, settings.length_weight),
                    *diagnostics.end_token_warnings(evaluation, end_token_ids(model)),
                ]

    # Only now: an absurd learning rate, which would overflow here, has been refused by its step.
    step_statistics = cross_statistics(gradients.step_weighted)
    norm = gradient_norm(gradients.ascent)
    weights = gradient_weights(adam, clip_factor(norm, settings.max_grad_norm))
    gradient_statistics = None if weights is None else cross_statistics(gradients.weighted(weights))
    assert gradients.looked is not None
    step = predict_parts(gradients.looked.along, gradients.looked.own, plan.units.sizes, gradient_statistics)
    with clock.stage("what-if"):
        positive = None
        if not bool((y_coefficients < 0).any()):
            positive = step_statistics
        elif plan.storage is Storage.STORED:
            positive = without_negatives(
                policy, batch, plan, target, y_coefficients, p, rates, vector_dtype, preparation.rules, progress
            )
    what_ifs = asked_what_ifs(settings, step, step_statistics, positive, adam, norm)
    fall = None if settings.what_if_fall is None else learning_rate_for_fall(step, settings.what_if_fall)

    warnings = [
        *diagnostics.learning_rate_warnings(adam, settings.learning_rate is not None),
        *diagnostics.interval_warnings(statistics, step_statistics.ci95_of_minus),
        *diagnostics.advantage_warnings(advantages, batch.group_sizes),
        *diagnostics.on_policy_warnings(batch, scores),
        *diagnostics.pairing_warnings(batch, subject.facts.trainer_step, settings.length_weight),
        *diagnostics.end_token_warnings(batch, end_token_ids(model)),
        *diagnostics.parameter_warnings(gradients.untouched, gradients.ascent, adam, subject.rivals),
        *diagnostics.coverage_warnings(gradients.coverage),
        *diagnostics.realized_warnings(realized),
        *(replace(warning, seen=f"evaluation rollouts: {warning.seen}") for warning in of_evaluation),
        *diagnostics.weighting_warnings(settings.weighting, batch.group_sizes),
        *diagnostics.clipping_warnings(batch, norm, settings.max_grad_norm),
    ]
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
        two_batches=two_batches,
        evaluation=evaluation,
        folds=folds,
        step=step,
        gradient_statistics=gradient_statistics,
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
            split=settings.split,
            rollouts=subject.rollouts,
            advantage=rule,
            length_weight=settings.length_weight,
            max_completion_length=settings.max_completion_length,
            learning_rate=settings.learning_rate,
            temperature=batch.temperature,
            dtype=_name(settings.dtype),
            autocast=None if settings.autocast is None else _name(settings.autocast),
            microbatch_size=settings.microbatch_size,
            vector_dtype=_name(vector_dtype),
            gradient_checkpointing=settings.gradient_checkpointing,
            memory_bytes=settings.memory_bytes,
            device=str(policy.device),
            seed=settings.seed,
            max_grad_norm=settings.max_grad_norm,
        ),
        checkpoint=subject.facts,
        preparation=preparation,
        coverage=gradients.coverage,
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
        return Estimate(-found.u_cross, found.se)

    found = [no_momentum(step), without_negative_advantages(None if positive is None else estimate(positive))]
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


def read_evaluation(path: Path, temperature: float | None) -> RolloutBatch:
    """An evaluation file; what is wrong with it is said with its name.

    Raises:
        InputError: see :func:`entropy_probe.rollouts.read_batch`.
    """
    try:
        return read_batch(path, temperature, least_responses=1)
    except InputError as error:
        raise InputError(f"evaluation rollouts {path}: {error}") from error


def check_evaluation(evaluation: RolloutBatch, batch: RolloutBatch, settings: Settings) -> None:
    """Refuse an evaluation batch that the estimator cannot use.

    Raises:
        InputError: one response to a prompt under the score estimator, or another temperature.
    """
    if settings.split is not None:
        raise InputError("--split holds out prompts of one file; with --evaluation-rollouts there is nothing to split")
    if min(evaluation.group_sizes) < 2 and settings.estimator is Estimator.SCORE:
        raise InputError(
            "an evaluation prompt has one response, which the score estimator's leave-one-out mean cannot use; give two, or "
            "--estimator rao-blackwell"
        )
    if min(evaluation.group_sizes) < 2 and settings.weighting is Weighting.PER_PROMPT:
        raise InputError(
            "an evaluation prompt has one response, which importance weights normalised prompt by prompt would leave at weight "
            "one whatever the step; give two, or --importance-weights global"
        )
    known = {(row.prompt_ids, row.response_ids) for row in batch.responses}
    again = sum((row.prompt_ids, row.response_ids) in known for row in evaluation.responses)
    if again == len(evaluation.responses):
        raise InputError(
            "every evaluation response is also among the update's: the two batches must be drawn independently, or the "
            "diagonal that U_cross leaves out comes back; sample anew, or use --split on one file"
        )
    if evaluation.temperature != batch.temperature:
        raise InputError(
            f"the evaluation rollouts were sampled at temperature {evaluation.temperature:g}, the update's at "
            f"{batch.temperature:g}; expected one policy"
        )


def check_cross_memory(
    prompts: int, trainable: Mapping[str, nn.Parameter], dtype: torch.dtype, memory_bytes: float
) -> None:
    """Refuse two batches whose vectors, one a prompt, take more than their share of the memory.

    Raises:
        InputError: they do; both figures are named.
    """
    needed = prompts * sum(parameter.numel() for parameter in trainable.values()) * dtype.itemsize
    if needed > VECTOR_SHARE * memory_bytes:
        raise InputError(
            f"vectors of {prompts} prompts of both batches take {needed / 1e9:.3g} GB, more than half of the "
            f"{memory_bytes / 1e9:.3g} GB that may be used; give fewer prompts, more --memory, or --vectors bfloat16"
        )


def check_split(prompts: int, split: int) -> None:
    """Refuse a number of folds that leaves a fold with fewer than two prompts.

    Raises:
        InputError: it does.
    """
    if prompts < 4:
        raise InputError(f"--split of {prompts} prompts; expected at least 4: a fold needs two prompts for its error")
    if not 2 <= split <= prompts // 2:
        raise InputError(
            f"--split {split} of {prompts} prompts; expected 2 to {prompts // 2}: a fold needs two prompts for its error"
        )


def resolve_advantages(batch: RolloutBatch, rule: AdvantageRule | None) -> tuple[Tensor, AdvantageRule]:
    """A_ng, float64 [N], and the rule that gave them: the rollouts' own where there are any, else dr_grpo.

    Raises:
        InputError: ``given`` was asked for and the rows have none.
    """
    given = [response.advantage for response in batch.responses if response.advantage is not None]
    if rule is None:
        rule = AdvantageRule.GIVEN if given else AdvantageRule.DR_GRPO
    if rule is not AdvantageRule.GIVEN:
        rewards = torch.tensor([response.reward for response in batch.responses], dtype=torch.float64)
        return advantages_from_rewards(rewards, batch.group_sizes, rule), rule
    if not given:
        raise InputError("the rollouts hold no advantage column; give one, or --advantage dr_grpo, grpo or rloo")
    return torch.tensor(given, dtype=torch.float64), rule


def resolve_length_weights(batch: RolloutBatch, settings: Settings) -> Tensor:
    """w_ng of the training loss, with the window's constants from the rollouts where the settings give none."""
    first = batch.responses[0]
    micro_batches = [r.micro_batch for r in batch.responses if r.micro_batch is not None]
    return length_weights(
        [len(response.response_ids) for response in batch.responses],
        batch.group_sizes,
        settings.length_weight,
        max_completion_length=settings.max_completion_length or first.max_completion_length,
        window_tokens=first.window_tokens,
        micro_batches=micro_batches or None,
    )


def free_memory(device: torch.device) -> float:
    """Bytes that are free where the vectors will live."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)


@dataclass(frozen=True)
class Clock:
    """Seconds by stage."""

    started: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        yield
        self.stages[name] = time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Every stage so far, and the total since the clock was made."""
        return {**self.stages, "total": time.perf_counter() - self.started}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
