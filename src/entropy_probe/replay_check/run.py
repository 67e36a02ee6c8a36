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

from entropy_probe.adam_step import adamw_step
from entropy_probe.assemble import versions
from entropy_probe.checkpoints import freeze_matching, freeze_names, load_checkpoint, load_model, read_trainer_state
from entropy_probe.errors import InputError
from entropy_probe.gradients import loss_gradient, prepare
from entropy_probe.inputs import free_memory, resolve_advantages, resolve_length_weights
from entropy_probe.policy import Policy, check_finite, check_fits
from entropy_probe.progress import Clock, Progress, Silent
from entropy_probe.replay_check import pairs, sections
from entropy_probe.replay_check.case import Replayed, against
from entropy_probe.replay_check.settings import (
    ReplaySettings,
    check_recorded,
    recorded_count,
    resolve_autocast,
    resolve_length_weight,
    resolve_max_grad_norm,
    trained_mixed,
)
from entropy_probe.replay_check.suspicions import Findings, find_suspicions
from entropy_probe.report.replay_schema import ReplayConfig, ReplayReport
from entropy_probe.rollouts import read_batch
from entropy_probe.settings import Settings
from entropy_probe.update_comparison import compare_gradients, recovered_gradient

DEFAULTS = ReplaySettings()


def replay(
    before: Path,
    after: Path,
    rollouts: Path,
    settings: ReplaySettings = DEFAULTS,
    *,
    base: Path | None = None,
    freeze: Sequence[str] = (),
    temperature: float | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> ReplayReport:
    """Compute the step from checkpoint ``before`` with the rollouts that it consumed, and compare it with ``after``.

    ``freeze`` are regular expressions: parameters in whose names one of them is found were not trained.

    Raises:
        InputError: the two are not one step apart or not of one model, the rows are another step's, or a file will not do.
    """
    clock, progress = Clock(), progress or Silent()
    with clock.stage("load"):
        states = read_trainer_state(before), read_trainer_state(after)
        pairs.check_consecutive(before, after, *states)
        batch = read_batch(rollouts, temperature, least_responses=1)
        pairs.check_step(batch, rollouts, states[1].global_step)
        check_recorded(batch)
        length_weight = resolve_length_weight(batch, settings)
        advantages, rule = resolve_advantages(batch, settings.advantage)
        weights = resolve_length_weights(
            batch, Settings(length_weight=length_weight, max_completion_length=settings.max_completion_length)
        )
        clip, clip_from = resolve_max_grad_norm(batch, settings)
        autocast = resolve_autocast(batch, settings)
        loaded = load_checkpoint(
            before, base=base, dtype=settings.dtype, device=device, learning_rate=settings.learning_rate, freeze=freeze
        )
        check_fits(batch, loaded.folder.vocabulary, loaded.folder.context_length)
        target = load_model(after, base=base, dtype=settings.dtype, device=device)
        freeze_matching(target.model, freeze)
        freeze_names(target.model, loaded.mapping.frozen)
        pairs.check_same_model(loaded.folder, target)
        adam_after = pairs.adam_after(after, target, loaded.adam)
    policy = Policy(loaded.model, batch.temperature, autocast=autocast)
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
        coefficients = advantages * weights / len(batch.groups)
        ascent = loss_gradient(policy, batch.responses, coefficients, progress=progress, description="batch gradient")
        step = adamw_step(theta, loaded.adam, ascent, max_grad_norm=clip)
        update = against(theta, step, theta_after, loaded.adam)
        recovered = None if adam_after is None else recovered_gradient(loaded.adam, adam_after, theta)
        clipped = {name: -step.clip_factor * y for name, y in ascent.items()}
    case = Replayed(
        policy=policy,
        batch=batch,
        before=theta,
        after=theta_after,
        adam=loaded.adam,
        advantages=advantages,
        rule=rule,
        weights=weights,
        length_weight=length_weight,
        max_completion_length=settings.max_completion_length or batch.responses[0].max_completion_length,
        num_generations=recorded_count(batch, "num_generations"),
        ascent=ascent,
        step=step,
        max_grad_norm=clip,
        update=update,
        recovered=recovered,
        gradients=None if recovered is None else compare_gradients(clipped, recovered),
        log=states[1],
        number=states[1].global_step,
        mixed=trained_mixed(batch),
    )
    with clock.stage("suspicions"):
        findings = Findings([], 0) if case.matched or case.untold else find_suspicions(case, progress)
    logged = sections.logged_section(case, measured)
    return ReplayReport(
        headline=sections.headline(case, findings),
        matched=case.matched,
        update=sections.update_section(case),
        gradient=sections.gradient_section(case, clip_from),
        logged=logged,
        suspicions=findings.suspicions,
        tried=findings.tried,
        warnings=sections.warnings(
            case, measured, loaded, clip_from, logged, all(state.global_step is not None for state in states)
        ),
        kind=loaded.folder.kind,
        responses=len(batch.responses),
        prompts=len(batch.groups),
        parameters=sum(p.numel() for p in theta.values()),
        config=ReplayConfig(
            before=str(before),
            after=str(after),
            base=None if loaded.folder.base is None else str(loaded.folder.base),
            rollouts=str(rollouts),
            step=states[1].global_step,
            advantage=rule,
            length_weight=length_weight,
            max_completion_length=case.max_completion_length,
            learning_rate=settings.learning_rate,
            temperature=batch.temperature,
            dtype=str(settings.dtype).removeprefix("torch."),
            autocast=None if policy.autocast is None else str(policy.autocast).removeprefix("torch."),
            microbatch=policy.microbatch_size,
            device=str(policy.device),
        ),
        timing=clock.seconds(),
        versions=versions(),
    )
