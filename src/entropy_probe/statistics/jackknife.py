"""The delete-one values of U_cross and the jackknife variance that they give.

With D = B² − Σ s_u² over B = Σ s_u prompts, leaving out unit u is exact and needs its row mean r_u alone:

    U_−u = (D U_cross − 2 s_u (B − s_u) r_u) / (D − 2 s_u (B − s_u))        Var = (U−1)/U Σ (U_−u − mean)²

Source: docs/method.md, section 5; Efron and Stein (1981).
"""

from __future__ import annotations

from entropy_probe.common.arrays import FloatArray


def delete_one(u_cross: float, row_means: FloatArray, sizes: FloatArray) -> FloatArray:
    """U_−u, the statistic without unit u, exactly: [U]. Three units or more."""
    prompts = sizes.sum()
    pairs = prompts**2 - (sizes**2).sum()
    removed = 2.0 * sizes * (prompts - sizes)
    left: FloatArray = (pairs * u_cross - removed * row_means) / (pairs - removed)
    return left


def jackknife_variance(u_cross: float, row_means: FloatArray, sizes: FloatArray) -> float:
    """Delete-one variance (U−1)/U Σ (U_−u − mean)² of U_cross. It counts the degenerate part of Var U twice."""
    left = delete_one(u_cross, row_means, sizes)
    units = len(sizes)
    return float((units - 1) / units * ((left - left.mean()) ** 2).sum())
