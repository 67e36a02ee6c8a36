"""What a replay found, as the records of its JSON."""

from __future__ import annotations

import torch

from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.model.measured import Measured
from entropy_probe.optimizers.clipping import gradient_norm
from entropy_probe.pipeline.recorded import recorded_count
from entropy_probe.replay_check.case import Replayed
from entropy_probe.replay_check.suspicions import Findings
from entropy_probe.replay_check.update_comparison import micro_batch_entropy
from entropy_probe.report.sections.replay import (
    GradientSection,
    LoggedSection,
    ParameterRow,
    UpdateSection,
    within_rounding,
)


def headline(case: Replayed, findings: Findings) -> str:
    """One sentence a person understands first: is it the trainer's step, and if not, what is likely wrong."""
    update = case.update
    which = f"step {case.number}" if case.number is not None else "the step"
    coarse = f"the weights are stored too coarsely to tell (rounding is {100 * update.rounding_expected:.2g} % of the update)"
    if case.untold:
        return f"Nothing tells whether the probe computes your trainer's step: {coarse}, and no moments are one step later."
    if case.matched and case.coarse and case.gradients is not None:
        return (
            f"The probe computes your trainer's gradient, within {case.gradients.relative_error:.1e} of the one in Adam's "
            f"moments; {coarse}."
        )
    if case.matched:
        within = (
            "within rounding"
            if within_rounding(update.error_net, update.rounding_expected)
            else f"within {update.error_net:.1e}, net of rounding"
        )
        return f"The probe computes your trainer's step: {which} replayed is the real update {within}."
    said = f"Replayed, {which} is {100 * update.error_net:.3g} % off the real update"
    if update.error_net <= case.tolerance and case.gradients is not None:
        said = f"Replayed, {which} has a gradient {100 * case.gradients.relative_error:.3g} % off the trainer's"
        said += f", though {coarse}" if case.coarse else ""
    if findings.suspicions:
        return f"{said}: {findings.suspicions[0].seen}."
    return f"{said}, and none of the {findings.tried} causes that were tried explains it."


def update_section(case: Replayed) -> UpdateSection:
    """The computed update against the real one."""
    update = case.update
    reasons = {} if update.cosine is not None else {"cosine": "the computed update is zero (a learning rate of 0?)"}
    return UpdateSection(
        relative_error=update.relative_error,
        error_net=update.error_net,
        rounding_floor=update.rounding_floor,
        rounding_expected=update.rounding_expected,
        tolerance=case.tolerance,
        cosine=update.cosine,
        norm_ratio=update.norm_ratio,
        update_norm=update.update_norm,
        part_norms={
            name: gradient_norm(part) / update.update_norm
            for name, part in (
                ("momentum", case.step.momentum),
                ("gradient", case.step.gradient),
                ("weight_decay", case.step.weight_decay),
            )
        },
        parameters=[ParameterRow(p.name, p.relative_error, p.share) for p in update.parameters],
        null_reasons=reasons,
    )


def gradient_section(case: Replayed) -> GradientSection:
    """The loss gradient against the one that the moments tell."""
    step = case.step
    found = case.gradients
    why = "the checkpoint after the step has no optimizer.pt with moments one step later"
    if case.recovered is not None:
        why = "one of the two gradients is zero"
    reasons = {} if found is not None else dict.fromkeys(("relative_error", "cosine", "norm_ratio", "scale"), why)
    if case.max_grad_norm is None:
        reasons["max_grad_norm"] = "no clipping"
    return GradientSection(
        norm=step.gradient_norm,
        max_grad_norm=case.max_grad_norm,
        max_grad_norm_from=case.trainer.max_grad_norm_source.value,
        clip_factor=step.clip_factor,
        relative_error=None if found is None else found.relative_error,
        cosine=None if found is None else found.cosine,
        norm_ratio=None if found is None else found.norm_ratio,
        scale=None if found is None else found.scale * step.clip_factor,
        tolerance=case.gradient_tolerance,
        null_reasons=reasons,
    )


def logged_section(case: Replayed, measured: Measured) -> LoggedSection:
    """Entropy, gradient norm and learning rate beside the trainer's log."""
    reasons = {}

    def logged(name: str, *, averaged: bool) -> float | None:
        if case.number is None:
            reasons[f"{name}_logged"] = "the checkpoint has no trainer_state.json"
            return None
        value = case.log.logged(name, case.number)
        first = case.log.averaged_from(case.number)
        if value is None:
            reasons[f"{name}_logged"] = f"the trainer logged none for step {case.number} (TRL: logging_steps=1)"
        elif averaged and first < case.number:
            reasons[f"{name}_logged"] = (
                f"the trainer logged a mean over steps {first} to {case.number} (TRL: logging_steps=1)"
            )
            return None
        return value

    rates = case.adam.learning_rates
    assert measured.entropies is not None
    return LoggedSection(
        entropy=micro_batch_entropy(
            measured.entropies,
            case.batch.lengths,
            forwards(case.batch),
            torch.tensor(case.batch.of_tokens("loss_mask", 1.0)),
        ),
        entropy_logged=logged("entropy", averaged=True),
        grad_norm=case.step.gradient_norm,
        grad_norm_logged=logged("grad_norm", averaged=False),
        learning_rate=rates[0] if len(rates) == 1 else list(rates),
        learning_rate_logged=logged("learning_rate", averaged=False),
        null_reasons=reasons,
    )


def forwards(batch: RolloutBatch) -> list[int]:
    """The micro-batch of each row, those that several processes ran at one time counted as one: TRL logs their sum."""
    numbers = [row.micro_batch or 0 for row in batch.responses]
    processes = recorded_count(batch, "num_processes") or 1
    each = max(1, round((max(numbers) + 1) / processes))
    return [number % each for number in numbers]
