"""Slow truths, written apart from the package: one response at a time, loops over pairs, torch.optim itself.

Only ``Float64Mode`` is shared, because both sides must run the model in the same arithmetic.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from entropy_probe.data.rollouts import Rollout, RolloutBatch
from entropy_probe.model.float64_mode import Float64Mode
from entropy_probe.optimizers.state import AdamState


def score_alone(model: Any, row: Rollout, temperature: float) -> Tensor:
    """S of one response, unpadded, token by token."""
    ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0] / temperature
    start = len(row.prompt_ids)
    total = logits.new_zeros(())
    for t, token in enumerate(row.response_ids):
        total = total + torch.log_softmax(logits[start + t - 1], dim=-1)[token]
    return total


@dataclass(frozen=True)
class Alone:
    """S [N] and ∇S [N, parameters] of every response by itself."""

    scores: np.ndarray
    gradients: np.ndarray


def one_at_a_time(model: Any, batch: RolloutBatch) -> Alone:
    """One forward and one backward a response, in eval mode, under the float64 mode where the model is float64."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    scores, gradients = [], []
    with Float64Mode() if parameters[0].dtype == torch.float64 else nullcontext():
        for row in batch.responses:
            score = score_alone(model, row, batch.temperature)
            grads = torch.autograd.grad(score, parameters, allow_unused=True)
            flat = [
                (torch.zeros_like(p) if g is None else g).flatten().double()
                for p, g in zip(parameters, grads, strict=True)
            ]
            scores.append(float(score.detach()))
            gradients.append(torch.cat(flat).numpy())
    return Alone(np.array(scores), np.array(gradients))


@dataclass(frozen=True)
class TokensAlone:
    """∇log π(y_t) and ∇H_t of every response token by itself, [tokens, parameters] each, and H_t, [tokens]."""

    of_log_probs: np.ndarray
    of_entropies: np.ndarray
    entropies: np.ndarray


def one_token_at_a_time(model: Any, batch: RolloutBatch) -> TokensAlone:
    """One forward a response, unpadded, and two backwards a token that the policy drew, under the float64 mode."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    of_log_probs, of_entropies, entropies = [], [], []

    def flat(value: Tensor) -> np.ndarray:
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        parts = [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads, strict=True)]
        found: np.ndarray = torch.cat(parts).numpy()
        return found

    with Float64Mode():
        for row in batch.responses:
            ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
            for place, token in enumerate(row.response_ids):
                if row.sampled is not None and not row.sampled[place]:
                    continue
                log_p = torch.log_softmax(logits[len(row.prompt_ids) + place - 1] / batch.temperature, dim=-1)
                entropy = -(log_p.exp() * log_p).sum()
                of_log_probs.append(flat(log_p[token]))
                of_entropies.append(flat(entropy))
                entropies.append(float(entropy.detach()))
    return TokensAlone(np.array(of_log_probs), np.array(of_entropies), np.array(entropies))


def scores_alone(model: Any, batch: RolloutBatch) -> np.ndarray:
    """S of every response by itself, without gradients."""
    model.eval()
    with torch.no_grad(), Float64Mode() if next(model.parameters()).dtype == torch.float64 else nullcontext():
        return np.array([float(score_alone(model, row, batch.temperature)) for row in batch.responses])


def prompt_vectors(
    alone: Alone, batch: RolloutBatch, length: Callable[[Sequence[Rollout], Rollout], float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """X_n and Y_n, [B, parameters]: leave-one-out scores; advantages r − mean; lengths the guide's unless given."""
    xs, ys = [], []
    i = 0
    for group in batch.groups:
        rows, count = group.responses, len(group.responses)
        longest = max(len(r.response_ids) for r in rows)
        mean_reward = sum(r.reward for r in rows) / count
        x = np.zeros(alone.gradients.shape[1])
        y = np.zeros(alone.gradients.shape[1])
        for g, row in enumerate(rows):
            others = [alone.scores[i + h] for h in range(count) if h != g]
            x += (alone.scores[i + g] - sum(others) / (count - 1)) / count * alone.gradients[i + g]
            divisor = longest if length is None else length(rows, row)
            y += (row.reward - mean_reward) / (count * divisor) * alone.gradients[i + g]
        xs.append(x)
        ys.append(y)
        i += count
    return np.array(xs), np.array(ys)


def double_loop(
    xs: np.ndarray, ys: np.ndarray, sizes: Sequence[int] | None = None
) -> tuple[float, list[float], list[float]]:
    """(U_cross, r_u, delete-one U_−u) by looping over ordered pairs of prompts in different units."""
    sizes = [1] * len(xs) if sizes is None else list(sizes)
    unit = [u for u, size in enumerate(sizes) for _ in range(size)]
    prompts = range(len(xs))

    def mean_over(pairs: list[tuple[int, int]]) -> float:
        return math.fsum(float(xs[n] @ ys[m]) for n, m in pairs) / len(pairs)

    def pairs(keep: set[int]) -> list[tuple[int, int]]:
        return [
            (n, m) for n, m in itertools.product(prompts, prompts) if unit[n] != unit[m] and {unit[n], unit[m]} <= keep
        ]

    everything = set(range(len(sizes)))
    u_cross = mean_over(pairs(everything))
    r = []
    for u in sorted(everything):
        as_x = mean_over([(n, m) for n, m in pairs(everything) if unit[n] == u])
        as_y = mean_over([(n, m) for n, m in pairs(everything) if unit[m] == u])
        r.append(0.5 * (as_x + as_y))
    left = [mean_over(pairs(everything - {u})) if len(sizes) > 2 else math.nan for u in sorted(everything)]
    return u_cross, r, left


def flat_preconditioner(model: nn.Module, optimizer: torch.optim.Optimizer) -> np.ndarray:
    """1/(√(v/(1 − β₂^t)) + ε) of a live optimizer, laid out as the model's trainable parameters."""
    settings = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    parts = []
    for p in model.parameters():
        if p.requires_grad:
            state, group = optimizer.state[p], settings[id(p)]
            v_hat = state["exp_avg_sq"].double() / (1 - group["betas"][1] ** float(state["step"]))
            parts.append((1 / (v_hat.sqrt() + group["eps"])).flatten())
    return torch.cat(parts).numpy()


def moved(model: Any, delta: np.ndarray) -> Any:
    """A clone with Δθ added to its trainable parameters."""
    clone = copy.deepcopy(model)
    start = 0
    with torch.no_grad():
        for p in clone.parameters():
            if p.requires_grad:
                p += torch.from_numpy(delta[start : start + p.numel()]).reshape(p.shape).to(p)
                start += p.numel()
    return clone


def stepped_by_torch(model: Any, optimizer: torch.optim.AdamW, ascent: np.ndarray) -> Any:
    """A clone moved by one real AdamW step on the gradient −Ȳ, its state carried over from ``optimizer``."""
    clone = copy.deepcopy(model)
    pairs = dict(zip((id(p) for p in model.parameters()), clone.parameters(), strict=True))
    fresh = torch.optim.AdamW(
        [{**{k: v for k, v in g.items() if k != "params"}, "params": [pairs[id(p)] for p in g["params"]]}
         for g in optimizer.param_groups]
    )  # fmt: skip
    for p, state in optimizer.state.items():
        fresh.state[pairs[id(p)]] = {
            k: v.clone() if k == "step" else v.to(pairs[id(p)], copy=True) for k, v in state.items()
        }
    start = 0
    for p in clone.parameters():
        if p.requires_grad:
            p.grad = torch.from_numpy(-ascent[start : start + p.numel()]).reshape(p.shape).to(p)
            start += p.numel()
    fresh.step()
    return clone


def optimizer_step(
    parameters: Mapping[str, nn.Parameter], state: AdamState, ascent: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Δθ, float64, of one real ``torch.optim`` step on the loss gradient −Ȳ from the given state; no gradient clipping.

    The step is taken on clones of the parameters and of the state, which are left alone. Groups whose weight decay is
    decoupled are stepped by AdamW, the others by Adam. Parameters that no response reaches have no gradient and stay, as in
    training. (A deep copy of the whole model would not do: a trainer may have bound a patched forward to the original.)

    Args:
        parameters: the trainable parameters at θ, by name.
        state: of every one of them.
        ascent: Ȳ by name.
    """
    deltas: dict[str, Tensor] = {}
    for group in state.groups:
        # A parameter frozen since the state was taken has no gradient, and the optimizer would pass it by.
        clones = {n: nn.Parameter(parameters[n].detach().clone()) for n in group.names if n in parameters}
        if not clones:
            continue
        optimizer_class = torch.optim.AdamW if group.decoupled_weight_decay else torch.optim.Adam
        optimizer = optimizer_class(
            list(clones.values()),
            lr=group.learning_rate,
            betas=(group.beta1, group.beta2),
            eps=group.eps,
            weight_decay=group.weight_decay,
            amsgrad=group.amsgrad,
            maximize=group.maximize,
        )
        for name, clone in clones.items():
            moments = state.moments[name]
            entry = {
                "step": torch.tensor(float(moments.step)),
                "exp_avg": moments.exp_avg.to(clone, copy=True),
                "exp_avg_sq": moments.exp_avg_sq.to(clone, copy=True),
            }
            if group.amsgrad and moments.max_exp_avg_sq is not None:
                entry["max_exp_avg_sq"] = moments.max_exp_avg_sq.to(clone, copy=True)
            optimizer.state[clone] = entry
            if name in ascent:
                # Under maximize the optimizer ascends what it is given.
                sign = 1.0 if group.maximize else -1.0
                clone.grad = (sign * ascent[name]).to(clone)
        optimizer.step()
        for name, clone in clones.items():
            deltas[name] = clone.detach().double() - parameters[name].detach().double()
    return deltas


def parts_with_v_at_t(
    parameters: Mapping[str, Tensor], state: AdamState, ascent: Mapping[str, Tensor], clip_factor: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Momentum, gradient and weight decay of AdamW's step on −Ȳ (clipped) were v not updated with this gradient.

    The denominator is √(v / (1 − β₂^t)) + ε, v the largest so far under amsgrad. Coupled decay goes through the gradient.
    """
    momentum, gradient, decay = {}, {}, {}
    for name, group in state.group_of().items():
        if name not in ascent or name not in parameters:
            continue
        m = state.moments[name]
        v = m.max_exp_avg_sq if group.amsgrad and m.max_exp_avg_sq is not None else m.exp_avg_sq
        root = (v.double() / (1 - group.beta2**m.step)).sqrt() + group.eps
        scale = group.learning_rate / (1 - group.beta1 ** (m.step + 1)) / root
        theta = parameters[name].detach().double()
        momentum[name] = -scale * group.beta1 * m.exp_avg.double()
        gradient[name] = scale * (1 - group.beta1) * clip_factor * ascent[name].double()
        by_decay = group.learning_rate if group.decoupled_weight_decay else scale * (1 - group.beta1)
        decay[name] = -by_decay * group.weight_decay * theta
    return momentum, gradient, decay


def snis_change(scores: np.ndarray, scores_after: np.ndarray, group_sizes: Sequence[int]) -> tuple[float, float]:
    """(ΔH, ESS) by plain sums, without log space."""
    base = [1 / (len(group_sizes) * size) for size in group_sizes for _ in range(size)]
    w = [b * math.exp(after - before) for b, before, after in zip(base, scores, scores_after, strict=True)]
    total = math.fsum(w)
    after = -math.fsum(wi / total * s for wi, s in zip(w, scores_after, strict=True))
    before = -math.fsum(b * s for b, s in zip(base, scores, strict=True))
    return after - before, total**2 / math.fsum(wi**2 for wi in w)


def linear_change(alone: Alone, delta: np.ndarray, group_sizes: Sequence[int]) -> float:
    """−Σ b dS − Σ b (S − S̄) dS with dS_i = g_i · Δθ, response by response."""
    base = np.array([1 / (len(group_sizes) * size) for size in group_sizes for _ in range(size)])
    d_scores = alone.gradients @ delta
    mean = float(base @ alone.scores)
    return float(-(base @ d_scores) - (base * (alone.scores - mean)) @ d_scores)


def folds_one_left_out(kernel: np.ndarray, folds: Sequence[int]) -> tuple[float, list[float], float]:
    """(mean, by fold, jackknife error) of mean X of each fold against mean Y of the others, each prompt left out in turn."""
    labels, count = np.asarray(folds), len(folds)

    def estimate(kept: np.ndarray) -> list[float]:
        found = []
        for fold in np.unique(labels):
            inside, outside = kept * (labels == fold), kept * (labels != fold)
            found.append(float(inside @ kernel @ outside) / float(inside.sum() * outside.sum()))
        return found

    left = np.array([np.mean(estimate(np.where(np.arange(count) == n, 0.0, 1.0))) for n in range(count)])
    by_fold = estimate(np.ones(count))
    return float(np.mean(by_fold)), by_fold, math.sqrt((count - 1) / count * float(((left - left.mean()) ** 2).sum()))
