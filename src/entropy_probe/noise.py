"""Where the noise of δH₁ comes from: the responses that X is made of, those that Y is made of, or the prompts.

To first order U_cross moves with each prompt's x_n = X_n · P Ȳ and y_n = Y_n · P X̄, which are sums over its responses,
x_n = Σ_g ξ_ng and y_n = Σ_g ψ_ng. Within a prompt responses are independent, so that

    Var(x_n | prompt) ≈ G/(G−1) Σ_g (ξ_ng − ξ̄_n)²         and so for y and their covariance,

and B⁻² Σ_n of it is X's share of Var U_cross, Y's, and twice the shared one. Ȳ and X̄ are noisy themselves, which puts the
degenerate part 2 τ²/(U(U−1)) (X's noise times Y's) into both: it is taken out of each and kept as a part of its own. What V has
beyond these is the prompts': real differences between them. Exact in expectation up to terms of order 1/G and 1/B.
Source: design section 4; Hoeffding (1948).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from entropy_probe.importance_sampling import group_starts
from entropy_probe.u_statistics import CrossStatistics, FloatArray


@dataclass(frozen=True)
class NoiseParts:
    """Parts of V that add up to it, in the square of its unit: each at least 0, but for ``shared``.

    Attributes:
        entropy_gradient: X's sampling noise against the update.
        update: Y's sampling noise against the entropy gradient.
        shared: twice the covariance of the two through the responses that both are made of.
        product: X's noise times Y's, the degenerate part; falls as 1/U².
        prompts: real differences between prompts.
    """

    entropy_gradient: float
    update: float
    shared: float
    product: float
    prompts: float


def noise_parts(
    x: FloatArray, y: FloatArray, group_sizes: Sequence[int], variance: float, degenerate: float
) -> NoiseParts:
    """Split V = ``variance`` of U_cross.

    Args:
        x: ξ, each response's part of X_n · P Ȳ, flat [N].
        y: ψ, each response's part of Y_n · P X̄, flat [N].
        group_sizes: G_n, two or more each.
        variance: V.
        degenerate: its degenerate part 2 τ²/(U(U−1)).
    """
    prompts = len(group_sizes)
    raw_x, raw_y, raw_both = (
        float(within_covariance(left, right, group_sizes).sum()) / prompts**2
        for left, right in ((x, x), (y, y), (x, y))
    )
    of_x, of_y = max(0.0, raw_x - degenerate), max(0.0, raw_y - degenerate)
    sampled = of_x + of_y + 2.0 * raw_both + degenerate
    rest = variance - sampled
    if rest >= 0.0 or sampled <= 0.0:
        return NoiseParts(of_x, of_y, 2.0 * raw_both, degenerate, max(0.0, rest))
    # Sampling noise alone is estimated above V: prompts get nothing, and the parts are scaled to add up.
    scale = variance / sampled
    return NoiseParts(of_x * scale, of_y * scale, 2.0 * raw_both * scale, degenerate * scale, 0.0)


def noise_of(
    statistics: CrossStatistics, x: FloatArray, y: FloatArray, group_sizes: Sequence[int]
) -> NoiseParts | None:
    """:func:`noise_parts` of these statistics' variance; None where they have none. ``x`` and ``y`` in their inner product."""
    if statistics.variance is None or statistics.parts is None:
        return None
    units = len(statistics.row_means)
    return noise_parts(x, y, group_sizes, statistics.variance, 2.0 * statistics.parts[1] / (units * (units - 1)))


def within_covariance(left: FloatArray, right: FloatArray, group_sizes: Sequence[int]) -> FloatArray:
    """G/(G−1) Σ_g (l_g − l̄)(r_g − r̄): the covariance of a prompt's two sums over its responses, [B]."""
    sizes = np.asarray(group_sizes)
    starts = group_starts(group_sizes)

    def centred(values: FloatArray) -> FloatArray:
        deviations: FloatArray = values - np.repeat(np.add.reduceat(values, starts) / sizes, sizes)
        return deviations

    found: FloatArray = np.add.reduceat(centred(left) * centred(right), starts) * sizes / (sizes - 1)
    return found
