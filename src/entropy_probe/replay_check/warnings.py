"""What may keep a replay from being exact, whether or not it is."""

from __future__ import annotations

import math

from entropy_probe.checkpoints import Checkpoint
from entropy_probe.common.evidence import Evidence
from entropy_probe.common.source import Source
from entropy_probe.model.dropout import active_dropout
from entropy_probe.model.measured import Measured
from entropy_probe.pipeline.recorded import SAME_RATE, recorded_rates
from entropy_probe.replay_check.case import Replayed
from entropy_probe.replay_check.row_causes import SURPLUS, WHOLE_FILE, incomplete, surplus
from entropy_probe.replay_check.settings import MIXED_TOLERANCE
from entropy_probe.report.rollout_warnings import on_policy_warnings, pairing_warnings, recorder_warnings
from entropy_probe.report.sections.adamw import clipping_warnings
from entropy_probe.report.sections.first_order import learning_rate_warnings
from entropy_probe.report.sections.replay import LoggedSection

LOG_TOLERANCE = 1e-3
"""Relative difference from a logged figure that float32's order of sums may make."""


def replay_warnings(
    case: Replayed, measured: Measured, loaded: Checkpoint, logged: LoggedSection, steps_known: bool
) -> list[Evidence]:
    """What may keep a replay from being exact, whether or not it is."""
    batch = case.batch
    found = [
        *loaded.folder.notes,
        *learning_rate_warnings(case.adam.group_rates, case.trainer.learning_rate_source, loaded.adam.learning_rates),
        *clipping_warnings(batch, case.step.gradient_norm, case.max_grad_norm),
        *([] if _may_differ(case) else on_policy_warnings(batch, measured.scores)),
        *pairing_warnings(
            batch, loaded.trainer_step, case.length_weight, case.trainer.loss.name, case.trainer.loss.by_micro_batch
        ),
        *recorder_warnings(batch),
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
        found.append(Evidence("surplus_rows", f"{SURPLUS}: {more}", WHOLE_FILE))
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


def _may_differ(case: Replayed) -> bool:
    """The sampler's log-probs may be others than this checkpoint's, and the trainer's loss takes care of it."""
    corrected = case.trainer.loss.constants.correction is not None
    return corrected or (case.rule.takes_ratios and any(row.on_policy is False for row in case.batch.responses))
