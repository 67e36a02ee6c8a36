"""Confidence intervals of U_cross from the matrix of unit dots, and how many units would settle a question.

K_uw = X̃_u · Ỹ_w over U units of equal size, in nats per unit of learning rate (divide XS_u · YS_w by the square of the units'
size). With h = (K + Kᵀ)/2, its diagonal left out, r_u = Σ_{w≠u} h_uw / (U−1) and U_cross = Σ r_u / U, Hoeffding's (1948)
decomposition h_uw = U + g_u + g_w + ψ_uw gives

    Var U_cross = 4 ζ₁/U + 2 τ²/(U(U−1)),    ζ₁ = Var g (linear part),  τ² = Var ψ (degenerate part)

``docs/coverage.md`` has the measured coverage of every method here and of two bootstraps, from which ``DEFAULT_METHOD`` and
the limits of :func:`known_shortfall` are taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

import numpy as np
from numpy.typing import NDArray
from scipy import special

FloatArray = NDArray[np.float64]

MOST_UNITS = 10_000_000
"""Above this :func:`needed_units` gives up."""
EXTENSION_LIMIT = 1.5
"""Standard errors by which a skewed interval grows on its long side at most."""
FEW_UNITS = 32
"""Units below which coverage was measured to depend on the kernel more than the kernel shows (``docs/coverage.md``)."""
SKEWNESS_LIMIT = 1.0
"""Absolute sample skewness of the row means above which the interval is known to fall short (``docs/coverage.md``)."""


class IntervalMethod(StrEnum):
    """How an interval of U_cross is made; q is the standard normal's and t that of Student's quantile with U − 1 degrees.

    NORMAL: U_cross ± q SE, SE² = 4 Σ (r_u − U_cross)² / (U(U−1)), the plug-in.
    T: U_cross ± t SE.
    JACKKNIFE_T: U_cross ± t SE (U−1)/(U−2), the delete-one standard error.
    UNBIASED_T: U_cross ± t √V, V the unbiased variance with its floor (:func:`interval_variance`).
    SKEWED_T: the same with Satterthwaite's degrees of freedom, and longer on the side of U_cross's skew (:func:`interval`).

    The last two need the matrix of dots of equal units, the others row means alone.
    """

    NORMAL = "normal"
    T = "t"
    JACKKNIFE_T = "jackknife_t"
    UNBIASED_T = "unbiased_t"
    SKEWED_T = "skewed_t"

    @property
    def needs_matrix(self) -> bool:
        """Whether row means do not tell it."""
        return self in (IntervalMethod.UNBIASED_T, IntervalMethod.SKEWED_T)

    @property
    def described(self) -> str:
        """Quantile and variance, for the report."""
        return {
            IntervalMethod.NORMAL: "normal, plug-in variance",
            IntervalMethod.T: "t, plug-in variance",
            IntervalMethod.JACKKNIFE_T: "t, jackknife variance (conservative)",
            IntervalMethod.UNBIASED_T: "t, unbiased variance",
            IntervalMethod.SKEWED_T: "skewed t, unbiased variance",
        }[self]


DEFAULT_METHOD = IntervalMethod.SKEWED_T
WITHOUT_MATRIX = IntervalMethod.JACKKNIFE_T
"""The default where vectors are streamed or units are of unequal size."""


@dataclass(frozen=True)
class _Summary:
    """h with a zero diagonal [U, U], row means [U], U_cross, plug-in and jackknife variances, V as ``unbiased``, and τ̂²."""

    h: FloatArray
    row_means: FloatArray
    u_cross: float
    plugin: float
    jackknife: float
    unbiased: float
    tau_squared: float

    @property
    def units(self) -> int:
        return len(self.row_means)

    @property
    def linear(self) -> float:
        """4 ζ̂₁/U: V without its degenerate part."""
        return max(0.0, self.unbiased - variance_at(self.units, 0.0, self.tau_squared))


def _summary(kernel: FloatArray) -> _Summary:
    units = len(kernel)
    if kernel.shape != (units, units) or units < 4:
        raise ValueError(f"the kernel has shape {kernel.shape}; an interval needs a square one of 4 units or more")
    h = 0.5 * (kernel + kernel.T)
    np.fill_diagonal(h, 0.0)
    row_means = h.sum(axis=1) / (units - 1)
    u_cross = float(row_means.mean())
    plugin = 4.0 * float(((row_means - u_cross) ** 2).sum()) / (units * (units - 1))
    jackknife = plugin * ((units - 1) / (units - 2)) ** 2
    variance = interval_variance(kernel, u_cross, jackknife)
    tau_squared = _tau_squared(units, unbiased_variance(kernel, u_cross), jackknife)
    return _Summary(h, row_means, u_cross, plugin, jackknife, variance, tau_squared)


def interval(
    kernel: FloatArray,
    method: IntervalMethod = DEFAULT_METHOD,
    *,
    level: float = 0.95,
) -> tuple[float, float]:
    """(low, high) of U_cross in nats per unit of learning rate, from K [U, U] with equal units and U ≥ 4.

    SKEWED_T, with κ the sample excess kurtosis (G₂) of the row means, s = 4 ζ̂₁/U / V the linear part's share of V and γ the
    skewness of U_cross (:func:`_skewness`):

        half width t_ν √V,  ν = 2 (U−1) / (2 + s² max(κ, 0) (U−1)/U), 2 at least
        and on the side of γ's sign further by min(1.5, |γ| (2 t² + 1) / 6) √V,  t with U − 1 degrees

    ν matches the first two moments of the variance estimate of U values with kurtosis κ (Satterthwaite 1946), which the
    linear part alone rests on. The extension is the Edgeworth shift of a studentised mean with skewness γ (Hall 1992). Only the
    side that it lengthens is moved: shortening the other cost more coverage than it gained.

    Args:
        kernel: K / (unit size)², [U, U]; its diagonal is not used.
        method: see :class:`IntervalMethod`.
        level: nominal coverage, in (0, 1).

    Raises:
        ValueError: the kernel is not square or has fewer than 4 units, or the level is not in (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"the level is {level}; expected a number between 0 and 1")
    found = _summary(kernel)
    tail = 0.5 * (1.0 + level)
    match method:
        case IntervalMethod.SKEWED_T:
            return _skewed_t(found, tail)
        case IntervalMethod.NORMAL | IntervalMethod.T:
            variance = found.plugin
        case IntervalMethod.JACKKNIFE_T:
            variance = found.jackknife
        case IntervalMethod.UNBIASED_T:
            variance = found.unbiased
        case unknown:
            assert_never(unknown)
    return symmetric_interval(found.u_cross, math.sqrt(variance), found.units, method, level=level)


def symmetric_interval(
    u_cross: float, error: float, units: int, method: IntervalMethod, *, level: float = 0.95
) -> tuple[float, float]:
    """U_cross ± the method's quantile times its standard error.

    Raises:
        ValueError: SKEWED_T, whose sides are not alike.
    """
    match method:
        case IntervalMethod.NORMAL:
            half_width = float(special.ndtri(0.5 * (1.0 + level))) * error
        case IntervalMethod.T | IntervalMethod.JACKKNIFE_T | IntervalMethod.UNBIASED_T:
            half_width = t_quantile(units, level) * error
        case IntervalMethod.SKEWED_T:
            raise ValueError(f"{method} is not symmetric")
        case unknown:
            assert_never(unknown)
    return u_cross - half_width, u_cross + half_width


def t_quantile(units: int, level: float = 0.95) -> float:
    """Student's quantile with U − 1 degrees of freedom, both sides."""
    return student_quantile(0.5 * (1.0 + level), units - 1)


def student_quantile(probability: float, degrees: float) -> float:
    """Student's quantile with ``degrees`` of freedom; ``scipy.stats`` takes fifty times as long for the same number."""
    return float(special.stdtrit(degrees, probability))


def _skewed_t(found: _Summary, tail: float) -> tuple[float, float]:
    units, error = found.units, math.sqrt(found.unbiased)
    _, kurtosis = row_mean_shape(found.row_means)
    share = found.linear / found.unbiased if found.unbiased > 0.0 else 0.0
    degrees = satterthwaite(units, share**2 * kurtosis)
    skewness = _skewness(found)
    half_width = student_quantile(tail, degrees) * error
    further = skew_extension(skewness, student_quantile(tail, units - 1)) * error
    return (
        found.u_cross - half_width - (further if skewness < 0.0 else 0.0),
        found.u_cross + half_width + (further if skewness > 0.0 else 0.0),
    )


def satterthwaite(count: int, excess_kurtosis: float) -> float:
    """2 (n−1) / (2 + max(κ, 0) (n−1)/n), 2 at least: degrees of freedom of the sample variance of n values (1946)."""
    return max(2.0, 2.0 * (count - 1) / (2.0 + max(excess_kurtosis, 0.0) * (count - 1) / count))


def skew_extension(skewness: float, t: float) -> float:
    """min(1.5, |γ| (2 t² + 1) / 6), in standard errors: how far a studentised mean's quantile t moves with its skewness γ."""
    return min(EXTENSION_LIMIT, abs(skewness) * (2.0 * t**2 + 1.0) / 6.0)


def _skewness(found: _Summary) -> float:
    """γ = [16 m₃/U² + 8 T/U³] / V^{3/2} of U_cross; 0 where V is.

    Third cumulant of U_cross = [8 E g³ + 24 E g_u g_w ψ_uw]/U² + [8 E ψ_uv ψ_vw ψ_wu + 24 E g_u ψ_uw²]/U³ + o(1/U³); its last
    term is left out. m₃ = G₁ m₂^{3/2} of the row means stands for E g³ and T, the mean of ψ̂_uv ψ̂_vw ψ̂_wu over distinct units
    with ψ̂_uw = h_uw − r_u − r_w + U_cross, for the third. The second term is taken to be as large as the first: estimating it
    cost more coverage than it gained.
    """
    if not found.unbiased > 0.0:
        return 0.0
    units, spread = found.units, found.row_means - found.u_cross
    third = row_mean_shape(found.row_means)[0] * float((spread**2).mean()) ** 1.5
    psi = found.h - spread[:, None] - spread[None, :] - found.u_cross
    np.fill_diagonal(psi, 0.0)
    triangles = float((psi @ psi * psi).sum()) / (units * (units - 1) * (units - 2))
    return float((16.0 * third / units**2 + 8.0 * triangles / units**3) / found.unbiased**1.5)


def row_mean_shape(row_means: FloatArray) -> tuple[float, float]:
    """Sample skewness G₁ and excess kurtosis G₂ of the row means, 0 where they are all alike; U ≥ 4."""
    units = len(row_means)
    spread = row_means - row_means.mean()
    second = float((spread**2).mean())
    if second <= 1e-24 * float((row_means**2).mean()):
        return 0.0, 0.0
    scaled = spread / math.sqrt(second)
    skewness = float((scaled**3).mean()) * math.sqrt(units * (units - 1)) / (units - 2)
    excess = float((scaled**4).mean()) - 3.0
    return skewness, (units - 1) / ((units - 2) * (units - 3)) * ((units + 1) * excess + 6.0)


def unbiased_variance(kernel: FloatArray, u_cross: float) -> float:
    """V_unb, unbiased for Var U_cross with equal units, U ≥ 4; it can be negative.

    With h = (K + Kᵀ)/2 and a zero diagonal, S₁ = Σh, S₂ = Σ (row sums)², S₃ = Σh²:
    V_unb = U_cross² − (S₁² − 4 S₂ + 2 S₃) / [U(U−1)(U−2)(U−3)]. The bracket sums h_ij h_kl over distinct i, j, k, l, whose
    mean is (E U_cross)².
    """
    units = len(kernel)
    h = 0.5 * (kernel + kernel.T)
    np.fill_diagonal(h, 0.0)
    s1, s2, s3 = h.sum(), (h.sum(axis=1) ** 2).sum(), (h**2).sum()
    return float(u_cross**2 - (s1**2 - 4.0 * s2 + 2.0 * s3) / (units * (units - 1) * (units - 2) * (units - 3)))


def interval_variance(kernel: FloatArray, u_cross: float, variance_jackknife: float) -> float:
    """V = max(V_unb, 2 τ̂² / (U(U−1))) with τ̂² = max(0, (V_jack − V_unb) / [4/(U(U−2)) − 2/(U(U−1))]); U ≥ 4.

    Var U = 4 ζ₁/U + 2 τ²/(U(U−1)); the jackknife doubles the second, degenerate part, so its excess over V_unb estimates
    τ². The floor keeps V from falling below the degenerate part alone where V_unb is small or negative.
    """
    unbiased = unbiased_variance(kernel, u_cross)
    return max(unbiased, variance_at(len(kernel), 0.0, _tau_squared(len(kernel), unbiased, variance_jackknife)))


def _tau_squared(units: int, unbiased: float, jackknife: float) -> float:
    """τ̂², from the jackknife's double counting of it."""
    return max(0.0, (jackknife - unbiased) / (4.0 / (units * (units - 2)) - 2.0 / (units * (units - 1))))


def variance_parts(kernel: FloatArray, u_cross: float) -> tuple[float, float]:
    """(ζ̂₁, τ̂²) ≥ 0 such that 4 ζ̂₁/U + 2 τ̂²/(U(U−1)) is the V that the interval rests on, (nats per unit of learning rate)².

    τ̂² is that of :func:`interval_variance`, and ζ̂₁ = U (V − 2 τ̂²/(U(U−1))) / 4: zero where V is its floor. Source: design
    section 4; Hoeffding (1948).

    Args:
        kernel: K / (unit size)², [U, U], U ≥ 4.
        u_cross: mean of its entries off the diagonal.

    Raises:
        ValueError: the kernel is not square or has fewer than 4 units.
    """
    found = _summary(kernel)
    return found.units * found.linear / 4.0, found.tau_squared


def variance_at(units: int, zeta1: float, tau_squared: float) -> float:
    """V(U) = 4 ζ₁/U + 2 τ²/(U(U−1)), (nats per unit of learning rate)²; U ≥ 2 (Hoeffding 1948)."""
    return 4.0 * zeta1 / units + 2.0 * tau_squared / (units * (units - 1))


def needed_units(
    u_cross: float,
    zeta1: float,
    tau_squared: float,
    *,
    exclude_zero: bool = False,
    target_se: float | None = None,
    level: float = 0.95,
) -> int | None:
    """The smallest U ≥ 4 that would do, if further units are like these: the same U_cross, ζ₁, τ² and responses a prompt.

    With ``exclude_zero`` the smallest U with t_{U−1} √V(U) < |u_cross|; with ``target_se`` that with √V(U) ≤ target_se;
    V(U) of :func:`variance_at`. An estimate, as good as u_cross and both parts are: a u_cross of one standard error may be
    nothing. It counts the symmetric interval; the default one is a little longer on one side. Intervals begin at U = 4.

    Args:
        u_cross: nats per unit of learning rate.
        zeta1: linear part, of :func:`variance_parts`.
        tau_squared: degenerate part.
        exclude_zero: ask for an interval without zero; exactly one of this and ``target_se``.
        target_se: standard error to reach, in the unit of u_cross, above 0.
        level: of the interval.

    Returns:
        Units, or None: u_cross is zero, or more than ``MOST_UNITS`` would be needed.

    Raises:
        ValueError: neither or both questions, or a target that is not above 0.
    """
    if exclude_zero is (target_se is not None):
        raise ValueError("ask for exactly one of exclude_zero and target_se")
    if target_se is not None and not target_se > 0.0:
        raise ValueError(f"the target standard error is {target_se}; expected a number above 0")

    def does(units: int) -> bool:
        error = math.sqrt(variance_at(units, zeta1, tau_squared))
        if target_se is not None:
            return error <= target_se
        return t_quantile(units, level) * error < abs(u_cross)

    # Both t and V fall with U, so the question has one threshold.
    low, high = 3, 4
    while not does(high):
        if high >= MOST_UNITS:
            return None
        low, high = high, min(2 * high, MOST_UNITS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if does(middle) else (middle, high)
    return high


def known_shortfall(kernel: FloatArray) -> str | None:
    """What is known to make the default interval cover less than it says, or None.

    Fewer than ``FEW_UNITS`` units, where the kernels that miss do not look different from the others, or row means whose
    absolute sample skewness G₁ is above ``SKEWNESS_LIMIT``: a few units carry the mean, and the like of them that this batch
    may lack are not in its spread. ``docs/coverage.md`` has coverage, that of the kernels of which nothing is said, and how
    often something is.

    Args:
        kernel: K / (unit size)², [U, U], U ≥ 4.

    Raises:
        ValueError: the kernel is not square or has fewer than 4 units.
    """
    found = _summary(kernel)
    skewness, _ = row_mean_shape(found.row_means)
    if abs(skewness) > SKEWNESS_LIMIT:
        return (
            f"the row means of {found.units} units have skewness {skewness:.1f}, beyond ±{SKEWNESS_LIMIT:.1f}: a few units "
            "carry the mean, and intervals of such kernels were measured to cover less than they say"
        )
    if found.units < FEW_UNITS:
        return (
            f"{found.units} units, fewer than {FEW_UNITS}: where a few kinds of prompts carry the mean, the 95 % interval was "
            "measured to cover less"
        )
    return None
