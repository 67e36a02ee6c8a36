"""The entropy per token, a ratio of means: h = H/T̄ with T̄ = E[T].

    −∇(H/T̄) = −∇H/T̄ + h ∇T̄/T̄ = −∇(H − h T̄)/T̄,   h and T̄ held fixed

so that an estimator of −∇(H − rate · T) at the rate h, divided by T̄, is all that it takes: S becomes S + h T, F_t becomes
F_t − h (T − t). h and T̄ are of the whole batch, both means over prompts of means over responses, which leaves a bias of
O(1/B). Nats per token. Source: docs/method.md, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_probe.data.groups import by_group
from entropy_probe.targets.base import EntropyEstimator, Ratio, Sample, TokenPair


def entropy_ratio(entropies: Tensor, lengths: Sequence[int] | Tensor, group_sizes: Sequence[int]) -> Ratio:
    """h and T̄ from one estimate of H and one of T a response, [N] each; of rows of another policy both times their weights."""
    tokens = torch.as_tensor(lengths, dtype=torch.float64)
    entropy, mean_length = (
        float(torch.stack([part.mean() for part in by_group(values, group_sizes)]).mean())
        for values in (entropies, tokens)
    )
    return Ratio(entropy / mean_length, mean_length)


def per_token(estimator: EntropyEstimator, sample: Sample, ratio: Ratio) -> TokenPair:
    """What multiplies ∇log π and ∇H_t in a vector whose mean is −∇(H/T̄)."""
    return estimator.coefficients(sample, ratio.per_token).scaled(1.0 / ratio.mean_length)
