"""The first-order entropy change of the optimizer's own step, part by part, from dots of unit vectors.

With E[X] = −∇H, a direction Δ that does not depend on unit u's responses changes the entropy by −XS_u · Δ / s_u in unit u's
eyes, and the mean over prompts estimates ∇H · Δ. But every part of the step depends on Ȳ, which holds u's own Y: the fresh
gradient's in proportion, the others through v⁺. So each is taken as it would be from the other units' mean Ȳ_−u, to first
order, with J = ∂Δ/∂Ȳ elementwise and Ȳ_−u − Ȳ = (s_u Ȳ − YS_u) / (B − s_u), B = Σ s_u:

    row_u = −XS_u · [Δ + J (s_u Ȳ − YS_u) / (B − s_u)] / s_u

For Δ = W Ȳ that is −XS_u · W (ΣYS − YS_u) / (s_u (B − s_u)) exactly, the row x_u of the U-statistic, and its rows are averaged
as there, by ω_u; those of momentum and weight decay by s_u / B. (Clipping's factor is held: it is of the whole batch.)

Errors are those of what *this* step does, given the update: SE² = U/(U−1) Σ_u (Σ_k a_k d_uk)² for a combination a of the parts,
d_uk being a unit's share in part k less that of the mean, so that parts which share X are not taken for independent; and
a_gradient² times the noise that X_u and Y_u share through their responses
(:func:`~entropy_probe.u_statistics.this_step_variance`), where the matrix is there. Everything in nats.
Source: design sections 1 and 2; guide section 4A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from entropy_probe.intervals import t_quantile
from entropy_probe.u_statistics import CrossStatistics, FloatArray

PARTS = ("momentum", "gradient", "weight_decay")
LEAST_UNITS = 3
TOO_FEW = "two units tell nothing of their spread; give three units or more"


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, nats; None where there are too few units."""

    value: float
    se: float | None

    def scaled(self, factor: float) -> Estimate:
        """Of ``factor`` times the same."""
        return Estimate(factor * self.value + 0.0, None if self.se is None else abs(factor) * self.se)


@dataclass(frozen=True)
class StepPrediction:
    """What each of ``PARTS`` does to the entropy, to first order.

    Attributes:
        values: with v after this gradient, as the step has it, [3].
        values_v_at_t: with v at t, as δH₁ has it, [3].
        deviations: d_uk, [U, 3].
        shared_noise: variance of the gradient's part beyond its rows', nats².
    """

    values: FloatArray
    values_v_at_t: FloatArray
    deviations: FloatArray
    shared_noise: float

    def of(self, momentum: float = 0.0, gradient: float = 0.0, weight_decay: float = 0.0) -> Estimate:
        """Of a combination of the parts."""
        factors = np.array([momentum, gradient, weight_decay])
        value = float(factors @ self.values) + 0.0
        units = len(self.deviations)
        if units < LEAST_UNITS:
            return Estimate(value, None)
        rows = float(((self.deviations @ factors) ** 2).sum()) * units / (units - 1)
        return Estimate(value, math.sqrt(rows + gradient**2 * self.shared_noise))

    @property
    def parts(self) -> dict[str, Estimate]:
        """Each of them alone."""
        return {name: self.of(**{name: 1.0}) for name in PARTS}

    @property
    def total(self) -> Estimate:
        """The whole step."""
        return self.of(1.0, 1.0, 1.0)

    def is_resolved(self, estimate: Estimate) -> bool:
        """Whether its 95 % interval excludes zero."""
        return estimate.se is not None and abs(estimate.value) > t_quantile(len(self.deviations)) * estimate.se

    def most(self) -> str | None:
        """The part that is more than half of the total, where the errors can tell that; else None."""
        total = self.total
        if not self.is_resolved(total):
            return None
        for name in PARTS:
            excess = self.of(**{part: float(part == name) - 0.5 for part in PARTS})
            if excess.value * total.value > 0 and self.is_resolved(excess):
                return name
        return None


def predict_parts(
    along: FloatArray, own: FloatArray, sizes: Sequence[int], gradient: CrossStatistics | None
) -> StepPrediction:
    """From the dots that :class:`~entropy_probe.adam_step.StepDirections` asks for; two units or more.

    Args:
        along: XS_u along momentum, fresh gradient and weight decay with v at t + 1, the same with v at t, and J Ȳ of the first
            three, [U, 9].
        own: XS_u · J YS_u of the first three, and of the fresh gradient with v at t, [U, 4].
        sizes: s_u.
        gradient: statistics of the fresh gradient's part with v at t, in which it is −U_cross; None where not told apart.
    """
    counts = np.asarray(sizes, dtype=np.float64)[:, None]
    others = counts.sum() - counts
    pairs = counts * others
    shares = np.hstack([counts, pairs, counts]) / np.array([counts.sum(), pairs.sum(), counts.sum()])
    updated = -(along[:, :3] + (counts * along[:, 6:] - own[:, :3]) / others) / counts
    # With v at t the fresh gradient alone holds this batch, and J Ȳ is its part.
    at_t = -along[:, 3:6] / counts
    at_t[:, 1:2] -= (counts * along[:, 4:5] - own[:, 3:]) / pairs
    values = (shares * updated).sum(0)
    noise = 0.0
    if gradient is not None and gradient.se_this_step is not None:
        units = len(sizes)
        of_rows = float(((gradient.row_x - gradient.u_cross) ** 2).sum()) / (units * (units - 1))
        noise = max(0.0, gradient.se_this_step**2 - of_rows)
    return StepPrediction(values, (shares * at_t).sum(0), shares * (updated - values), noise)
