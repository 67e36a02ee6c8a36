"""What a replay found, as the records of its JSON."""

from __future__ import annotations

import math

from entropy_probe.checkpoints import Checkpoint
from entropy_probe.common.evidence import Evidence
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.model.dropout import active_dropout
from entropy_probe.model.policy import Measured
from entropy_probe.optimizers.adamw_step import gradient_norm
from entropy_probe.pipeline import diagnostics
from entropy_probe.pipeline.recorded import SAME_RATE, Source, recorded_count, recorded_rates
from entropy_probe.replay_check.case import Replayed
from entropy_probe.replay_check.row_causes import WHOLE_FILE, incomplete, surplus
from entropy_probe.replay_check.settings import MIXED_TOLERANCE
from entropy_probe.replay_check.suspicions import Findings
from entropy_probe.replay_check.update_comparison import micro_batch_entropy
from entropy_probe.report.replay_schema import (
    GradientSection,
    LoggedSection,
    ParameterRow,
    UpdateSection,
    within_rounding,
)

LOG_TOLERANCE = 1e-3
"""Relative difference from a logged figure that float32's order of sums may make."""


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
            measured.entropies, [len(row.response_ids) for row in case.batch.responses], forwards(case.batch)
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


def warnings(
    case: Replayed, measured: Measured, loaded: Checkpoint, logged: LoggedSection, steps_known: bool
) -> list[Evidence]:
    """What may keep a replay from being exact, whether or not it is."""
    batch = case.batch
    found = [
        *loaded.folder.notes,
        *diagnostics.learning_rate_warnings(case.adam.group_rates, case.trainer, loaded.adam.learning_rates),
        *diagnostics.clipping_warnings(batch, case.step.gradient_norm, case.max_grad_norm),
        *diagnostics.on_policy_warnings(batch, measured.scores),
        *diagnostics.pairing_warnings(batch, loaded.trainer_step, case.length_weight),
        *diagnostics.recorder_warnings(batch),
    ]
    fact = incomplete(batch, case.num_generations)
    if fact is not None:
        found.append(
            Evidence(
                "incomplete_rollouts",
                f"the file is not the whole window: {fact}",
                WHOLE_FILE,
            )
        )
    more = surplus(batch, case.num_generations)
    if more is not None:
        found.append(Evidence("surplus_rows", f"rows are given twice, or of another step: {more}", WHOLE_FILE))
    if case.trainer.max_grad_norm_source is Source.UNKNOWN:
        found.append(
            Evidence(
                "clipping_unknown",
                f"nothing says whether the trainer clips; the gradient of norm {case.step.gradient_norm:.4g} was not clipped",
                "Set the norm that it clips at (the Trainer's default is 1.0), 0 for none",
            )
        )
    recorded, used = recorded_rates(batch), case.adam.learning_rates[0]
    overridden = case.trainer.learning_rate_source is Source.GIVEN
    if overridden and not all(math.isclose(rate, used, rel_tol=SAME_RATE) for rate in recorded):
        said = ", ".join(f"{rate:g}" for rate in recorded)
        found.append(
            Evidence(
                "other_learning_rate",
                f"the recorder saw a learning rate of {said} at this step; here it is {used:g}",
                "Leave the learning rate out of the settings to have the recorded one",
            )
        )
    if case.mixed:
        found.append(
            Evidence(
                "mixed_precision",
                f"the trainer's arithmetic was of mixed precision, which no other order of sums repeats: up to "
                f"{MIXED_TOLERANCE:g} counts as the same step, and a small fault would hide in it",
                "Take one step with bf16=False, fp16=False where the code is to be proven",
            )
        )
    if case.coarse:
        found.append(
            Evidence(
                "coarse_weights",
                f"storing the weights costs {100 * case.update.rounding_expected:.2g} % of the update, so they cannot tell "
                "whether it was computed right"
                + ("" if case.gradients is None else "; the gradient in Adam's moments is what speaks"),
                "Save float32 weights at both checkpoints where the code is to be proven",
            )
        )
    close = MIXED_TOLERANCE if case.mixed else LOG_TOLERANCE
    for name, code, mine, theirs in (
        ("entropy", "other_entropy", logged.entropy, logged.entropy_logged),
        ("gradient norm", "other_gradient_norm", logged.grad_norm, logged.grad_norm_logged),
    ):
        if theirs is not None and not math.isclose(mine, theirs, rel_tol=close):
            found.append(
                Evidence(
                    code,
                    f"the {name} recomputed is {mine:.5g}, the trainer logged {theirs:.5g}, which precision does not explain",
                    "Look at the temperature, at dropout, and at whether the weights are those that drew the rows; a "
                    "norm alone departs by the loss, too",
                )
            )
    dropout = active_dropout(loaded.model)
    if dropout:
        found.append(
            Evidence(
                "dropout",
                f"the model has dropout of up to {dropout:g}, which a trainer leaves on unless "
                "told otherwise; its masks cannot be replayed",
                "Train with disable_dropout=True, and attention_dropout, layerdrop and jitter noise 0 in the config, to have "
                "a step that can be replayed",
            )
        )
    if not steps_known:
        found.append(
            Evidence(
                "steps_unknown",
                "trainer_state.json is missing, or has no global_step, of one of the two: nothing but "
                "Adam's count tells that they are one step apart",
                "Keep trainer_state.json beside the weights",
            )
        )
    return found
