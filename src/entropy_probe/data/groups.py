"""Sums over a prompt's responses. Values lie flat, prompt by prompt: [N] with N = Σ_n G_n."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_probe.errors import InputError


def by_group(values: Tensor, group_sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """``values`` [N] prompt by prompt: tensors of shape [G_n]."""
    return torch.split(values, list(group_sizes))


def group_mean(values: Tensor, group_sizes: Sequence[int]) -> Tensor:
    """Mean of ``values`` [N] over each prompt's responses, repeated for each response: [N]."""
    return torch.cat([part.mean().expand(len(part)) for part in by_group(values, group_sizes)])


def leave_one_out_mean(values: Tensor, group_sizes: Sequence[int]) -> Tensor:
    """Mean of the prompt's *other* responses: (G_n mean − value) / (G_n − 1), shape [N].

    Raises:
        InputError: a prompt with a single response.
    """
    if min(group_sizes) < 2:
        raise InputError("a prompt has one response; the leave-one-out mean needs at least two")
    counts = repeat_by_group([float(size) for size in group_sizes], group_sizes)
    return (counts * group_mean(values, group_sizes) - values) / (counts - 1)


def less_weighted_others(values: Tensor, log_weights: Tensor, group_sizes: Sequence[int]) -> Tensor:
    """v_g − Σ_{j≠g} w_j v_j / Σ_{j≠g} w_j over the prompt's *other* responses j, exactly 0 where all are equal: [N].

    Args:
        values: v, [N], or [N, K] for values of K places, each of which is treated by itself.
        log_weights: log w, shaped alike; a common factor of a prompt's cancels.
        group_sizes: G_n.

    Raises:
        InputError: a prompt with a single response.
    """
    if min(group_sizes) < 2:
        raise InputError("a prompt has one response; the leave-one-out mean needs at least two")
    found = []
    for v, log_w in zip(by_group(values, group_sizes), by_group(log_weights, group_sizes), strict=True):
        for own in range(len(v)):
            others = [j for j in range(len(v)) if j != own]
            # A softmax: where one response's weight exceeds the others' by far, sums less its own term would cancel.
            found.append((log_w[others].softmax(0) * (v[own] - v[others])).sum(0))
    return torch.stack(found)


def repeat_by_group(values: Sequence[float], group_sizes: Sequence[int]) -> Tensor:
    """One value a prompt, repeated for each of its responses: float64 [N]."""
    return torch.repeat_interleave(torch.tensor(values, dtype=torch.float64), torch.tensor(list(group_sizes)))
