"""The cross-prompt U-statistic and its uncertainty, from dots of unit vectors alone.

A unit u holds s_u prompts; XS_u and YS_u are its sums of X̃_n and Ỹ_n, and K_uw = XS_u · YS_w. With B = Σ s_u,
D = B² − Σ s_u² and ω_u = s_u (B − s_u) / D:

    U_cross = Σ_{u≠w} K_uw / D            r_u = ½ (x_u + y_u),  Σ_u ω_u r_u = U_cross
    x_u = XS_u · (ΣYS − YS_u) / (s_u (B − s_u))      y_u = YS_u · (ΣXS − XS_u) / (s_u (B − s_u))
    SE² = 4 U/(U−1) Σ_u ω_u² (r_u − U_cross)²        ζ̂₁ = U SE² / 4                              (plug-in)
    U_−u = (D U_cross − 2 s_u (B − s_u) r_u) / (D − 2 s_u (B − s_u)),  var = (U−1)/U Σ (U_−u − mean)²   (jackknife)

Leaving out u = w makes U_cross unbiased: E[X̃_n · Ỹ_m] = E[X̃] · E[Ỹ] for independent prompts n ≠ m. Everything is
float64; units of measure are nats per unit of learning rate. Sources: docs/method.md, sections 3, 5 and 9;
Hoeffding (1948) for ζ₁; :mod:`~entropy_probe.statistics.intervals` for the interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from entropy_probe.common.arrays import FloatArray
from entropy_probe.statistics import intervals


@dataclass(frozen=True)
class UnitDots:
    """Every dot product that the statistics need, over U units.

    Attributes:
        sizes: s_u, prompts in each unit, [U].
        x_dot_sum: XS_u · ΣYS, [U].
        y_dot_sum: YS_u · ΣXS, [U].
        diagonal: XS_u · YS_u, [U].
        sum_dot: ΣXS · ΣYS, accumulated from the sums and not from the unit dots: the self-test's second opinion.
        kernel: K_uw = XS_u · YS_w, [U, U], or None where the vectors were streamed.
    """

    sizes: NDArray[np.int64]
    x_dot_sum: FloatArray
    y_dot_sum: FloatArray
    diagonal: FloatArray
    sum_dot: float
    kernel: FloatArray | None

    @staticmethod
    def from_kernel(kernel: FloatArray, sizes: Sequence[int], sum_dot: float | None = None) -> UnitDots:
        """The dots that the U × U matrix K_uw = XS_u · YS_w implies."""
        matrix = np.asarray(kernel, dtype=np.float64)
        return UnitDots(
            sizes=np.asarray(sizes, dtype=np.int64),
            x_dot_sum=matrix.sum(axis=1),
            y_dot_sum=matrix.sum(axis=0),
            diagonal=np.diagonal(matrix).copy(),
            sum_dot=float(matrix.sum()) if sum_dot is None else sum_dot,
            kernel=matrix,
        )

    @staticmethod
    def streamed(
        sizes: Sequence[int],
        x_dot_sum: Sequence[float],
        y_dot_sum: Sequence[float],
        diagonal: Sequence[float],
        sum_dot: float,
    ) -> UnitDots:
        """The dots that two streamed passes collect, without the matrix."""
        return UnitDots(
            np.asarray(sizes, dtype=np.int64),
            np.asarray(x_dot_sum, dtype=np.float64),
            np.asarray(y_dot_sum, dtype=np.float64),
            np.asarray(diagonal, dtype=np.float64),
            sum_dot,
            None,
        )

    def scaled(self, factor: float) -> UnitDots:
        """The same dots under an inner product ``factor`` times as large."""
        return UnitDots(
            self.sizes,
            self.x_dot_sum * factor,
            self.y_dot_sum * factor,
            self.diagonal * factor,
            self.sum_dot * factor,
            None if self.kernel is None else self.kernel * factor,
        )

    def __add__(self, other: UnitDots) -> UnitDots:
        """The dots over both of two disjoint sets of parameters."""
        return UnitDots(
            self.sizes,
            self.x_dot_sum + other.x_dot_sum,
            self.y_dot_sum + other.y_dot_sum,
            self.diagonal + other.diagonal,
            self.sum_dot + other.sum_dot,
            None if self.kernel is None or other.kernel is None else self.kernel + other.kernel,
        )


@dataclass(frozen=True)
class CrossStatistics:
    """U_cross with its uncertainty. A None has its reason in ``null_reasons`` under the field's name.

    ``row_x`` says how a unit's entropy answers to the others' update, ``row_y`` how a unit's update moves the others'
    entropy (positive: lowers it). ``se_plugin_guide`` is the guide's own formula, which estimates the standard deviation
    of r and does not shrink with U. ``se_this_step`` is the error of what *this* update does. ``variance`` is V of design
    section 4 where the kernel is there and units are equal, else the jackknife's; ``ci95`` is of the asked method, or by
    default :func:`intervals.interval` there, else U_cross ± t √V. ``parts`` are ζ₁ and τ² with V = 4 ζ₁/U + 2 τ²/(U(U−1));
    None without the kernel. ``shortfall`` says why the default method's interval is known to cover less than it says, where it
    is.
    """

    u_cross: float
    bars_dot: float
    diag_sum: float
    row_means: FloatArray
    row_x: FloatArray
    row_y: FloatArray
    zeta1_plugin: float | None
    zeta1_jackknife: float | None
    se_plugin: float | None
    se_jackknife: float | None
    se_plugin_guide: float | None
    se_this_step: float | None
    variance: float | None
    interval_method: str | None
    ci95: tuple[float, float] | None
    parts: tuple[float, float] | None
    shortfall: str | None
    self_test_residual: float
    null_reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def ci95_of_minus(self) -> tuple[float, float] | None:
        """The interval of −U_cross: in the η-weighted inner product that of δH₁. (+ 0.0 turns −0.0 into 0.0.)"""
        return None if self.ci95 is None else (-self.ci95[1] + 0.0, -self.ci95[0] + 0.0)

    @property
    def se(self) -> float | None:
        """√V, the standard error behind the interval."""
        return None if self.variance is None else math.sqrt(self.variance)


def cross_statistics(dots: UnitDots, interval: intervals.IntervalMethod | None = None) -> CrossStatistics:
    """U_cross, row means, standard errors and interval from unit dots; at least two units.

    At U = 2 both r are equal and every standard error is null; below U = 4 the interval is.

    Args:
        dots: of the units.
        interval: how ``ci95`` is made; None takes the default. One that needs the matrix of equal units must have it.
    """
    sizes = dots.sizes.astype(np.float64)
    units = len(sizes)
    assert units >= 2, "the caller refuses fewer than two units"
    prompts = sizes.sum()
    pairs = prompts**2 - (sizes**2).sum()
    partners = sizes * (prompts - sizes)
    row_x = (dots.x_dot_sum - dots.diagonal) / partners
    row_y = (dots.y_dot_sum - dots.diagonal) / partners
    row_means = 0.5 * (row_x + row_y)
    omega = partners / pairs
    u_cross = float((omega * row_means).sum())
    equal = bool((sizes == sizes[0]).all())

    reasons: dict[str, str] = {}
    zeta1_plugin = zeta1_jackknife = se_plugin = se_guide = se_jackknife = None
    if units == 2:
        why = "two units have equal row means, so their spread tells nothing; give three units or more"
        names = ("zeta1_plugin", "zeta1_jackknife", "se_plugin", "se_jackknife", "se_plugin_guide", "se_this_step")
        reasons.update(dict.fromkeys(names, why))
    else:
        spread = row_means - u_cross
        se_plugin = math.sqrt(4.0 * units / (units - 1) * float((omega**2 * spread**2).sum()))
        zeta1_plugin = units * se_plugin**2 / 4.0
        se_guide = math.sqrt(float(((row_means - row_means.mean()) ** 2).sum()) / (units - 1))
        variance_jackknife = jackknife_variance(u_cross, row_means, sizes)
        se_jackknife = math.sqrt(variance_jackknife)
        zeta1_jackknife = units * variance_jackknife / 4.0

    normalised = None if dots.kernel is None or not equal else dots.kernel / sizes[0] ** 2
    se_this_step = None
    if units == 2:
        pass  # null, with the reason above
    elif dots.kernel is None:
        reasons["se_this_step"] = "needs the matrix of unit dots, which streaming does not keep"
    elif normalised is None:
        reasons["se_this_step"] = "defined for units of equal size"
    else:
        se_this_step = math.sqrt(this_step_variance(normalised, row_x, row_y, u_cross))

    variance: float | None = None
    method: str | None = None
    ci95: tuple[float, float] | None = None
    parts: tuple[float, float] | None = None
    shortfall: str | None = None
    if units < 4:
        why = f"{units} units; the interval needs at least 4"
        reasons.update(dict.fromkeys(("variance", "interval_method", "ci95"), why))
    elif normalised is not None:
        parts = intervals.variance_parts(normalised, u_cross)
        variance = intervals.variance_at(units, *parts)
        shortfall = intervals.known_shortfall(normalised)
    else:
        assert se_jackknife is not None
        variance = se_jackknife**2
    if units >= 4:
        assert se_jackknife is not None
        assert se_plugin is not None
        chosen = interval or (intervals.WITHOUT_MATRIX if normalised is None else intervals.DEFAULT_METHOD)
        method = chosen.described
        if chosen.needs_matrix:
            assert normalised is not None, "the caller refuses a method without its matrix"
            ci95 = intervals.interval(normalised, chosen)
        else:
            error = se_jackknife if chosen is intervals.IntervalMethod.JACKKNIFE_T else se_plugin
            ci95 = intervals.symmetric_interval(u_cross, error, units, chosen)
        if shortfall is not None and chosen is not intervals.DEFAULT_METHOD:
            shortfall += f" (known of the default method, {intervals.DEFAULT_METHOD.described}; this is {method})"

    return CrossStatistics(
        u_cross=u_cross,
        bars_dot=dots.sum_dot / prompts**2,
        diag_sum=float(dots.diagonal.sum()) * (units / prompts) ** 2,
        row_means=row_means,
        row_x=row_x,
        row_y=row_y,
        zeta1_plugin=zeta1_plugin,
        zeta1_jackknife=zeta1_jackknife,
        se_plugin=se_plugin,
        se_jackknife=se_jackknife,
        se_plugin_guide=se_guide,
        se_this_step=se_this_step,
        variance=variance,
        interval_method=method,
        ci95=ci95,
        parts=parts,
        shortfall=shortfall,
        self_test_residual=self_test_residual(dots, u_cross, pairs),
        null_reasons=reasons,
    )


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


def this_step_variance(kernel: FloatArray, row_x: FloatArray, row_y: FloatArray, u_cross: float) -> float:
    """Variance of what *this* step does, given its update; equal units, clipped at 0.

    Σ (x_u − U)² / (U(U−1)) is X's noise against the fixed update, to which :func:`shared_noise` comes.
    """
    units = len(kernel)
    of_rows = float(((row_x - u_cross) ** 2).sum()) / (units * (units - 1))
    return max(0.0, of_rows + shared_noise(kernel, row_x, row_y, u_cross))


def shared_noise(kernel: FloatArray, row_x: FloatArray, row_y: FloatArray, u_cross: float) -> float:
    """Σ_{u≠w} k̃_uw k̃_wu / (U(U−1))², k̃ doubly centred: the noise that X_u and Y_u share through their responses.

    Of equal units; it may be negative.
    """
    pairs = len(kernel) * (len(kernel) - 1)
    centred = kernel - row_x[:, None] - row_y[None, :] + u_cross
    np.fill_diagonal(centred, 0.0)
    return float((centred * centred.T).sum()) / pairs**2


def self_test_residual(dots: UnitDots, u_cross: float, pairs: float) -> float:
    """How far two roads to the same numbers lie apart, relative to the size of the terms; rounding alone if all is well.

    ΣXS · ΣYS accumulated from the sums against Σ_u XS_u · ΣYS from the unit dots, and D U_cross against
    ΣXS · ΣYS − Σ diagonal, which is the guide's (U/(U−1)) bars − diagonal form.
    """
    scale = 0.5 * float(np.abs(dots.x_dot_sum).sum() + np.abs(dots.y_dot_sum).sum())
    if scale == 0.0:
        return abs(dots.sum_dot)
    gaps = (
        dots.sum_dot - dots.x_dot_sum.sum(),
        dots.sum_dot - dots.y_dot_sum.sum(),
        dots.sum_dot - dots.diagonal.sum() - pairs * u_cross,
    )
    return float(max(abs(gap) for gap in gaps)) / scale
