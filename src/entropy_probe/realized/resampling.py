"""The entropy after a step from responses that the moved policy draws itself, where importance weights would carry too little.

Within the virtual step the live model generates fresh responses to the batch's prompts, from its whole distribution at the
rollouts' temperature, and scores them: Ĥ(θ⁺) is their mean of −S or Σ_t H_t. ΔH = Ĥ(θ⁺) − Ĥ(θ) is then not on common
samples: its error holds both draws, prompts being common, is larger for small steps, and does not fail for large ones. Source:
docs/method.md, section 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import GenerationMixin

from entropy_probe.common.progress import Progress
from entropy_probe.data.rollouts import RolloutBatch, count_cut, group_rollouts
from entropy_probe.errors import InputError
from entropy_probe.model.input_limits import end_token_ids, input_limits
from entropy_probe.model.measured import Measured
from entropy_probe.model.policy import Policy, check_finite
from entropy_probe.model.virtual_step import virtual_step
from entropy_probe.realized.changes import RealizedChange
from entropy_probe.realized.steps import Step
from entropy_probe.sampling.drawing import sample_rollouts
from entropy_probe.sampling.prompts import Prompt, check_prompts
from entropy_probe.sampling.settings import SamplingSettings

RESAMPLED = "resampled"

GENERATED_TOGETHER = 32
"""Responses in one call of generate by default; not by memory, since it decides which random numbers go to which response."""

SEED_OFFSET = 0x5EED
"""Keeps the fresh responses' random numbers apart from those of rollouts that were sampled with the same seed."""


@dataclass(frozen=True)
class Resampling:
    """Which prompts are answered again and how; ``limit`` says where the length limit comes from."""

    prompts: tuple[Prompt, ...]
    settings: SamplingSettings
    limit: str


def plan_resampling(
    policy: Policy,
    batch: RolloutBatch,
    max_completion_length: int | None,
    seed: int,
    batch_size: int = GENERATED_TOGETHER,
) -> Resampling:
    """Sample as the rollouts were: their temperature, as many responses a prompt as the largest group has, their length limit.

    The limit is the one given or recorded; else the length of responses that were cut (told so, or without an end token last);
    else twice the longest response, as far as the context goes. End tokens are those that the rows name as their
    sampler's; else the model's, and what ended the responses that are said not to be cut.

    Args:
        policy: its model generates.
        batch: the rollouts.
        max_completion_length: the limit where it is given.
        seed: of the sampler.
        batch_size: responses in one call of generate: fewer take less memory, and are other ones.

    Raises:
        InputError: the model cannot generate, responses hold a tool's tokens, no end token is known although lengths differ, or
            the context is too short.
    """
    if not any(isinstance(module, GenerationMixin) for module in policy.model.modules()):
        raise InputError(
            "fresh responses need a transformers model with generate; this one has none, leave resample out"
        )
    played = next((row for row in batch.responses if row.sampled is not None), None)
    if played is not None:
        raise InputError(
            f"prompt_id {played.prompt_id!r} has tokens that the policy did not draw (sampled), whose author cannot be asked "
            "again; leave resample out"
        )
    eos_ids = batch.responses[0].eos_ids  # all rows say the same
    if eos_ids is None:
        ended = {r.response_ids[-1] for r in batch.responses if r.cut is False}
        eos_ids = tuple(dict.fromkeys((*end_token_ids(policy.model), *sorted(ended))))
    lengths = batch.lengths
    if not eos_ids and len(set(lengths)) > 1:
        raise InputError(
            "nothing tells what ends a fresh response: the model's config names no end token; set eos_token_id, or give the "
            "rollouts a column cut"
        )
    vocabulary, context = input_limits(policy.model)
    limit, why = _length_limit(batch, eos_ids, max_completion_length, context)
    settings = SamplingSettings(
        responses=max(2, *batch.group_sizes),
        temperature=batch.temperature,
        max_new_tokens=limit,
        seed=(seed + SEED_OFFSET) % 2**63,
        eos_ids=eos_ids,
        batch_size=batch_size,
    )
    prompts = tuple(Prompt(group.prompt_id, group.prompt_ids, "", {}) for group in batch.groups)
    check_prompts(prompts, settings, vocabulary, context)
    return Resampling(prompts, settings, why)


def resample(
    policy: Policy,
    batch: RolloutBatch,
    before: Measured,
    steps: Sequence[Step],
    rows: Sequence[RealizedChange],
    plan: Resampling,
    progress: Progress,
) -> list[RealizedChange]:
    """A row beside each of ``rows``, from responses drawn under its step; the model and the random state are left as they were.

    The policy's ranks share drawing and scoring out, and each gets all rows: every rank must call it.

    Args:
        policy: the model at θ, weights in float32 or better.
        batch: the rollouts of θ that the rows were realised on.
        before: their scores and entropies at θ by this very policy.
        steps: Δθ.
        rows: direct estimates; their linear terms, floors and measures are taken over.
        plan: how to sample.
        progress: told of the sampling.

    Raises:
        InputError: a response drawn after the step has no finite score.
    """
    needed = any(row.measure.target.needs_token_entropies for row in rows)
    found = []
    for step in steps:
        with virtual_step(policy.model, step.deltas):
            drawn = sample_rollouts(
                policy,
                plan.prompts,
                plan.settings,
                lambda *_: 0.0,
                progress=progress,
            )
            fresh = group_rollouts(drawn)
            after = policy.measure(fresh.responses, progress, entropies=needed)
        check_finite(after.scores, fresh.responses)
        note = (
            f"{plan.settings.responses} fresh responses a prompt drawn after the step, at most {plan.settings.max_new_tokens} "
            f"tokens ({plan.limit}), {count_cut(drawn)} cut there; not on common samples, and without the diagonal that the "
            "linear term beside it holds"
        )
        found += [
            replace(
                row,
                method=RESAMPLED,
                by_decision=False,
                change=row.measure.resampled(batch, before, fresh, after),
                note=note,
            )
            for row in rows
            if row.title == step.title
        ]
    return found


def _length_limit(
    batch: RolloutBatch, eos_ids: Sequence[int], given: int | None, context: int | None
) -> tuple[int, str]:
    declared = given if given is not None else batch.responses[0].max_completion_length
    if declared is not None:
        return declared, "the trainer's limit"
    cut = [
        len(r.response_ids)
        for r in batch.responses
        if r.cut is True or (r.cut is None and r.response_ids[-1] not in eos_ids)
    ]
    if cut:
        return max(cut), "where the rollouts were cut"
    doubled = 2 * max(batch.lengths)
    if context is not None:
        doubled = min(doubled, max(1, context - max(len(group.prompt_ids) for group in batch.groups)))
    return doubled, "twice the longest rollout, none of which was cut"
