"""Units whose X all carry 1/W̄, the mean weight of responses that another policy drew: what that ties between them.

With W_u the mean weight of a unit's prompts and W̄ = Σ s_u W_u / B, U_cross is V / W̄, V being made of unnormalised
vectors. To first order a unit moves it by 2 ω_u (r_u − U_cross) through V, W̄ held fixed, and by −U_cross (s_u / B)(W_u/W̄
− 1) through W̄. So that all errors, which are made from rows, see both,

    x_u becomes x_u − d_u,  d_u = U_cross (s_u / (B ω_u)) (W_u/W̄ − 1)        r_u becomes r_u − ½ d_u

U_cross = Σ ω_u r_u and y_u stay. Source: docs/method.md, section 3.
"""

from __future__ import annotations

from entropy_probe.common.arrays import FloatArray


def tied_by_weights(u_cross: float, weights: FloatArray, sizes: FloatArray) -> FloatArray:
    """d_u, what x_u loses, [U].

    Args:
        u_cross: the estimate, whose X carry 1/W̄.
        weights: W_u / W̄, [U]; their mean over prompts is 1.
        sizes: s_u.
    """
    prompts = sizes.sum()
    omega = sizes * (prompts - sizes) / (prompts**2 - (sizes**2).sum())
    found: FloatArray = u_cross * sizes / (prompts * omega) * (weights - 1.0)
    return found


def tied_kernel(kernel: FloatArray, ties: FloatArray) -> FloatArray:
    """A matrix whose off-diagonal row means are x_u − d_u and whose column means are y_u as they were, [U, U]; U ≥ 3.

    K_uw − α (d_u + d_w / (U−1)) with α = 1 / (1 − 1/(U−1)²): the second term takes out again what the first puts into columns,
    since Σ d = 0.

    Args:
        kernel: K_uw of units of equal size, over the square of their size.
        ties: d of :func:`tied_by_weights`.
    """
    others = len(ties) - 1
    found: FloatArray = kernel - (ties[:, None] + ties[None, :] / others) / (1.0 - 1.0 / others**2)
    return found
