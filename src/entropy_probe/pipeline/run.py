"""The probe: what will the next step do to the entropy, how sure are we, and what did it do?

:func:`probe` reads as the method does: fresh scores, coefficients, unit gradients under Adam's geometry, the U-statistic, then
the realised step. The stages are in :mod:`~entropy_probe.pipeline.stages`. Source: docs/method.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import nn

from entropy_probe.checkpoints import (
    Beside,
    load_checkpoint,
    load_sharded_checkpoint,
    patterns_of,
    sharding_of,
    tokenizer_ids,
)
from entropy_probe.common.arrays import FloatArray
from entropy_probe.common.choices import member, path_of, settings_of
from entropy_probe.common.devices import AUTO, check_device, choose_device
from entropy_probe.common.progress import Clock, Progress, Silent
from entropy_probe.common.source import Source
from entropy_probe.compat.checkpoint_wrappers import named_parameters
from entropy_probe.compat.torch_modules import unwrap
from entropy_probe.data.rollouts import Rollout, RolloutBatch, as_batch, group_rollouts, refuse_unsampled
from entropy_probe.data.rollouts.digest import digest_of_batch
from entropy_probe.data.rollouts.reading import files_of, read_files
from entropy_probe.errors import InputError
from entropy_probe.gradients import Preparation, marked, trained_before
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.model.digest import digest_of_model
from entropy_probe.model.input_limits import check_fits, input_limits, special_ids
from entropy_probe.optimizers.adam import Adam
from entropy_probe.optimizers.base import gradient_weights
from entropy_probe.optimizers.clipping import clip_factor, gradient_norm
from entropy_probe.optimizers.state import AdamState
from entropy_probe.optimizers.step_parts import predict_parts
from entropy_probe.optimizers.what_if import learning_rate_for_fall
from entropy_probe.optimizers.without_v import elements_without_v
from entropy_probe.pipeline.assemble import Found, assemble_report
from entropy_probe.pipeline.inputs import read_evaluation
from entropy_probe.pipeline.recorded import TrainersStep, trainers_step
from entropy_probe.pipeline.settings import Settings, ShardingChoice, refuse_unused_constant
from entropy_probe.pipeline.stages import (
    Subject,
    against_evaluation,
    asked_what_ifs,
    gradients_of_units,
    make_task,
    noise_by_responses,
    realize_steps,
    without_negatives,
)
from entropy_probe.ranks.collectives import ALONE, Ranks
from entropy_probe.ranks.same_inputs import check_same_inputs, digest_of_settings
from entropy_probe.report import CheckpointSection, Report
from entropy_probe.statistics.u_statistics import cross_statistics

DEFAULTS = Settings()

Rows = RolloutBatch | Iterable[Rollout | Mapping[str, Any]]
"""Rollouts as a live probe takes them: grouped, or their rows, as records or as mappings."""


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
        report: every number with its error, sentences and warnings (docs/report.md); ``report.to_dict()`` is report.json.
        kernel: K_uw = XS_u · YS_w under P over all parameters, float64 [U, U], for U units; None where vectors were streamed.
        preparation: what was found out about the model; the next probe of the same one is faster with it.

    Example:
        >>> from entropy_probe import Settings, probe_checkpoint
        >>> from entropy_probe.data.bundled_run import demo_folder
        >>> run = demo_folder() / "full"
        >>> settings = Settings(blocks=4, noise=False)
        >>> result = probe_checkpoint(run / "checkpoint-20", run / "rollouts" / "step-00021.jsonl", settings)
        >>> result.kernel.shape, sorted(result.report.to_dict())[:4]
        ((4, 4), ['adamw', 'checkpoint', 'config', 'engine'])
    """

    report: Report
    kernel: FloatArray | None
    preparation: Preparation


def probe_checkpoint(
    checkpoint: str | Path,
    rollouts: str | Path | Sequence[str | Path],
    settings: Settings | None = DEFAULTS,
    *,
    evaluation_rollouts: str | Path | Sequence[str | Path] | None = None,
    base: str | Path | Beside | None = None,
    freeze: Sequence[str] = (),
    temperature: float | None = None,
    device: str | torch.device = AUTO,
    ranks: Ranks = ALONE,
    sharding: ShardingChoice = ShardingChoice.REPLICATED,
    progress: Progress | None = None,
) -> ProbeResult:
    """Load a checkpoint folder and a rollouts file, and probe: predict δH₁ and the optimizer's own step, then realise both.

    What the rows say of the trainer (loss, clip, mixed precision, learning rate) holds where the settings say nothing.
    Entropies and their changes are in nats per response, or per token where the settings ask for it.

    Args:
        checkpoint: folder with ``config.json``, safetensors weights or an adapter, and ``optimizer.pt``.
        rollouts: ``.jsonl`` or ``.parquet``, a row a response, sampled from this checkpoint; a trainer's dump with exact token
            ids; or several files (a list, or a pattern of their names), which are one batch.
        settings: see :class:`Settings`; None takes the defaults.
        evaluation_rollouts: other rollouts of the same checkpoint, from which X is taken against this batch's update.
        base: folder of the base model, for an adapter, or of the configuration where the checkpoint has none; more that the
            checkpoint lacks goes into a :class:`Beside`.
        freeze: regular expressions; parameters in whose names one of them is found were not trained.
        temperature: sampling temperature of rows that declare none; 1 if neither says.
        device: ``auto`` takes a GPU where there is one; of several ranks, the device that their process group has for them.
        ranks: who share the work. Every rank must call, with the same arguments, and each gets the same report.
        sharding: what each of several ranks holds.
        progress: told of long work.

    Raises:
        InputError: the folder, the rollouts or the settings will not do; one line says what was found and what to do.

    Example:
        >>> from entropy_probe import Settings, probe_checkpoint
        >>> from entropy_probe.data.bundled_run import demo_folder
        >>> run = demo_folder() / "full"
        >>> settings = Settings(blocks=16, noise=False)
        >>> report = probe_checkpoint(run / "checkpoint-20", run / "rollouts" / "step-00021.jsonl", settings).report
        >>> low, high = report.adamw.ci95
        >>> print(f"the next step changes entropy by {report.adamw.total:.2f} nats per response; it falls: {high < 0}")
        the next step changes entropy by -0.02 nats per response; it falls: True
    """
    checkpoint, files, base = path_of("checkpoint", checkpoint), files_of("rollouts", rollouts), Beside.of(base)
    if evaluation_rollouts is not None:
        evaluation_rollouts = files_of("evaluation_rollouts", evaluation_rollouts)
    settings = settings_of(settings, DEFAULTS)
    clock = Clock()
    sent_before = len(ranks.sent)
    device = choose_device(device, ranks.device if ranks.count > 1 else None)
    with clock.stage("load"):
        read = read_files(files)
        batch = group_rollouts(read.rollouts, temperature)
        evaluated = None if evaluation_rollouts is None else read_evaluation(evaluation_rollouts, temperature)
        evaluation = None if evaluated is None else evaluated[1]
        _check_same_arguments(ranks, batch, evaluation, settings, None, tuple(freeze))
        trainer = _trainers_step(batch, settings)
        match member("sharding", sharding, ShardingChoice):
            case ShardingChoice.REPLICATED:
                load = load_checkpoint
            case ShardingChoice.FSDP2:
                load = partial(load_sharded_checkpoint, ranks=ranks)
            case unknown:
                assert_never(unknown)
        loaded = load(
            checkpoint,
            base=base,
            dtype=settings.dtype,
            device=device,
            seed=settings.seed,
            zero_v=settings.zero_v,
            freeze=freeze,
        )
        for rows in (batch, evaluation):
            if rows is not None:
                check_fits(rows, loaded.folder.vocabulary, loaded.folder.context_length)
        special = special_ids(loaded.model, tokenizer_ids(loaded.folder.tokenizer_folders))
    subject = Subject(
        loaded.model,
        Adam(trainer.of(loaded.adam), settings.zero_v),
        sharding_of(loaded.model, ranks),
        batch,
        evaluation,
        CheckpointSection.of_folder(loaded),
        loaded.mapping.rivals,
        read.told,
        None if evaluated is None else evaluated[0].told,
        trainer,
        special,
        (*loaded.folder.notes, *read.notes),
        freeze=tuple(patterns_of(freeze)),
        sent_before=sent_before,
    )
    return _probe(subject, settings, clock, progress or Silent(), None)


def probe(
    model: nn.Module,
    adam: AdamState,
    batch: Rows,
    settings: Settings | None = DEFAULTS,
    *,
    evaluation: Rows | None = None,
    preparation: Preparation | None = None,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
) -> ProbeResult:
    """Probe a live model; it is left as it was, gradients, flags and random state included.

    Args:
        model: a causal language model (``model(input_ids=, attention_mask=, use_cache=).logits``), DDP-wrapped or not.
        adam: its optimizer's state (:func:`entropy_probe.optimizers.live.state_of_optimizer`).
        batch: rollouts (:func:`entropy_probe.data.rollouts.group_rollouts`), or their rows, which it groups.
        settings: see :class:`Settings`; None takes the defaults. ``dtype`` is the model's own. Where they say nothing, loss,
            clip and mixed precision are as the rows recorded them, but the learning rate is the optimizer's own, which its
            next step will take.
        evaluation: other rollouts of the same policy, from which X is taken against this batch's update; one response a prompt
            will do for Rao-Blackwell (``group_rollouts(rows, least_responses=1)``, as rows are grouped here).
        preparation: of an earlier probe of this very model (``result.preparation``); None finds it again.
        ranks: who share the work (``Ranks.of_group()``), every one of whom must call with the same batch; by default this
            process does all of it, so that one rank of a job may probe by itself. What one rank alone refuses in the rollouts,
            all refuse; a fault of one (out of memory) is for the job to end, as torchrun does.
        progress: told of long work.

    Raises:
        InputError: the optimizer's state, the rollouts or the preparation do not do, or the model is where there is no float64.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from entropy_probe import probe, state_of_optimizer
        >>> _ = torch.manual_seed(0)
        >>> sizes = dict(vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=1, pad_token_id=0))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> ids = torch.randint(2, 11, (8, 6))
        >>> model(input_ids=ids, labels=ids).loss.backward()  # training happens here
        >>> optimizer.step()
        >>> rows = [
        ...     {"prompt_id": n, "prompt_ids": [2 + n], "response_ids": [3 + n + g, 4 + g, 1], "reward": g}
        ...     for n in range(4) for g in range(2)
        ... ]
        >>> result = probe(model, state_of_optimizer(optimizer, model), rows)
        >>> len(result.report.first_order.row_means), result.kernel.shape, len(result.report.adamw.ci95)
        (4, (4, 4), 2)
    """
    if torch.is_inference_mode_enabled():
        raise InputError(
            "torch.inference_mode() is active, where no gradient can be taken; call the probe outside of it"
        )
    settings, batch, evaluation = ranks.alike(partial(_as_taken, settings, adam, batch, evaluation))
    sent_before = len(ranks.sent)
    _check_same_arguments(ranks, batch, evaluation, settings, preparation)
    model = unwrap(model)
    for parameter in model.parameters():
        check_device(parameter.device)
    settings = replace(settings, dtype=next(model.parameters()).dtype)
    trainer = _trainers_step(batch, settings)
    if trainer.learning_rate_source is Source.RECORDED:
        trainer = replace(trainer, learning_rates=(), learning_rate_source=Source.UNKNOWN)
    sharding = sharding_of(model, ranks)
    shapes = {name: p.shape for name, p in named_parameters(model) if p.requires_grad}
    test = Adam(adam, settings.zero_v).validate(shapes, seed=settings.seed, sharding=sharding)
    for rows in (batch, evaluation):
        if rows is not None:
            check_fits(rows, *input_limits(model))
    facts, special = CheckpointSection.of_model(model, adam, test), special_ids(model)
    subject = Subject(
        model,
        Adam(trainer.of(adam), settings.zero_v),
        sharding,
        batch,
        evaluation,
        facts,
        (),
        None,
        None,
        trainer,
        special,
        sent_before=sent_before,
    )
    return _probe(subject, settings, Clock(), progress or Silent(), preparation)


def _as_taken(
    settings: Settings | None, adam: AdamState, batch: Rows, evaluation: Rows | None
) -> tuple[Settings, RolloutBatch, RolloutBatch | None]:
    """The caller's settings and rollouts in the types that the probe computes with."""
    if not isinstance(adam, AdamState):
        raise InputError(
            f"adam is a {type(adam).__name__}; expected an optimizer's state: give state_of_optimizer(optimizer, model)"
        )
    settings, batch = settings_of(settings, DEFAULTS), as_batch(batch)
    if evaluation is None:
        return settings, batch, None
    try:
        return settings, batch, as_batch(evaluation, least_responses=1)
    except InputError as error:
        raise InputError(f"the evaluation rollouts: {error}") from error


def _trainers_step(batch: RolloutBatch, settings: Settings) -> TrainersStep:
    """How the trainer takes its step; the guide's length weight is assumed where neither rows nor settings name a loss."""
    found = trainers_step(batch, settings, assumed=LengthWeight.GUIDE)
    if not settings.resample:
        refuse_unused_constant(settings.max_completion_length, found.length_weight)
    return found


def _check_same_arguments(
    ranks: Ranks,
    batch: RolloutBatch,
    evaluation: RolloutBatch | None,
    settings: Settings,
    preparation: Preparation | None,
    freeze: tuple[str, ...] = (),
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
            "settings": digest_of_settings(settings, known, freeze),
        },
    )


def _check_same_state(subject: Subject) -> None:
    """Weights and moments where all ranks have all; of shards every rank has others, and loading compares what is stored."""
    if subject.sharding.ranks.count == 1:
        return
    found = {
        "optimizer settings": digest_of_settings(subject.optimizer.settings()),
        "special ids (of configs or tokenizer files)": digest_of_settings(subject.special),
    }
    if subject.sharding.replicated:
        found |= {"weights": digest_of_model(subject.model), "optimizer state": subject.optimizer.digest()}
    check_same_inputs(subject.sharding.ranks, found)


def _probe(
    subject: Subject, settings: Settings, clock: Clock, progress: Progress, earlier: Preparation | None
) -> ProbeResult:
    with marked(subject.model) if settings.gradient_checkpointing else nullcontext():
        return _probe_as_marked(subject, settings, clock, progress, earlier)


def _probe_as_marked(
    subject: Subject, settings: Settings, clock: Clock, progress: Progress, earlier: Preparation | None
) -> ProbeResult:
    _check_same_state(subject)
    refuse_unsampled(subject.batch, subject.special, "the rollouts")
    if subject.evaluation is not None:
        refuse_unsampled(subject.evaluation, subject.special, "the evaluation rollouts")
    task, preparation = make_task(subject, settings, earlier, clock, progress)
    subject = task.subject
    evaluation, optimizer, policy = subject.evaluation, subject.optimizer, task.policy
    trainer = subject.trainer

    with clock.stage("gradients"):
        gradients = gradients_of_units(task, preparation.rules)
    rules = gradients.rules or preparation.rules
    statistics = cross_statistics(gradients.total, settings.interval, task.unit_weights)
    two_batches = None
    if evaluation is not None:
        with clock.stage("evaluation"):
            two_batches = against_evaluation(task, evaluation, rules)
    with clock.stage("realized"):
        realized = realize_steps(task, gradients, rules)

    # Only now: an absurd learning rate, which would overflow here, has been refused by its step.
    step_statistics = cross_statistics(gradients.step_weighted, settings.interval, task.unit_weights)
    noise = None
    if gradients.third_directions is not None and step_statistics.parts is not None:
        with clock.stage("noise"):
            noise = noise_by_responses(task, gradients, gradients.third_directions, step_statistics, rules)
    norm = gradient_norm(gradients.ascent, policy.sharding)
    weights = gradient_weights(optimizer, gradients.ascent, clip_factor(norm, trainer.max_grad_norm))
    gradient_statistics = (
        None if weights is None else cross_statistics(gradients.weighted(weights), weights=task.unit_weights)
    )
    assert gradients.looked is not None
    looked = gradients.looked
    step = predict_parts(
        looked.along,
        looked.kernel,
        task.plan.units.sizes,
        tuple(task.update.terms),
        looked.term_kernels,
        task.unit_weights,
    )
    positive = None
    if settings.what_if_no_negatives:
        with clock.stage("what-if"):
            positive = without_negatives(task, rules)
    what_ifs = asked_what_ifs(
        settings.analyses, step, step_statistics, positive, optimizer, norm, trainer.max_grad_norm
    )
    fall = None if settings.what_if_fall is None else learning_rate_for_fall(step, settings.what_if_fall)
    found = Found(
        task=task,
        preparation=preparation,
        gradients=gradients,
        statistics=statistics,
        step_statistics=step_statistics,
        gradient_statistics=gradient_statistics,
        gradient_norm=norm,
        step=step,
        two_batches=two_batches,
        noise=noise,
        realizations=realized,
        what_ifs=what_ifs,
        fall=fall,
        trained=trained_before(gradients.untouched, optimizer, policy.sharding),
        without_v=elements_without_v(gradients.ascent, task.geometry.metric, policy.sharding),
        sent=subject.sharding.ranks.most_sent(since=subject.sent_before),
    )
    report = assemble_report(found, clock.seconds())
    return ProbeResult(report, gradients.total.kernel, replace(preparation, rules=rules))
