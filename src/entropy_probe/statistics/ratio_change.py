"""A realised change whose two entropies are ratios of means, weights being in each response's numerator and denominator.

    ĥ = Σ b n / Σ b d       ĥ⁺ = Σ b n⁺ / Σ b d⁺
    SE² = B/(B−1) Σ_n ( Σ_{i∈n} b_i [ (n⁺_i − ĥ⁺ d⁺_i)/d̄⁺ − (n_i − ĥ d_i)/d̄ ] )²

with b_i = 1/(B G_n). By Rao-Blackwell with weights w_{<s} by prefix n = Σ_s w_{<s} H_s, d = w of the whole response (or
Σ_s w_{<s} per token), and after the step n⁺ and d⁺ have w⁺_{<s} = w_{<s} Π_{k<s} π⁺/π: E[n⁺] = H(θ⁺) whatever policy
drew. Source: docs/method.md, sections 2 and 7.
"""

from __future__ import annotations

from collections.abc import Sequence

from entropy_probe.common.arrays import FloatArray
from entropy_probe.statistics.importance_sampling import (
    EntropyChange,
    ImportanceWeights,
    clustered_error,
    ratio_by_prompt,
)


def ratio_change(
    before: tuple[FloatArray, FloatArray],
    after: tuple[FloatArray, FloatArray],
    group_sizes: Sequence[int],
    weights: ImportanceWeights,
) -> EntropyChange:
    """ĥ⁺ − ĥ with its clustered standard error; two prompts or more.

    Args:
        before: n and d, [N] each.
        after: n⁺ and d⁺.
        group_sizes: G_n.
        weights: of whole responses, which tell how far the two policies are apart.
    """
    (at_theta, influence), (moved, influence_after) = (
        ratio_by_prompt(entropies, group_sizes, counts) for entropies, counts in (before, after)
    )
    return EntropyChange(at_theta, moved, moved - at_theta, clustered_error(influence_after - influence), None, weights)
