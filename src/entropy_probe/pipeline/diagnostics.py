"""Warnings: each says what was seen, with its figures, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from entropy_probe.common.evidence import Evidence
from entropy_probe.data.groups import by_group
from entropy_probe.data.rollouts import RolloutBatch, SpecialIds, doubtful_rows
from entropy_probe.errors import some_of
from entropy_probe.gradients import Coverage
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.optimizers.preconditioner import Preconditioners, ZeroV
from entropy_probe.optimizers.state import AdamState
from entropy_probe.optimizers.step_parts import PARTS, StepPrediction
from entropy_probe.optimizers.stored_precision import Rounding
from entropy_probe.pipeline.recorded import LENGTH_WEIGHT_OF_LOSS, Source, TrainersStep
from entropy_probe.ranks.sharding import WHOLE, Sharding
from entropy_probe.realized.changes import RealizedChange
from entropy_probe.realized.sweep import SweepCurve
from entropy_probe.report import ZeroVSection
from entropy_probe.statistics.importance_sampling import Weighting
from entropy_probe.statistics.two_batches import TwoBatchStatistics
from entropy_probe.statistics.u_statistics import CrossStatistics

FEW_UNITS = 10
OFF_POLICY_PER_TOKEN, OFF_POLICY_PER_RESPONSE = 0.02, 0.1
"""Mean |Σ log-prob difference| a token, or a response, in nats, above which rollouts do not count as this policy's. The second
is for long responses, whose differences of either sign cancel in the mean a token but not in the ratio exp(S − sampler)."""
MILD_ESS_FRACTION = 0.95
RESIDUAL_LIMIT = 1e-6
UNBIASED_RESPONSES = 16


def interval_warnings(statistics: CrossStatistics, delta_h1_ci95: tuple[float, float] | None) -> list[Evidence]:
    """Too few units, an interval that is known to fall short or that includes zero, or a failed self-test."""
    found = []
    units = len(statistics.row_means)
    if units < FEW_UNITS:
        found.append(
            Evidence(
                "few_units",
                f"{units} units; an interval from fewer than {FEW_UNITS} rests on its t quantile more than on data",
                "Give more prompts, or more blocks",
            )
        )
    elif statistics.shortfall is not None:
        found.append(
            Evidence(
                "interval_falls_short",
                statistics.shortfall,
                "Take the interval as a lower bound of the doubt, or give more prompts",
            )
        )
    if (
        delta_h1_ci95 is not None
        and delta_h1_ci95[0] < delta_h1_ci95[1]
        and delta_h1_ci95[0] <= 0.0 <= delta_h1_ci95[1]
    ):
        found.append(
            Evidence(
                "interval_includes_zero",
                f"the 95 % interval of δH₁, [{delta_h1_ci95[0]:.3g}, {delta_h1_ci95[1]:.3g}] nats, includes zero",
                "Give more prompts: the error falls as 1/√U at best, as 1/U while the degenerate part dominates",
            )
        )
    if statistics.self_test_residual > RESIDUAL_LIMIT:
        found.append(
            Evidence(
                "self_test",
                f"two roads to ΣX̃·ΣỸ differ by {statistics.self_test_residual:.1e} of its terms",
                "Set dtype to float64; if it stays, report it",
            )
        )
    return found


def two_batch_warnings(found: TwoBatchStatistics | None) -> list[Evidence]:
    """An interval of two batches that is known to fall short."""
    if found is None or found.shortfall is None:
        return []
    return [Evidence("two_batch_interval_falls_short", found.shortfall, "Give more prompts to the smaller batch")]


LEARNING_RATE_SOURCES = {
    Source.GIVEN: "as given",
    Source.RECORDED: "as the rows recorded it",
    Source.UNKNOWN: "as stored in the optimizer's state (the end of a schedule leaves 0.0 there)",
}


FRESH_SHARE = 0.9
"""Share of v after the step that is this gradient's own square, above which errors of the step's parts are short."""


def own_step_warnings(step: StepPrediction) -> list[Evidence]:
    """An interval of the optimizer's own step that is known to fall short: its v is mostly this very gradient's square."""
    gradient = step.parts["gradient"]
    before, after = abs(float(step.values_v_at_t[PARTS.index("gradient")])), abs(gradient.value)
    # The gradient's part is proportional to 1/√v, and v after the step holds v before it: their ratio tells how much is fresh.
    if gradient.se is None or before * math.sqrt(1.0 - FRESH_SHARE) <= after + gradient.se:
        return []
    return [
        Evidence(
            "own_step_interval_falls_short",
            f"this batch's gradient moves entropy by {after:.2g} nats with v after it and by {before:.2g} with v before it, so "
            f"more than {100 * FRESH_SHARE:.0f} % of v is this very gradient's square; simulated there, the interval of the "
            "optimizer's own step held the truth in 73 to 88 % of batches instead of 95 %",
            "Take its error as a lower bound; a few more training steps fill v",
        )
    ]


def learning_rate_warnings(state: AdamState, trainer: TrainersStep, stored: Sequence[float]) -> list[Evidence]:
    """A recorded rate that is not the stored one; a rate of zero, whose parameters do not move whatever entropy would do.

    Args:
        state: the optimizer's, with the learning rates of this step.
        trainer: says where they come from.
        stored: the distinct ones that it held before.
    """
    found = []
    if trainer.learning_rate_source is Source.RECORDED and list(state.learning_rates) != list(stored):
        used, held = (", ".join(f"{rate:.6g}" for rate in rates) for rates in (state.learning_rates, stored))
        found.append(
            Evidence(
                "learning_rate_recorded",
                f"the rows recorded a learning rate of {used} for this step, the optimizer's state holds {held}; the "
                "recorded one is taken",
                "Look for rows of another step, or a scheduler that was resumed otherwise; set the learning rate to ask about "
                "another",
            )
        )
    groups = [group for group in state.groups if group.names]
    zero = sum(group.learning_rate == 0.0 for group in groups)
    if not zero:
        return found
    which = "so this step changes nothing" if zero == len(groups) else f"in {zero} of {len(groups)} parameter groups"
    found.append(
        Evidence(
            "learning_rate_zero",
            f"the learning rate is 0.0, {LEARNING_RATE_SOURCES[trainer.learning_rate_source]}, {which}",
            "Set the learning rate to the one that you want to know about",
        )
    )
    return found


def loss_warnings(trainer: TrainersStep) -> list[Evidence]:
    """A length weight that nothing says is the trainer's."""
    if trainer.length_weight_source is not Source.UNKNOWN:
        return []
    return [
        Evidence(
            "length_weight_assumed",
            f"the rows name no loss_type and no length weight is set, so {trainer.length_weight} is taken; another loss makes "
            "another update, and every predicted change follows the update",
            f"Set the length weight to your trainer's loss ({', '.join(LengthWeight)}; dapo is TRL's default), or give the "
            "rows a loss_type",
        )
    ]


def advantage_warnings(advantages: Tensor, group_sizes: Sequence[int]) -> list[Evidence]:
    """Most prompts without any advantage: they say nothing about the update."""
    zero = sum(bool((part == 0).all()) for part in by_group(advantages, group_sizes))
    if 2 * zero <= len(group_sizes):
        return []
    return [
        Evidence(
            "zero_advantage_groups",
            f"{zero} of {len(group_sizes)} prompts have zero advantage in every response and give no update",
            "Give prompts of middling difficulty; error bars rest on the others",
        )
    ]


def clipping_warnings(batch: RolloutBatch, norm: float, max_grad_norm: float | None) -> list[Evidence]:
    """The recorded trainer clips this very gradient, and the adamw step here does not clip it at that norm."""
    recorded = batch.responses[0].extra.get("max_grad_norm")
    # The Trainer takes 0 for no clipping.
    if not isinstance(recorded, int | float) or not 0 < recorded < norm or recorded == max_grad_norm:
        return []
    here = "is not clipped" if max_grad_norm is None else f"is clipped at {max_grad_norm:g}"
    return [
        Evidence(
            "gradient_clipping",
            f"the rollouts' trainer clips gradients at norm {recorded:g}; this one is {norm:.3g} and {here} in the adamw step",
            f"Leave the clip out of the settings to have the recorded one, {recorded:g}",
        )
    ]


def on_policy_warnings(batch: RolloutBatch, scores: Tensor) -> list[Evidence]:
    """The sampler's log-probs, where given, disagree with the checkpoint's; or the rows say that they are off-policy."""
    found = []
    declared = sum(r.on_policy is False for r in batch.responses)
    if declared:
        found.append(
            Evidence(
                "declared_off_policy",
                f"{declared} rows say on_policy false: the trainer's gradient carries importance ratios there",
                "Read the update as that of the same responses on-policy, or record a run that uses each generation once",
            )
        )
    pairs = [(r, float(s)) for r, s in zip(batch.responses, scores, strict=True) if r.logprobs is not None]
    gap = sum(abs(sum(r.logprobs or ()) - s) for r, s in pairs)
    tokens = sum(len(r.response_ids) for r, _ in pairs)
    if pairs and (gap > OFF_POLICY_PER_TOKEN * tokens or gap > OFF_POLICY_PER_RESPONSE * len(pairs)):
        found.append(
            Evidence(
                "off_policy",
                f"the sampler's log-probs differ from this checkpoint's by {gap / len(pairs):.3g} nats a response, "
                f"{gap / tokens:.3g} a token, over {len(pairs)} responses",
                "Pair checkpoint N with the rollouts of step N+1 and the right temperature, or sample again with "
                "`entropy-probe sample`",
            )
        )
    return found


def pairing_warnings(batch: RolloutBatch, trainer_step: int | None, length_weight: LengthWeight) -> list[Evidence]:
    """What a recorder wrote into the rows contradicts the checkpoint, or the loss that was asked for."""
    found = []
    row = batch.responses[0]
    if row.step is not None and trainer_step is not None and row.step != trainer_step + 1:
        found.append(
            Evidence(
                "wrong_step",
                f"the rollouts are what step {row.step} consumed, the checkpoint is of step {trainer_step}",
                f"Probe checkpoint-{row.step - 1}, or take the rollouts of step {trainer_step + 1}",
            )
        )
    expected = LENGTH_WEIGHT_OF_LOSS.get(row.loss_type or "")
    if expected is not None and expected is not length_weight:
        found.append(
            Evidence(
                "other_loss",
                f"the rollouts come from loss_type {row.loss_type}, the length weight here is {length_weight}",
                f"Set the length weight to {expected}, or leave it out, to probe the trainer's own update",
            )
        )
    if length_weight is LengthWeight.BNPO and row.micro_batch is None:
        found.append(
            Evidence(
                "one_micro_batch",
                "the rollouts have no micro_batch column, so bnpo takes them as one micro-batch",
                "Add the column if your trainer accumulated over several",
            )
        )
    return found


def recorder_warnings(batch: RolloutBatch) -> list[Evidence]:
    """What the recorder marked the rows with: a loss that it did not know, or a sampler that was not quite the policy."""
    found = []
    row = batch.responses[0]
    check = "Check it: `entropy-probe replay` on two consecutive checkpoints rebuilds the trainer's own step"
    if row.extra.get("trl_is_unknown") is True:
        found.append(
            Evidence(
                "unknown_trl",
                f"the rows were recorded with TRL {row.extra.get('trl_version')}, newer than those whose losses the recorder "
                f"knew: loss_type {row.loss_type} may mean another loss there",
                check,
            )
        )
    if row.extra.get("trainer_class") is not None:
        found.append(
            Evidence(
                "stated_loss",
                f"the rows come from {row.extra['trainer_class']}, whose loss is its own; that its gradient is that of "
                f"loss_type {row.loss_type} was stated when it was recorded",
                check,
            )
        )
    dropout = row.extra.get("dropout")
    if isinstance(dropout, float) and dropout > 0.0:
        found.append(
            Evidence(
                "trained_with_dropout",
                f"the trainer's model ran with dropout of up to {dropout:g}; the policy here has none",
                "Train with disable_dropout=True, and dropout, layerdrop and jitter noise 0 in the config, to have rows that "
                "this very policy drew",
            )
        )
    return found


def padding_warnings(batch: RolloutBatch, special: SpecialIds) -> list[Evidence]:
    """Ids that may not have been sampled: a pad or two at an edge, ids after a tokenizer's end token.

    What nobody sampled for certain is refused before.
    """
    found = []
    doubtful, rows = doubtful_rows(batch, special), len(batch.responses)
    if doubtful.responses:
        found.append(
            Evidence(
                "pad_at_the_end",
                f"{doubtful.responses} of {rows} responses end with a pad id or two, which a policy hardly ever samples",
                "If it is padding, cut it from response_ids and logprobs: it is scored; if it was sampled, all is well",
            )
        )
    for code, verb, count in (
        ("pad_at_the_start", "begin", doubtful.starts),
        ("pad_at_the_prompts_end", "end", doubtful.ends),
    ):
        if count:
            found.append(
                Evidence(
                    code,
                    f"{count} of {rows} rows have prompts that {verb} with one pad id, the unknown token too",
                    "If it is padding, cut it from prompt_ids; if the model saw it, give prompt_attention_mask with 1 there",
                )
            )
    if doubtful.going_on:
        found.append(
            Evidence(
                "tokens_after_stop",
                f"{doubtful.going_on} of {rows} responses go on after the tokenizer's end token, which the model's config does "
                "not name as one",
                "If the sampler stopped there, cut response_ids and logprobs after it; if not, give eos_ids, the ids that end "
                "a response ([] for none)",
            )
        )
    return found


def coverage_warnings(coverage: Coverage) -> list[Evidence]:
    """Parameters whose gradients are exact but slow, for want of a rule that tells their sequences apart."""
    if not coverage.fallback:
        return []
    count, share = len(coverage.fallback), 100 * coverage.fallback_share
    return [
        Evidence(
            "slow_parameters",
            f"{count} trainable parameters, {share:.2g} % of the elements, have no rule ({some_of(coverage.fallback)}): "
            "their gradients are exact, by two backwards a unit",
            "Nothing to do about the figures; freeze them if they need not train and the probe is too slow",
        )
    ]


def elements_without_v(
    ascent: Mapping[str, Tensor], preconditioners: Preconditioners, sharding: Sharding = WHOLE
) -> dict[str, int]:
    """How many elements have v = 0 but a gradient in this batch, by parameter that has such; of shards, those of all ranks."""
    counts = [
        float((preconditioners.zeros(name).to(y.device) & (y != 0)).sum())
        if name in preconditioners.with_zeros
        else 0.0
        for name, y in ascent.items()
    ]
    every = sharding.ranks.sum_numbers(np.array(counts)) if sharding.sharded else counts
    return {name: int(count) for name, count in zip(ascent, every, strict=True) if count}


def zero_v_warnings(found: ZeroVSection, by_name: Mapping[str, int]) -> list[Evidence]:
    """Elements with v = 0 and a gradient, and what P makes of them."""
    if not found.elements:
        return []
    which = f"{found.elements:,} elements ({some_of(list(by_name))}) have v = 0 but a gradient in this batch"
    added = f"{found.delta_h1_added:+.3g} nats"
    if found.treatment == ZeroV.LEAVE_OUT:
        return [
            Evidence(
                "zero_second_moment",
                f"{which}, and are left out of P and of δH₁; with P = 1/ε they would add {added} to it, mostly noise",
                "The adamw rows hold them, since that step renews v first; to have 1/ε, set zero_v to guide",
            )
        ]
    return [
        Evidence(
            "zero_second_moment",
            f"{which}, so P is 1/ε there and they can outweigh all others: they add {added} to δH₁",
            "Trust the adamw row, whose step renews v first; a few more training steps fill v",
        )
    ]


def parameter_warnings(untouched: Sequence[str], trained: Sequence[str], rivals: Sequence[str]) -> list[Evidence]:
    """Parameters out of reach, which Adam's moments show that training reached or not, and a mapping that shapes alone could
    not settle."""
    found = []
    if trained:
        found.append(
            Evidence(
                "untouched_parameters",
                f"{len(trained)} trainable parameters are reached by no response, though Adam's moments show that training "
                f"reached them: {some_of(trained)}",
                "No token of this batch was sent to these experts, and they count as zero; a larger batch may reach them",
            )
        )
    untouched = [name for name in untouched if name not in trained]
    if untouched:
        found.append(
            Evidence(
                "untouched_parameters",
                f"{len(untouched)} trainable parameters are reached by no response: {some_of(untouched)}",
                "They count as zero; if they should train, look for a frozen or unused module",
            )
        )
    if rivals:
        found.append(
            Evidence(
                "ambiguous_mapping",
                f"optimizer.pt also fits {some_of(rivals)}, which maps some parameters of equal shape elsewhere",
                "Check with `entropy-probe inspect` that the version named there is the one that wrote it",
            )
        )
    return found


def realized_warnings(rows: Sequence[RealizedChange]) -> list[Evidence]:
    """Low ESS, a heavy tail of weights, or a change below the numerical floor."""
    found = []
    said: set[tuple[str, str]] = set()
    for row in rows:
        weights = row.change.weights
        # All measures of a step on a batch have the same weights.
        first, which = (row.title, row.batch) not in said, f"{row.title} step ({row.batch} batch)"
        said.add((row.title, row.batch))
        if first and weights.is_low:
            found.append(
                Evidence(
                    "low_ess",
                    f"the {which} leaves an effective sample of {weights.ess:.1f} of {len(weights.weights)} responses "
                    f"({100 * weights.ess_fraction:.0f} %)",
                    "Its ΔH rests on a few responses; look at delta_h_psis, or set resample to draw fresh ones after the step",
                )
            )
        smoothed = row.change.delta_h_smoothed
        # k̂ has no scale: weights that are all but equal can have any. It matters where they differ, or smoothing does.
        matters = weights.ess_fraction < MILD_ESS_FRACTION or (
            smoothed is not None and abs(smoothed - row.change.delta_h) > row.change.se
        )
        if first and weights.pareto_k is not None and weights.pareto_k > weights.pareto_k_limit and matters:
            found.append(
                Evidence(
                    "heavy_weights",
                    f"the {which} has importance weights with Pareto k̂ = {weights.pareto_k:.2f}, above "
                    f"{weights.pareto_k_limit:.2f}, the limit for {len(weights.weights)} responses",
                    "Their mean converges slowly; compare delta_h_psis, and give more responses",
                )
            )
        if row.predicted != 0.0 and abs(row.change.delta_h) <= row.noise_floor:
            found.append(
                Evidence(
                    "below_noise_floor",
                    f"the {which} changes entropy by {row.change.delta_h:.1e} ({row.measure.target.estimator}), within the "
                    f"numerical floor of {row.noise_floor:.1e}",
                    "Set dtype to float64",
                )
            )
    return found


def rounding_warnings(rows: Sequence[RealizedChange], how: Rounding) -> list[Evidence]:
    """Weights that the optimizer holds in a narrow type, where most of a small step is lost; or a rounding of none."""
    pairs = [(plain, row, row.kept) for plain, row in pairwise(rows) if plain.kept is None and row.kept is not None]
    if not pairs and how is Rounding.STOCHASTIC:
        return [
            Evidence(
                "no_weights_rounded",
                "stochastic rounding of the weights was asked for, and the optimizer holds none in bfloat16 or float16: its "
                "moments, or the weights, are wider",
                "Leave weight rounding out",
            )
        ]
    if not pairs or not pairs[0][2].moved_in_float32:
        return []
    plain, row, kept = pairs[0]
    unit = row.measure.target.unit.replace("-", " ")
    seen = (
        f"Adam's moments are stored in {kept.types} and the weights hold no more, so no float32 copy is kept: {kept.said}. "
        f"Rounded {kept.how.adverb}, as it is stored, the adamw step changes entropy by {row.change.delta_h:+.3g} nats {unit}, "
        f"unrounded by {plain.change.delta_h:+.3g}; δH₁ and the optimizer's own step to first order are of the unrounded one"
    )
    advice = "Read the rounded rows for what this run does. To move every weight, load the model in float32 (autocast may stay)"
    if kept.how is Rounding.STOCHASTIC:
        advice += "; the rounding is one draw, and another seed gives another"
    else:
        advice += "; if your optimizer rounds stochastically, set weight rounding to stochastic"
    return [Evidence("weights_stored_narrow", seen, advice)]


def sweep_warnings(curves: Sequence[SweepCurve]) -> list[Evidence]:
    """A step beyond its own linear range: δH₁ and the linear terms do not describe it."""
    return [
        Evidence(
            "beyond_linear",
            f"the {curve.row.step} step ({curve.row.batch} batch, {curve.row.measure.target.estimator}) is linear up to "
            f"{curve.linear.until:.2g} of its learning rate only",
            "Read the realised change instead of the prediction, or take a smaller learning rate",
        )
        for curve in curves
        if curve.linear.until is not None and curve.linear.until < 1.0 and not curve.linear.is_bound
    ]


def weighting_warnings(weighting: Weighting, group_sizes: Sequence[int]) -> list[Evidence]:
    """Importance weights normalised prompt by prompt are biased by a share of about 1/G."""
    least = min(group_sizes)
    if weighting is Weighting.GLOBAL or least >= UNBIASED_RESPONSES:
        return []
    return [
        Evidence(
            "per_prompt_weights",
            f"importance weights are normalised prompt by prompt, and a prompt has {least} responses: that shrinks ΔH by "
            f"a share of about 1/{least}",
            "Normalise importance weights over all responses (global), or give more responses a prompt",
        )
    ]
