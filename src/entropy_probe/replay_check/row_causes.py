"""Causes in the file: rows that are missing, one row whose advantage was changed, log-probs of another policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from entropy_probe.common.progress import Progress
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.gradients import loss_gradient
from entropy_probe.optimizers.clipping import gradient_norm
from entropy_probe.pipeline.recorded import recorded_number
from entropy_probe.replay_check.case import Cause, Replayed
from entropy_probe.replay_check.update_comparison import fitted_factor
from entropy_probe.report.replay_schema import Suspicion
from entropy_probe.targets.base import TokenPair

ONE_ROW_COSINE = 0.99
"""Of the gap between two gradients with one row's ∇S, above which that row alone may be the cause."""

OTHER_POLICY_ERRORS = 4.0
"""Standard errors by which a mean ratio may differ from 1."""

SURPLUS = "rows are given twice, of another step, or without the loss_mask that leaves tokens out"

WHOLE_FILE = "Take the recorder's file as it is; of several processes, all their files together"


def incomplete(batch: RolloutBatch, num_generations: int | None) -> str | None:
    """What tells that rows of the trainer's window are not in the file, in words, or None.

    Of generations that serve several steps a window may hold parts of a prompt's responses, and nothing can be told.
    """
    if _is_a_part(batch):
        return None
    most = num_generations or max(batch.group_sizes)
    facts = []
    short = [group for group in batch.groups if len(group.responses) < most]
    if short:
        names = ", ".join(str(group.prompt_id) for group in short[:3]) + ("" if len(short) <= 3 else " and others")
        facts.append(f"{len(short)} of {len(batch.groups)} prompts have fewer than {most} responses ({names})")
    declared = batch.responses[0].window_tokens
    held = _tokens_in_loss(batch)
    if declared is not None and declared > held:
        facts.append(f"the rows hold {held} response tokens in the loss, the trainer's window had {declared:g}")
    sizes = _micro_batch_sizes(batch)
    if surplus(batch, num_generations) is None and len(set(sizes.values())) > 1:
        facts.append(f"micro-batches hold {min(sizes.values())} to {max(sizes.values())} rows")
    return "; ".join(facts) or None


def _is_a_part(batch: RolloutBatch) -> bool:
    """The rows are of a generation that serves other steps too, or may be."""
    share = recorded_number(batch, "window_share")
    return any(row.on_policy is False for row in batch.responses) or (share is not None and share < 1.0)


def _tokens_in_loss(batch: RolloutBatch) -> int:
    return sum(row.tokens_in_loss for row in batch.responses)


def surplus(batch: RolloutBatch, num_generations: int | None) -> str | None:
    """What tells that the file holds more rows than the trainer's window, in words, or None."""
    if _is_a_part(batch):
        return None
    facts = []
    long = [group for group in batch.groups if num_generations is not None and len(group.responses) > num_generations]
    if long:
        facts.append(f"{len(long)} of {len(batch.groups)} prompts have more than {num_generations} responses")
    declared = batch.responses[0].window_tokens
    held = _tokens_in_loss(batch)
    if declared is not None and declared < held:
        facts.append(f"the rows hold {held} response tokens in the loss, the trainer's window had {declared:g}")
    return "; ".join(facts) or None


def miscounted_rows(case: Replayed) -> Suspicion | None:
    """Rows are too many or missing by the counts. The gradients of missing ones are unknown, so that this cannot be tried."""
    more = surplus(case.batch, case.num_generations)
    if more is not None:
        return Suspicion("surplus_rows", f"{SURPLUS}: {more}", WHOLE_FILE, None)
    fact = incomplete(case.batch, case.num_generations)
    if fact is None:
        return None
    return Suspicion("missing_rows", f"rows of the trainer's window are not in the file: {fact}", WHOLE_FILE, None)


def _trainers_scale(case: Replayed) -> float | None:
    """The trainer's clip factor: recovered norm over logged norm, or 1 where it cannot have clipped; None if unknown."""
    if case.recovered is None:
        return None
    size = gradient_norm(case.recovered)
    if case.logged_norm is not None and case.logged_norm > 0.0:
        return size / case.logged_norm
    return 1.0 if case.max_grad_norm is None or size < 0.999 * case.max_grad_norm else None


def one_row(case: Replayed, progress: Progress) -> Iterator[Cause]:
    """The row along whose gradient the gap between the two lies, if there is one: a backward a row."""
    scale, advantages = _trainers_scale(case), case.rule.advantages
    rows = case.batch.responses
    if scale is None or case.recovered is None or len(advantages) != len(rows):
        return
    gap = {name: -g / scale - case.ascent[name].to(g) for name, g in case.recovered.items() if name in case.ascent}
    size = gradient_norm(gap)
    # A row's part in the reward's part is linear in its advantage while the sign stays, clip or not.
    signs = torch.where(advantages < 0, -1.0, 1.0).to(advantages)
    reward = case.rule.reward_alone()
    weights = TokenPair.of(replace(reward, advantages=signs).update(case.measured).whole).at_tokens(case.batch.lengths)
    best: tuple[float, int, float, dict[str, Tensor]] | None = None
    for i in progress.track(range(len(rows)), "rows, one by one", len(rows)):
        gradient = loss_gradient(case.policy, [rows[i]], weights.of_rows([i], case.batch))
        factor = fitted_factor(gradient, gap)
        if factor is None or size == 0.0:
            continue
        cosine = abs(factor) * gradient_norm(gradient) / size
        if cosine > ONE_ROW_COSINE and (best is None or cosine > best[0]):
            best = cosine, i, factor, gradient
    if best is None:
        return
    _, i, factor, gradient = best
    meant = float(advantages[i]) + factor * len(case.batch.groups) * float(signs[i])
    ascent = {name: y + factor * gradient[name] if name in gradient else y for name, y in case.ascent.items()}
    yield Cause(
        "advantage_of_a_row",
        f"the trainer's advantage of response {i + 1} (prompt {rows[i].prompt_id}) was {meant:.4g}; here it is "
        f"{float(advantages[i]):.4g}, all others agree",
        "Look at how that response was scored, or for who changed its row",
        case.stepped(ascent),
    )


def other_policy(case: Replayed) -> Suspicion | None:
    """Rows whose old_logprobs are not of the policy that drew them.

    Under that policy E[ρ_t | what came before] = 1 at every token, so that Σ (ρ_t − 1) is a martingale, whose variance is the
    mean of Σ (ρ_t − 1)².
    """
    if not case.rule.takes_ratios:
        return None
    rows = case.rule.seen(case.measured)
    more = torch.expm1(rows.log_probs - rows.old)[rows.mask > 0]
    mean, error = float(more.mean()), float(more.norm()) / len(more)
    if error == 0.0 or abs(mean) < OTHER_POLICY_ERRORS * error:
        return None
    return Suspicion(
        "old_logprobs",
        f"old_logprobs are not of the policy that drew these rows: the mean ratio to them is {1.0 + mean:.4g} ± {error:.2g}, "
        "and would be 1",
        "Record the trainer's log-probs before its first step on the rows, at the temperature of the run",
        None,
    )


def _micro_batch_sizes(batch: RolloutBatch) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for row in batch.responses:
        if row.micro_batch is not None:
            sizes[row.micro_batch] = sizes.get(row.micro_batch, 0) + 1
    return sizes
