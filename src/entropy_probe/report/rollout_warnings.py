"""Warnings about the rollouts and the loss that they are taken for, which concern no section of the report.

Each says what was seen, with its figures, and what to do about it. A warning that concerns a section stands in its file.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from entropy_probe.common.evidence import Evidence
from entropy_probe.common.source import Source
from entropy_probe.data.groups import by_group
from entropy_probe.data.rollouts import RolloutBatch, SpecialIds, doubtful_rows
from entropy_probe.losses.length_weights import Average, LengthWeight, LossAggregation
from entropy_probe.losses.named import LossName, average_of, named
from entropy_probe.report.sections.off_policy import OffPolicySection
from entropy_probe.targets.choices import SamplerWeights

OFF_POLICY_PER_TOKEN, OFF_POLICY_PER_RESPONSE = 0.02, 0.1
"""Mean |Σ log-prob difference| a token, or a response, in nats, above which rollouts do not count as this policy's. The second
is for long responses, whose differences of either sign cancel in the mean a token but not in the ratio exp(S − sampler)."""


def advantage_warnings(
    advantages: Tensor, group_sizes: Sequence[int], other_terms: Sequence[str] = ()
) -> list[Evidence]:
    """Most prompts without any advantage: they say nothing about the update, or nothing but what other terms make of them.

    Args:
        advantages: of the responses that the step consumes, [N]; of one with an advantage a token, the largest of those in the
            loss.
        group_sizes: their number, prompt by prompt.
        other_terms: of the loss, in words.
    """
    zero = sum(bool((part == 0).all()) for part in by_group(advantages, group_sizes))
    if 2 * zero <= len(group_sizes):
        return []
    gives = f"no update but that of {' and '.join(other_terms)}" if other_terms else "no update"
    return [
        Evidence(
            "zero_advantage_groups",
            f"{zero} of {len(group_sizes)} prompts have zero advantage in every response and give {gives}",
            "Give prompts of middling difficulty; error bars rest on the others",
        )
    ]


def on_policy_warnings(batch: RolloutBatch, scores: Tensor, taken: OffPolicySection | None = None) -> list[Evidence]:
    """The sampler's log-probs, where given, disagree with the checkpoint's; or rows that say so count as the checkpoint's own.

    Args:
        batch: the rollouts.
        scores: S of every response at θ, [N].
        taken: which weights the responses carry in the entropy's gradient; None where that is not asked about.
    """
    found = []
    declared = sum(r.on_policy is False for r in batch.responses)
    weighed = taken is not None and taken.ess is not None
    if declared and taken is not None and taken.weights == SamplerWeights.OFF:
        found.append(
            Evidence(
                "declared_off_policy",
                f"{declared} rows say on_policy false, and sampler_weights is off: the entropy and its gradient count them as "
                "this checkpoint's own, which is a bias",
                "Set sampler_weights to auto, response or prefix; the rows need their sampler's logprobs",
            )
        )
    pairs = [(r, float(s)) for r, s in zip(batch.responses, scores, strict=True) if r.logprobs is not None]
    gap = sum(abs(sum(r.at_sampled(r.logprobs or ())) - s) for r, s in pairs)
    tokens = sum(r.tokens for r, _ in pairs)
    if pairs and (gap > OFF_POLICY_PER_TOKEN * tokens or gap > OFF_POLICY_PER_RESPONSE * len(pairs)):
        found.append(
            Evidence(
                "off_policy",
                f"the sampler's log-probs differ from this checkpoint's by {gap / len(pairs):.3g} nats a response, "
                f"{gap / tokens:.3g} a token, over {len(pairs)} responses"
                + (
                    f"; they enter the entropy and its gradient with importance weights ({taken.weights})"
                    if weighed and taken is not None
                    else "; they count as its own"
                ),
                "Pair checkpoint N with the rollouts of step N+1 and the right temperature, or sample again with "
                "`entropy-probe sample`",
            )
        )
    return found


def loss_warnings(length_weight: Average, source: Source, *, clip_assumed: bool = False) -> list[Evidence]:
    """A length weight, or a formula of the loss, that nothing says is the trainer's."""
    found = []
    if source is Source.UNKNOWN:
        found.append(
            Evidence(
                "length_weight_assumed",
                f"the rows name no loss_type and no length weight is set, so {length_weight} is taken; another loss makes "
                "another update, and every predicted change follows the update",
                f"Set the length weight to your trainer's loss ({', '.join(LengthWeight)}; dapo is TRL's default), or give "
                "the rows a loss_type",
            )
        )
    if clip_assumed:
        found.append(
            Evidence(
                "loss_assumed",
                "the rows have old_logprobs and no known loss_type, so PPO's clipped ratio is taken; other losses make "
                "something else of a ratio",
                "Set the loss, or give the rows a loss_type",
            )
        )
    return found


def pairing_warnings(
    batch: RolloutBatch,
    trainer_step: int | None,
    length_weight: Average,
    loss: LossName | None = None,
    by_micro_batch: Sequence[str] = (),
) -> list[Evidence]:
    """What a recorder wrote into the rows contradicts the checkpoint, or the loss that was asked for.

    Args:
        batch: the rows.
        trainer_step: of the checkpoint, where it is known.
        length_weight: how the loss is averaged here.
        loss: the loss here, where it has a name.
        by_micro_batch: what of it is a mean over micro-batches, in words.
    """
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
    recorded, expected = named(row.loss_type), _recorded_average(batch)
    if loss is not None and recorded is not None and loss is not recorded:
        found.append(
            Evidence(
                "other_loss",
                f"the rollouts come from loss_type {row.loss_type}, the loss here is {loss}",
                f"Set the loss to {recorded}, or leave it out, to probe the trainer's own update",
            )
        )
    elif expected is not None and expected is not length_weight:
        said = f"loss_type {row.loss_type}" if row.extra.get("loss_agg") is None else f"loss_agg {expected}"
        found.append(
            Evidence(
                "other_loss",
                f"the rollouts come from {said}, the length weight here is {length_weight}",
                f"Set the length weight to {expected}, or leave it out, to probe the trainer's own update",
            )
        )
    if by_micro_batch and row.micro_batch is None:
        found.append(
            Evidence(
                "one_micro_batch",
                f"the rollouts have no micro_batch column, so {' and '.join(by_micro_batch)} takes them as one micro-batch",
                "Add the column if your trainer accumulated over several",
            )
        )
    return found


def _recorded_average(batch: RolloutBatch) -> Average | None:
    """How the rows say that their loss was averaged."""
    row = batch.responses[0]
    said = row.extra.get("loss_agg")
    return next((known for known in LossAggregation if known == said), None) or average_of(row.loss_type)


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
