"""Replay: is the step that the probe computes from checkpoint N and its rollouts the one that led to checkpoint N + 1?

The loss gradient −Ȳ of the recorded rows, clipped, stepped by AdamW from N's moments, against the weights of N + 1; entropy and
gradient norm against the trainer's log; and where they disagree, causes that are tried one by one
(:mod:`~entropy_probe.replay_check.suspicions`). ``training_args.bin`` is a pickle and is never read: what is not in
``optimizer.pt`` comes from the rows, where the recorder wrote it, or from the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from entropy_probe.checkpoints import (
    Beside,
    freeze_matching,
    freeze_names,
    load_checkpoint,
    load_model,
    patterns_of,
    tokenizer_ids,
    trainer_state_of,
)
from entropy_probe.common.choices import path_of, settings_of
from entropy_probe.common.devices import AUTO, choose_device
from entropy_probe.common.progress import Clock, Progress, Silent
from entropy_probe.data.rollouts import group_rollouts, refuse_unsampled
from entropy_probe.data.rollouts.reading import files_of, read_files
from entropy_probe.errors import InputError
from entropy_probe.gradients import prepare, refuse_cut, unexplained, watched
from entropy_probe.model.input_limits import check_fits, special_ids
from entropy_probe.model.policy import Policy, check_finite
from entropy_probe.optimizers.adam import Adam
from entropy_probe.optimizers.adamw_step import adamw_step
from entropy_probe.optimizers.preconditioner import ZeroV
from entropy_probe.pipeline.config import loss_config
from entropy_probe.pipeline.inputs import free_memory
from entropy_probe.pipeline.recorded import check_recorded, recorded_count, trainers_step
from entropy_probe.pipeline.settings import refuse_unused_constant
from entropy_probe.pipeline.torch_types import OFF, autocast_name, dtype_name
from entropy_probe.pipeline.update import UpdateRule
from entropy_probe.replay_check import pairs, sections
from entropy_probe.replay_check.case import Replayed, against, mean_ascent
from entropy_probe.replay_check.settings import ReplaySettings
from entropy_probe.replay_check.suspicions import Findings, find_suspicions
from entropy_probe.replay_check.update_comparison import compare_gradients, recovered_gradient
from entropy_probe.replay_check.warnings import replay_warnings
from entropy_probe.report.replay_schema import ReplayConfig, ReplayReport
from entropy_probe.report.rollout_warnings import padding_warnings
from entropy_probe.report.versions import versions

DEFAULTS = ReplaySettings()


def replay(
    before: str | Path,
    after: str | Path,
    rollouts: str | Path | Sequence[str | Path],
    settings: ReplaySettings | None = DEFAULTS,
    *,
    base: str | Path | Beside | None = None,
    freeze: Sequence[str] = (),
    temperature: float | None = None,
    device: str | torch.device = AUTO,
    progress: Progress | None = None,
) -> ReplayReport:
    """Compute the step from checkpoint ``before`` with the rollouts that it consumed, and compare it with ``after``.

    With Δ the computed update and R = θ of ``after`` less θ of ``before``, the two match where ‖Δ − R‖ / ‖R‖, less what storing
    the weights costs, is within 1e-4. Where they do not, causes are tried one by one and named.

    Args:
        before: folder of checkpoint N.
        after: folder of checkpoint N + 1, of the same run.
        rollouts: the batch that step N + 1 consumed, as the recorder wrote it (``step-00021.jsonl`` for checkpoint 20), or a
            trainer's dump with exact token ids; of several processes a list of their files, or a pattern of the names.
        settings: see :class:`ReplaySettings`; None takes the defaults.
        base: folder of the base model, for an adapter, or of the configuration where the checkpoint has none; more that the
            checkpoint lacks goes into a :class:`Beside`.
        freeze: regular expressions; parameters in whose names one of them is found were not trained.
        temperature: sampling temperature of rows that declare none; 1 if neither says.
        device: ``auto`` takes a GPU where there is one.
        progress: told of long work.

    Raises:
        InputError: the two are not one step apart or not of one model, the rows are another step's, or a file will not do.

    Example:
        >>> from entropy_probe import replay
        >>> from entropy_probe.data.bundled_run import demo_folder
        >>> run = demo_folder() / "full"
        >>> report = replay(run / "checkpoint-20", run / "checkpoint-21", run / "rollouts" / "step-00021.jsonl")
        >>> report.matched
        True
    """
    before, after = path_of("before", before), path_of("after", after)
    files, base = files_of("rollouts", rollouts), Beside.of(base)
    settings = settings_of(settings, DEFAULTS)
    clock, progress, device = Clock(), progress or Silent(), choose_device(device)
    with clock.stage("load"):
        states = trainer_state_of(before), trainer_state_of(after)
        pairs.check_consecutive(before, after, *states)
        read = read_files(files)
        batch = group_rollouts(read.rollouts, temperature, least_responses=1)
        pairs.check_step(batch, read.told, states[1].global_step)
        check_recorded(batch)
        trainer = trainers_step(batch, settings, assumed=None)
        refuse_unused_constant(settings.max_completion_length, trainer.length_weight)
        rule = UpdateRule.of(batch, trainer, settings.advantage)
        if not rule.needs_forward:
            rule.update(None)  # what needs no model is refused before anything is loaded
        # The step renews v first, so that a v of zeros does no harm here.
        loaded = load_checkpoint(
            before, base=base, dtype=settings.dtype, device=device, zero_v=ZeroV.GUIDE, freeze=freeze
        )
        adam = trainer.of(loaded.adam)
        check_fits(batch, loaded.folder.vocabulary, loaded.folder.context_length)
        special = special_ids(loaded.model, tokenizer_ids(loaded.folder.tokenizer_folders))
        refuse_unsampled(batch, special, "the rollouts")
        target = load_model(after, base=base, dtype=settings.dtype, device=device)
        freeze_matching(target.model, freeze)
        freeze_names(target.model, loaded.mapping.frozen)
        pairs.check_same_model(loaded.folder, target)
        adam_after = pairs.adam_after(after, target, adam)
    policy = Policy(loaded.model, batch.temperature, autocast=trainer.autocast)
    theta: dict[str, Tensor] = {name: p.detach() for name, p in policy.trainable().items()}
    theta_after = {name: p.detach() for name, p in target.model.named_parameters() if name in theta}
    if all(torch.equal(theta[name], theta_after[name]) for name in theta):
        raise InputError(
            f"{before} and {after} hold the same trainable weights: that step moved nothing (a learning rate of 0, or a step "
            "that the loss scaler skipped); replay another one"
        )

    with clock.stage("prepare"):
        preparation = prepare(
            policy,
            batch,
            memory_bytes=settings.memory_bytes or free_memory(policy.device),
            microbatch_size=settings.microbatch_size,
        )
        policy = preparation.applied(policy)
    with clock.stage("replay"):
        measured = policy.measure(batch.responses, progress)
        check_finite(measured.scores, batch.responses)
        whole = rule.update(measured).whole
        with watched(policy) as ran:
            ascent = mean_ascent(policy, batch, whole, progress, "batch gradient")
        untouched = [name for name in theta if name not in ascent]
        refuse_cut(unexplained(policy.model, untouched, ran), Adam(adam), policy.sharding)
        step = adamw_step(theta, adam, ascent, max_grad_norm=trainer.max_grad_norm)
        update = against(theta, step, theta_after, adam)
        recovered = None if adam_after is None else recovered_gradient(adam, adam_after, theta)
        clipped = {name: -step.clip_factor * y for name, y in ascent.items()}
    case = Replayed(
        policy=policy,
        batch=batch,
        before=theta,
        after=theta_after,
        adam=adam,
        rule=rule,
        measured=measured,
        whole=whole,
        trainer=trainer,
        num_generations=recorded_count(batch, "num_generations"),
        ascent=ascent,
        step=step,
        update=update,
        recovered=recovered,
        gradients=None if recovered is None else compare_gradients(clipped, recovered),
        log=states[1],
        number=states[1].global_step,
        padding=special.pad,
    )
    with clock.stage("suspicions"):
        findings = Findings([], 0) if case.matched or case.untold else find_suspicions(case, progress)
    logged = sections.logged_section(case, measured)
    return ReplayReport(
        headline=sections.headline(case, findings),
        matched=case.matched,
        update=sections.update_section(case),
        gradient=sections.gradient_section(case),
        logged=logged,
        suspicions=findings.suspicions,
        tried=findings.tried,
        warnings=[
            *replay_warnings(case, measured, loaded, logged, all(state.global_step is not None for state in states)),
            *padding_warnings(batch, special),
        ],
        kind=loaded.folder.kind,
        responses=len(batch.responses),
        prompts=len(batch.groups),
        parameters=sum(p.numel() for p in theta.values()),
        config=ReplayConfig(
            **vars(loss_config(rule)),
            before=str(before),
            after=str(after),
            base=None if loaded.folder.base is None else str(loaded.folder.base),
            rollouts=read.told,
            freeze=patterns_of(freeze),
            step=states[1].global_step,
            advantage=rule.advantage_rule,
            length_weight=trainer.length_weight,
            max_completion_length=trainer.max_completion_length,
            learning_rate=settings.learning_rate,
            temperature=batch.temperature,
            dtype=dtype_name(settings.dtype),
            autocast=autocast_name(OFF if settings.autocast == OFF else trainer.autocast),
            microbatch=policy.microbatch_size,
            device=str(policy.device),
        ),
        timing=clock.seconds(),
        versions=versions(),
    )
