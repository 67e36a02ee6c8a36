"""TRL's gradient from the rows that the recorder left, with all that its loss uses, by autograd through a whole objective."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from entropy_probe.data.rollouts import Rollout, group_rollouts
from entropy_probe.losses.cispo import CISPO
from entropy_probe.losses.corrections import Correction, CorrectionMode
from entropy_probe.losses.kl import KLTerm
from entropy_probe.losses.objective import EntropyBonus, Objective
from entropy_probe.losses.ppo_clip import PPOClip
from entropy_probe.losses.rloo import RLOO
from entropy_probe.losses.rows import LossRows
from entropy_probe.losses.sapo import SAPO
from entropy_probe.losses.token_loss import RatioLevel, TokenLoss
from entropy_probe.losses.vespo import VESPO
from entropy_probe.model.measured import Measured
from entropy_probe.pipeline.recorded import trainers_step
from entropy_probe.pipeline.settings import Settings
from entropy_probe.pipeline.update import UpdateRule
from entropy_probe.targets.base import TokenPair
from trl_training import TEMPERATURE, model_at


def objective_of(rows: Sequence[Rollout]) -> Objective:
    """The objective that the columns name."""
    said = rows[0].extra
    assert all(row.extra == said for row in rows)
    level = RatioLevel(said.get("importance_sampling_level", "token"))
    correction = None
    if "importance_sampling_mode" in said:
        correction = Correction(
            CorrectionMode(said["importance_sampling_mode"]),
            said["importance_sampling_clip_min"],
            said["importance_sampling_clip_max"],
        )
    bounds = (said.get("epsilon_low", 0.2), said.get("epsilon_high", 0.2))
    losses: dict[str, Callable[[], TokenLoss]] = {
        "cispo": lambda: CISPO(said["epsilon_high"], level=level),
        "sapo": lambda: SAPO(said["sapo_temperature_pos"], said["sapo_temperature_neg"], level=level),
        "vespo": lambda: VESPO(
            *(said[f"vespo_{name}"] for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")), correction=correction
        ),
        "rloo": lambda: RLOO(*bounds),
    }
    loss = losses.get(str(rows[0].loss_type), lambda: PPOClip(*bounds, delta=said.get("delta"), level=level))()
    kl = None
    if "beta" in said:
        assert said["kl_estimator"] == "k3"
        kl = KLTerm(said["beta"], bias_correction=said["use_bias_correction_kl"], level=level)
    return Objective(
        loss,
        correction=None if rows[0].loss_type == "vespo" else correction,
        top_entropy_quantile=said.get("top_entropy_quantile", 1.0),
        off_policy_threshold=said.get("off_policy_mask_threshold"),
        kl=kl,
        bonus=EntropyBonus(said["entropy_coef"]) if "entropy_coef" in said else None,
    )


def mask_of(row: Rollout) -> list[float]:
    """What of a row is in the loss."""
    kept = row.loss_mask or (1,) * len(row.response_ids)
    drawn = row.sampled or (True,) * len(row.response_ids)
    return [float(a and b) for a, b in zip(kept, drawn, strict=True)]


def averages(rows: Sequence[Rollout]) -> list[float]:
    """The weight of each row's tokens in TRL's mean, as the docstring of ``loss_columns`` says."""
    counts = [sum(mask_of(row)) for row in rows]
    of_micro_batch, size = defaultdict(float), Counter(row.micro_batch for row in rows)
    for row, count in zip(rows, counts, strict=True):
        of_micro_batch[row.micro_batch] += count
    weights = []
    for row, count in zip(rows, counts, strict=True):
        per_row = len(size) * size[row.micro_batch]
        weights.append(
            {
                "grpo": lambda r=per_row, c=count: r * max(1.0, c),
                "sapo": lambda r=per_row, c=count: r * max(1.0, c),
                "rloo": lambda r=per_row, c=count: r * max(1.0, c),
                "luspo": lambda r=per_row: r,
                "dr_grpo": lambda r=per_row, row=row: r * row.max_completion_length,
                "bnpo": lambda row=row: len(size) * max(1.0, of_micro_batch[row.micro_batch]),
            }.get(str(row.loss_type), lambda row=row: row.window_tokens)()
        )
    return [1.0 / weight for weight in weights]


def flat(rows: Sequence[Rollout], column: str) -> Tensor | None:
    found = [getattr(row, column) for row in rows]
    if any(values is None for values in found):
        assert all(values is None for values in found)
        return None
    return torch.tensor([value for values in found for value in values], dtype=torch.float64)


def gradient_of_the_objective(
    weights: dict[str, Tensor], rows: Sequence[Rollout], objective: Objective | None = None
) -> dict[str, Tensor]:
    """The gradient of TRL's loss at ``weights``, in float64, from the recorded rows alone."""
    model = model_at(weights).double()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    log_probs, entropies = measured(model, rows)
    lengths = tuple(len(row.response_ids) for row in rows)
    repeat = torch.tensor(lengths)
    loss_rows = LossRows(
        lengths=lengths,
        log_probs=log_probs.detach(),
        advantages=torch.tensor([row.advantage for row in rows], dtype=torch.float64).repeat_interleave(repeat),
        mask=torch.tensor([one for row in rows for one in mask_of(row)], dtype=torch.float64),
        old_log_probs=flat(rows, "old_logprobs"),
        sampler_log_probs=flat(rows, "logprobs"),
        ref_log_probs=flat(rows, "ref_logprobs"),
        entropies=entropies.detach(),
        micro_batches=tuple(int(row.micro_batch or 0) for row in rows),
    )
    average = torch.tensor(averages(rows), dtype=torch.float64).repeat_interleave(repeat)
    found = (objective or objective_of(rows)).token_weights(loss_rows, average)
    loss = -(found.on_log_probs * log_probs).sum()
    if found.bonus is not None:
        loss = loss - (found.bonus * entropies).sum()
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return dict(zip(trained, gradients, strict=True))


def gradient_of_the_update(weights: dict[str, Tensor], rows: Sequence[Rollout]) -> dict[str, Tensor]:
    """The same by the coefficients that a probe and a replay take."""
    model = model_at(weights).double()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    batch = group_rollouts(rows, least_responses=1)
    rule = UpdateRule.of(batch, trainers_step(batch, Settings(), assumed=None), None)
    drawn = torch.tensor([one for row in batch.responses for one in row.sampled or (True,) * len(row.response_ids)])
    log_probs, entropies = (values[drawn] for values in measured(model, batch.responses))
    at_theta = Measured(torch.zeros(len(rows)), entropies.detach(), log_probs.detach())
    pair = TokenPair.of(rule.update(at_theta).whole).at_tokens(batch.lengths).scaled(1.0 / len(batch.groups))
    loss = -(pair.log_probs * log_probs).sum()
    if pair.entropies is not None:
        loss = loss - (pair.entropies * entropies).sum()
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return dict(zip(trained, gradients, strict=True))


def measured(model: Any, rows: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
    """log π and H of every response token, one row at a time."""
    log_probs, entropies = [], []
    for row in rows:
        ids = torch.tensor([row.prompt_ids + row.response_ids])
        every = (model(input_ids=ids).logits[0] / TEMPERATURE).log_softmax(-1)[len(row.prompt_ids) - 1 : -1]
        log_probs.append(every.gather(1, torch.tensor(row.response_ids)[:, None]).squeeze(1))
        entropies.append(-(every.exp() * every).sum(-1))
    return torch.cat(log_probs), torch.cat(entropies)
