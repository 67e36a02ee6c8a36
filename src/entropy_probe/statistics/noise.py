"""Where the noise of δH₁ comes from: X's sampling noise, Y's sampling noise, or real differences between prompts.

**What is split.** The variance V of U_cross has a linear part 4 ζ₁/U and a product part 2 τ²/(U(U−1))
(:mod:`~entropy_probe.statistics.variance`). A unit contributes x_u + y_u to the linear part, where x_u = X_u · E[Y] and
y_u = Y_u · E[X] in the inner product η P, and that part is Var(x_u + y_u)/U. More responses a prompt lower the sampling noise
within prompts; only more prompts lower the differences between them. So the linear part is split in two.

**Within a prompt** X_n and Y_n are sums over its G responses, which are drawn independently: x_n = Σ_g ξ_ng and
y_n = Σ_g ψ_ng. The sampling covariance of two such sums is estimated by

    c_n(l, r) = G/(G−1) Σ_g (l_g − l̄)(r_g − r̄)

and four parts of 4 ζ₁/U follow:

    entropy_gradient   B⁻² Σ_n c_n(ξ, ξ)       X's sampling noise
    update             B⁻² Σ_n c_n(ψ, ψ)       Y's sampling noise
    shared             2 B⁻² Σ_n c_n(ξ, ψ)     what the two share, because they come from the same responses
    prompts            the rest                 real differences between prompts

**Thirds.** E[X] and E[Y] are not known. Putting the batch's mean Ȳ in place of E[Y] would be biased: Ȳ holds the prompt's own
Y_n, and its noise would be squared. So the units are dealt to three thirds. A prompt's X is contracted twice, with the mean
Ȳᵇ of a second third and with the mean Ȳᶜ of the last one. Both are independent of the prompt and of each other, so c_n(ξᵇ,
ξᶜ) is unbiased where c_n(ξ, ξ) would not be. Y is treated likewise.

**The product part** is [tr(Var X · Var Y) + tr(Cov(X, Y)²)] / (U(U−1)). How much of it has X's sampling noise in it follows
from the differences of the two thirds, Δξ = ξᵇ − ξᶜ and Δψ = ψᵇ − ψᶜ: the mean of c_n(Δξ, Δξ) is tr(Var X_n · Var(Ȳᵇ − Ȳᶜ)),
and that of c_n(Δξ, Δψ) is the same for the second term.

The parts are unbiased for Y with given advantages. X's leave-one-out mean ties the responses of a prompt together, which leaves
a relative error of at most 1/G. Source: docs/method.md, section 5; Hoeffding (1948).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from entropy_probe.common.arrays import FloatArray
from entropy_probe.statistics.importance_sampling import group_starts
from entropy_probe.statistics.u_statistics import CrossStatistics
from entropy_probe.statistics.variance import variance_at

THIRDS = 3
"""Parts that the units are dealt to, so that two of them are independent of any prompt."""
LEAST_UNITS = 2 * THIRDS
"""Units below which the noise is not split: two in every third."""


@dataclass(frozen=True)
class NoiseParts:
    """Parts of V, in the square of its unit; the first five add up to it.

    Attributes:
        entropy_gradient: X's sampling noise against E[Y].
        update: Y's sampling noise against E[X].
        shared: what the two share through their responses; negative where they cancel.
        prompts: real differences between prompts; at least 0.
        product: X's part times Y's, the degenerate part; falls as 1/U².
        product_with_entropy_gradient: of the product, what has X's sampling noise in it.
        product_with_update: of the product, what has Y's in it. What has both counts in both.
    """

    entropy_gradient: float
    update: float
    shared: float
    prompts: float
    product: float
    product_with_entropy_gradient: float
    product_with_update: float


def noise_parts(
    x: FloatArray,
    y: FloatArray,
    group_sizes: Sequence[int],
    unit_of_prompt: Sequence[int],
    linear: float,
    product: float,
) -> NoiseParts:
    """Split V = ``linear`` + ``product``.

    Parts that are not negative in truth are clipped at 0, and ``shared`` at twice the root of the first two; what sampling is
    found to hold beyond ``linear`` is scaled to it.

    Args:
        x: ξ, each response's part of X_n · η P Ȳᵈ for thirds d, [N, 3].
        y: ψ, each response's part of Y_n · η P X̄ᵈ, [N, 3].
        group_sizes: G_n, two or more each.
        unit_of_prompt: which unit each prompt is in, [B]; the third of unit u is u mod 3.
        linear: 4 ζ₁/U.
        product: 2 τ²/(U(U−1)).
    """
    prompts, units = len(group_sizes), max(unit_of_prompt) + 1
    third = np.asarray(unit_of_prompt) % THIRDS
    # Every response's values against the two thirds that its prompt is not in.
    of_row = np.repeat(third, group_sizes)
    rows, second, last = np.arange(len(of_row)), (of_row + 1) % THIRDS, (of_row + 2) % THIRDS
    x_b, x_c, y_b, y_c = x[rows, second], x[rows, last], y[rows, second], y[rows, last]

    def covariance(left: FloatArray, right: FloatArray) -> FloatArray:
        return within_covariance(left, right, group_sizes) / prompts**2

    of_x, of_y = max(0.0, float(covariance(x_b, x_c).sum())), max(0.0, float(covariance(y_b, y_c).sum()))
    shared = float((covariance(x_b, y_c) + covariance(x_c, y_b)).sum())
    # No covariance is larger than its two variances allow.
    most = 2.0 * math.sqrt(of_x * of_y)
    shared = min(most, max(-most, shared))
    sampled = of_x + of_y + shared
    if sampled > linear:
        scale = linear / sampled
        of_x, of_y, shared, sampled = of_x * scale, of_y * scale, shared * scale, linear
    counts = np.bincount(np.arange(units) % THIRDS)
    # Var(Ȳᵇ − Ȳᶜ) over Var Y_u, by prompt.
    spread = 1.0 / counts[(third + 1) % THIRDS] + 1.0 / counts[(third + 2) % THIRDS]
    together = covariance(x_b - x_c, y_b - y_c)
    with_x, with_y = (
        min(product, max(0.0, float(((covariance(b - c, b - c) + together) / spread).sum()) / (units - 1)))
        for b, c in ((x_b, x_c), (y_b, y_c))
    )
    return NoiseParts(of_x, of_y, shared, max(0.0, linear - sampled), product, with_x, with_y)


def noise_of(
    statistics: CrossStatistics,
    x: FloatArray,
    y: FloatArray,
    group_sizes: Sequence[int],
    unit_of_prompt: Sequence[int],
) -> NoiseParts | None:
    """:func:`noise_parts` of these statistics' V; None where V has no parts.

    Args:
        statistics: of the inner product η P.
        x: ξ, as of :func:`noise_parts`.
        y: ψ.
        group_sizes: G_n, two or more each.
        unit_of_prompt: which unit each prompt is in, [B].
    """
    if statistics.parts is None:
        return None
    count = max(unit_of_prompt) + 1
    zeta1, tau_squared = statistics.parts
    return noise_parts(
        x,
        y,
        group_sizes,
        unit_of_prompt,
        variance_at(count, zeta1, 0.0),
        variance_at(count, 0.0, tau_squared),
    )


def within_covariance(left: FloatArray, right: FloatArray, group_sizes: Sequence[int]) -> FloatArray:
    """G/(G−1) Σ_g (l_g − l̄)(r_g − r̄): the covariance of a prompt's two sums over its responses, [B]."""
    sizes = np.asarray(group_sizes)
    starts = group_starts(group_sizes)

    def centred(values: FloatArray) -> FloatArray:
        deviations: FloatArray = values - np.repeat(np.add.reduceat(values, starts) / sizes, sizes)
        return deviations

    found: FloatArray = np.add.reduceat(centred(left) * centred(right), starts) * sizes / (sizes - 1)
    return found
