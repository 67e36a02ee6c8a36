"""The variance of U_cross from the matrix of unit dots, unbiased, and Hoeffding's two parts of it.

K_uw = X̃_u · Ỹ_w over U units of equal size, in nats per unit of learning rate (divide XS_u · YS_w by the square of the units'
size). With h = (K + Kᵀ)/2, its diagonal left out, r_u = Σ_{w≠u} h_uw / (U−1) and U_cross = Σ r_u / U, Hoeffding's (1948)
decomposition h_uw = U_cross + g_u + g_w + ψ_uw gives

    Var U_cross = 4 ζ₁/U + 2 τ²/(U(U−1)),    ζ₁ = Var g (linear part),  τ² = Var ψ (degenerate part)

The linear part is what units differ in; the degenerate part is X's noise times Y's. Source: docs/method.md, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from entropy_probe.common.arrays import FloatArray


def variance_at(units: int, zeta1: float, tau_squared: float) -> float:
    """V(U) = 4 ζ₁/U + 2 τ²/(U(U−1)), (nats per unit of learning rate)²; U ≥ 2 (Hoeffding 1948)."""
    return 4.0 * zeta1 / units + 2.0 * tau_squared / (units * (units - 1))


def unbiased_variance(kernel: FloatArray, u_cross: float) -> float:
    """V_unb, unbiased for Var U_cross with equal units, U ≥ 4; it can be negative.

    With h = (K + Kᵀ)/2 and a zero diagonal, S₁ = Σh, S₂ = Σ (row sums)², S₃ = Σh²:
    V_unb = U_cross² − (S₁² − 4 S₂ + 2 S₃) / [U(U−1)(U−2)(U−3)]. The bracket sums h_ij h_kl over distinct i, j, k, l, whose
    mean is (E U_cross)².
    """
    units = len(kernel)
    h = _symmetrised(kernel)
    s1, s2, s3 = h.sum(), (h.sum(axis=1) ** 2).sum(), (h**2).sum()
    return float(u_cross**2 - (s1**2 - 4.0 * s2 + 2.0 * s3) / (units * (units - 1) * (units - 2) * (units - 3)))


def degenerate_part(units: int, unbiased: float, jackknife: float) -> float:
    """τ̂² = max(0, (V_jack − V_unb) / [4/(U(U−2)) − 2/(U(U−1))]): the jackknife counts the degenerate part twice."""
    return max(0.0, (jackknife - unbiased) / (4.0 / (units * (units - 2)) - 2.0 / (units * (units - 1))))


def interval_variance(kernel: FloatArray, u_cross: float, variance_jackknife: float) -> float:
    """V = max(V_unb, 2 τ̂² / (U(U−1))), the variance that intervals rest on; U ≥ 4.

    The floor keeps V from falling below the degenerate part alone where V_unb is small or negative. τ̂² is that of
    :func:`degenerate_part`.
    """
    units, unbiased = len(kernel), unbiased_variance(kernel, u_cross)
    return max(unbiased, variance_at(units, 0.0, degenerate_part(units, unbiased, variance_jackknife)))


@dataclass(frozen=True)
class Decomposition:
    """What the matrix of unit dots says of U_cross, U ≥ 4 units of equal size.

    Attributes:
        h: (K + Kᵀ)/2 with a zero diagonal, [U, U].
        row_means: r_u, [U].
        u_cross: their mean.
        plugin: 4 Σ (r_u − U_cross)² / (U(U−1)), the plug-in variance.
        jackknife: the delete-one variance; it counts the degenerate part twice.
        variance: V of :func:`interval_variance`.
        tau_squared: τ̂², the degenerate part.
    """

    h: FloatArray
    row_means: FloatArray
    u_cross: float
    plugin: float
    jackknife: float
    variance: float
    tau_squared: float

    @property
    def units(self) -> int:
        """U."""
        return len(self.row_means)

    @property
    def linear(self) -> float:
        """4 ζ̂₁/U: V without its degenerate part; 0 where V is its floor."""
        return max(0.0, self.variance - variance_at(self.units, 0.0, self.tau_squared))

    @property
    def parts(self) -> tuple[float, float]:
        """(ζ̂₁, τ̂²) ≥ 0 such that V = 4 ζ̂₁/U + 2 τ̂²/(U(U−1)), (nats per unit of learning rate)²."""
        return self.units * self.linear / 4.0, self.tau_squared


def decompose(kernel: FloatArray) -> Decomposition:
    """From K / (unit size)², [U, U] with U ≥ 4; its diagonal is not used.

    Raises:
        ValueError: the kernel is not square or has fewer than 4 units.
    """
    units = len(kernel)
    if kernel.shape != (units, units) or units < 4:
        raise ValueError(f"the kernel has shape {kernel.shape}; an interval needs a square one of 4 units or more")
    h = _symmetrised(kernel)
    row_means = h.sum(axis=1) / (units - 1)
    u_cross = float(row_means.mean())
    plugin = 4.0 * float(((row_means - u_cross) ** 2).sum()) / (units * (units - 1))
    jackknife = plugin * ((units - 1) / (units - 2)) ** 2
    unbiased = unbiased_variance(kernel, u_cross)
    tau_squared = degenerate_part(units, unbiased, jackknife)
    variance = max(unbiased, variance_at(units, 0.0, tau_squared))
    return Decomposition(h, row_means, u_cross, plugin, jackknife, variance, tau_squared)


def _symmetrised(kernel: FloatArray) -> FloatArray:
    h: FloatArray = 0.5 * (kernel + kernel.T)
    np.fill_diagonal(h, 0.0)
    return h
