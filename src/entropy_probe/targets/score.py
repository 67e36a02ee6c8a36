"""The score estimator: what multiplies ∇S_ng in X_n."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from entropy_probe.data.groups import leave_one_out_mean, repeat_by_group


def score_coefficients(scores: Tensor, group_sizes: Sequence[int]) -> Tensor:
    """c_ng = (S_ng − S̄_n,−g) / G_n, detached; shape [N], nats.

    The leave-one-out mean is a baseline that is independent of response g, so E[X_n] = −∇H_n exactly, without the
    1/G shrinkage of the full mean.
    """
    detached = scores.detach()
    return (detached - leave_one_out_mean(detached, group_sizes)) / repeat_by_group(group_sizes, group_sizes)
