"""The cross-prompt U-statistic and its uncertainty, from dots of unit vectors alone.

A unit u holds s_u prompts; XS_u and YS_u are its sums of X̃_n and Ỹ_n, and K_uw = XS_u · YS_w. With B = Σ s_u,
D = B² − Σ s_u² and ω_u = s_u (B − s_u) / D:

    U_cross = Σ_{u≠w} K_uw / D            r_u = ½ (x_u + y_u),  Σ_u ω_u r_u = U_cross
    x_u = XS_u · (ΣYS − YS_u) / (s_u (B − s_u))      y_u = YS_u · (ΣXS − XS_u) / (s_u (B − s_u))
    SE² = 4 U/(U−1) Σ_u ω_u² (r_u − U_cross)²        ζ̂₁ = U SE² / 4                              (plug-in)

Where X carry the weights of responses of another policy, x_u, and with it r_u and K, loses what their common mean ties
(:mod:`~entropy_probe.statistics.tied_units`), which leaves U_cross as it is.

Leaving out u = w makes U_cross unbiased: E[X̃_n · Ỹ_m] = E[X̃] · E[Ỹ] for independent prompts n ≠ m. Everything is
float64; units of measure are nats per unit of learning rate. The other errors have files of their own: ``jackknife``,
``this_step``, ``variance`` and ``intervals``. Sources: docs/method.md, sections 3, 5 and 9; Hoeffding (1948) for ζ₁.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from entropy_probe.common.arrays import FloatArray
from entropy_probe.statistics.estimate import Estimate
from entropy_probe.statistics.intervals import DEFAULT_METHOD, WITHOUT_MATRIX, Interval, Spread
from entropy_probe.statistics.jackknife import jackknife_variance
from entropy_probe.statistics.shortfall import known_shortfall
from entropy_probe.statistics.this_step import this_step_variance
from entropy_probe.statistics.tied_units import tied_by_weights, tied_kernel
from entropy_probe.statistics.unit_dots import UnitDots
from entropy_probe.statistics.variance import decompose, variance_at


@dataclass(frozen=True)
class CrossStatistics:
    """U_cross with its uncertainty. A None has its reason in ``null_reasons`` under the field's name.

    ``row_x`` says how a unit's entropy answers to the others' update, ``row_y`` how a unit's update moves the others'
    entropy (positive: lowers it). ``se_plugin_guide`` is the guide's own formula, which estimates the standard deviation
    of r and does not shrink with U. ``se_this_step`` is the error of what *this* update does. ``variance`` is V of
    :func:`~entropy_probe.statistics.variance.interval_variance` where the kernel is there and units are equal, else the
    jackknife's; ``ci95`` is by the method that ``interval_method`` describes. ``parts`` are ζ₁ and τ² with
    V = 4 ζ₁/U + 2 τ²/(U(U−1)); None without the kernel. ``shortfall`` says why the default method's interval is known to
    cover less than it says, where it is.
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
    def se(self) -> float | None:
        """√V, the standard error behind the interval."""
        return None if self.variance is None else math.sqrt(self.variance)

    @property
    def negated(self) -> Estimate:
        """−U_cross: in the η-weighted inner product, δH₁ in nats."""
        return Estimate(self.u_cross, self.se, self.ci95, self.null_reasons.get("ci95", "")).scaled(-1.0)


def cross_statistics(
    dots: UnitDots, interval: Interval | None = None, weights: FloatArray | None = None
) -> CrossStatistics:
    """U_cross, row means, standard errors and interval from unit dots; at least two units.

    At U = 2 both r are equal and every standard error is null; below U = 4 the interval is.

    Args:
        dots: of the units.
        interval: how ``ci95`` is made, such as a member of :class:`~entropy_probe.statistics.intervals.IntervalMethod`; None
            takes the default. One that needs the matrix of equal units must have it.
        weights: W_u / W̄, mean weight of a unit's prompts over that of all, [U], where X carry 1/W̄; None where they do not.
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
    ties = None if weights is None else tied_by_weights(u_cross, weights, sizes)
    if ties is not None:
        row_x = row_x - ties
        row_means = 0.5 * (row_x + row_y)
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
    if normalised is not None and ties is not None and units > 2:
        normalised = tied_kernel(normalised, ties)
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
    else:
        assert se_plugin is not None
        assert se_jackknife is not None
        matrix = None if normalised is None else decompose(normalised)
        variance = se_jackknife**2
        if matrix is not None:
            parts = matrix.parts
            variance = variance_at(units, *parts)
            shortfall = known_shortfall(matrix.row_means)
        chosen = interval or (WITHOUT_MATRIX if matrix is None else DEFAULT_METHOD)
        method = chosen.described
        ci95 = chosen.of(Spread(u_cross, row_means, se_plugin, se_jackknife, matrix), 0.95)
        if shortfall is not None and chosen is not DEFAULT_METHOD:
            shortfall += f" (known of the default method, {DEFAULT_METHOD.described}; this is {method})"

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
