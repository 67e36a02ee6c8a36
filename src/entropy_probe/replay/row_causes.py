"""Causes in the file: rows that are missing, or one row whose advantage was changed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_probe.adam_step import gradient_norm
from entropy_probe.gradients import loss_gradient
from entropy_probe.progress import Progress
from entropy_probe.replay.case import Cause, Replayed
from entropy_probe.report.replay_schema import Suspicion
from entropy_probe.rollouts import RolloutBatch
from entropy_probe.scores import AdvantageRule, length_weights
from entropy_probe.update_comparison import fitted_factor

ONE_ROW_COSINE = 0.99
"""Of the gap between two gradients with one row's ∇S, above which that row alone may be the cause."""

WHOLE_FILE = "Take the recorder's file as it is; of several processes, all their files together"


def incomplete(batch: RolloutBatch, num_generations: int | None) -> str | None:
    """What tells that rows of the trainer's window are not in the file, in words, or None.

    Of generations that serve several steps a window may hold parts of a prompt's responses, and nothing can be told.
    """
    if any(row.on_policy is False for row in batch.responses):
        return None
    most = num_generations or max(batch.group_sizes)
    facts = []
    short = [group for group in batch.groups if len(group.responses) < most]
    if short:
        names = ", ".join(str(group.prompt_id) for group in short[:3]) + ("" if len(short) <= 3 else " and others")
        facts.append(f"{len(short)} of {len(batch.groups)} prompts have fewer than {most} responses ({names})")
    declared = batch.responses[0].window_tokens
    if declared is not None and declared != batch.tokens:
        facts.append(f"the rows hold {batch.tokens} response tokens, the trainer's window had {declared:g}")
    sizes = _micro_batch_sizes(batch)
    if len(set(sizes.values())) > 1:
        facts.append(f"micro-batches hold {min(sizes.values())} to {max(sizes.values())} rows")
    return "; ".join(facts) or None


def missing_rows_reweighted(case: Replayed, progress: Progress) -> Iterator[Cause]:
    """A missing row whose advantage is zero changes the weights of the others, no more."""
    fact, completed = incomplete(case.batch, case.num_generations), _completed(case)
    if fact is not None and completed is not None:
        yield Cause(
            "missing_rows",
            f"rows of the trainer's window are not in the file: {fact}",
            WHOLE_FILE,
            case.stepped(case.along(case.advantages * completed.weights, progress)),
        )


def missing_rows(case: Replayed, progress: Progress) -> Suspicion | None:
    """Rows are missing, and what the trainer's gradient has beyond ours is of the size that they would have.

    A stand-in's gradient is unknown, but its weight is known, its advantage too where those of a prompt sum to zero, and ‖∇S‖
    is that of the prompt's other responses, within a factor of three. Where no size can be told, the count is what speaks.
    """
    fact = incomplete(case.batch, case.num_generations)
    if fact is None:
        return None
    seen = f"rows of the trainer's window are not in the file: {fact}"
    completed, scale = _completed(case), _trainers_scale(case)
    if completed is not None and completed.advantages is not None and scale is not None and case.recovered is not None:
        ours = case.along(case.advantages * completed.weights, progress)
        beyond = math.sqrt(
            sum(
                float(((-g / scale - ours.get(name, torch.zeros_like(g)).to(g)) ** 2).sum())
                for name, g in case.recovered.items()
            )
        )
        sizes = []
        for n, a, w in zip(completed.groups, completed.advantages, completed.missing_weights, strict=True):
            rows = case.batch.groups[n].responses
            norms = [
                gradient_norm(loss_gradient(case.policy, [row], torch.ones(1, dtype=torch.float64))) for row in rows
            ]
            sizes.append([abs(float(a * w)) / len(case.batch.groups) * norm for norm in norms])
        low, high = (math.sqrt(sum(pick(s) ** 2 for s in sizes)) for pick in (min, max))
        if not low / 3 <= beyond <= 3 * high:
            return None
        seen += (
            f"; the trainer's gradient has a part of norm {beyond:.3g} beyond ours, and theirs would be {low:.3g} to "
            f"{high:.3g}"
        )
    return Suspicion("missing_rows", seen, WHOLE_FILE, None)


def _trainers_scale(case: Replayed) -> float | None:
    """The trainer's clip factor: recovered norm over logged norm, or 1 where it cannot have clipped; None if unknown."""
    if case.recovered is None:
        return None
    size = gradient_norm(case.recovered)
    if case.logged_norm is not None and case.logged_norm > 0.0:
        return size / case.logged_norm
    return 1.0 if case.max_grad_norm is None or size < 0.999 * case.max_grad_norm else None


def one_row(case: Replayed, progress: Progress) -> Iterator[Cause]:
    """The row whose ∇S the gap between the two gradients lies along, if there is one: a backward a row."""
    scale = _trainers_scale(case)
    if scale is None or case.recovered is None:
        return
    gap = {name: -g / scale - case.ascent[name].to(g) for name, g in case.recovered.items() if name in case.ascent}
    size = gradient_norm(gap)
    best: tuple[float, int, float, dict[str, Tensor]] | None = None
    rows = case.batch.responses
    for i in progress.track(range(len(rows)), "rows, one by one", len(rows)):
        gradient = loss_gradient(case.policy, [rows[i]], torch.ones(1, dtype=torch.float64))
        factor = fitted_factor(gradient, gap)
        if factor is None or size == 0.0:
            continue
        cosine = abs(factor) * gradient_norm(gradient) / size
        if cosine > ONE_ROW_COSINE and (best is None or cosine > best[0]):
            best = cosine, i, factor, gradient
    if best is None:
        return
    _, i, factor, gradient = best
    meant = float(case.advantages[i]) + factor * len(case.batch.groups) / float(case.weights[i])
    ascent = {name: y + factor * gradient[name] if name in gradient else y for name, y in case.ascent.items()}
    yield Cause(
        "advantage_of_a_row",
        f"the trainer's advantage of response {i + 1} (prompt {rows[i].prompt_id}) was {meant:.4g}; here it is "
        f"{float(case.advantages[i]):.4g}, all others agree",
        "Look at how that response was scored, or for who changed its row",
        case.stepped(ascent),
    )


def _micro_batch_sizes(batch: RolloutBatch) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for row in batch.responses:
        if row.micro_batch is not None:
            sizes[row.micro_batch] = sizes.get(row.micro_batch, 0) + 1
    return sizes


@dataclass(frozen=True)
class _Completed:
    """The window with a stand-in for every missing response: w of the rows that are there and of the stand-ins.

    ``groups`` and ``advantages`` are the prompts of the stand-ins and what their advantages must be to sum to zero; None where
    a prompt lacks several.
    """

    weights: Tensor
    missing_weights: Tensor
    groups: tuple[int, ...]
    advantages: Tensor | None


def _completed(case: Replayed) -> _Completed | None:
    batch = case.batch
    most = case.num_generations or max(batch.group_sizes)
    short = [n for n, size in enumerate(batch.group_sizes) if size < most]
    if not short:
        return None
    declared = batch.responses[0].window_tokens
    count = sum(most - batch.group_sizes[n] for n in short)
    mean = batch.tokens / len(batch.responses)
    length = max(1, round(mean if declared is None else (declared - batch.tokens) / count))
    sizes = _micro_batch_sizes(batch)
    emptiest = min(sizes, key=lambda k: sizes[k]) if sizes else None
    lengths: list[int] = []
    micro: list[int | None] = []
    there: list[bool] = []
    for n, group in enumerate(batch.groups):
        extra = most - len(group.responses) if n in short else 0
        lengths += [*(len(row.response_ids) for row in group.responses), *[length] * extra]
        micro += [*(row.micro_batch for row in group.responses), *[emptiest] * extra]
        there += [*[True] * len(group.responses), *[False] * extra]
    weights = length_weights(
        lengths,
        [max(size, most) for size in batch.group_sizes],
        case.length_weight,
        max_completion_length=case.max_completion_length,
        window_tokens=declared,
        micro_batches=[k for k in micro if k is not None] or None,
    )
    here = torch.tensor(there)
    alone = all(batch.group_sizes[n] == most - 1 for n in short)
    parts = torch.split(case.advantages, list(batch.group_sizes))
    zero_sum = alone and case.rule is AdvantageRule.GIVEN
    return _Completed(
        weights[here],
        weights[~here],
        tuple(short),
        torch.stack([-parts[n].sum() for n in short]) if zero_sum else None,
    )
