"""The first-order entropy change of the optimizer's own step, part by part, from dots of unit vectors.

With E[X] = −∇H, a direction Δ that does not depend on unit u's responses changes the entropy by −XS_u · Δ / s_u in unit u's
eyes, and the mean over prompts estimates ∇H · Δ. But every part of the step depends on Ȳ, which holds u's own Y: the fresh
gradient's at once, the others through v⁺. So each is taken as it would be from the other units' mean,

    row_u = −XS_u · Δ(Ȳ_−u) / s_u       Ȳ_−u = (B Ȳ − YS_u) / (B − s_u), B = Σ s_u

elementwise and exactly (to first order in Y_u it would keep much of the own update where g² is most of v⁺). For Δ = W Ȳ that is
the row x_u of the U-statistic, and its rows are averaged as there, by ω_u; those of momentum and weight decay by s_u / B.
(Clipping's factor is held: it is of the whole batch.)

Errors are those of what *this* step does, given the update: SE² = U/(U−1) Σ_u (Σ_k a_k d_uk)² for a combination a of the parts,
d_uk being a unit's share in part k less that of the mean, so that parts which share X are not taken for independent; and
a_gradient² times the noise that X_u and Y_u share through their responses
(:func:`~entropy_probe.statistics.this_step.shared_noise` of XS_u · J YS_w, J = ∂Δ/∂Ȳ of the gradient's part), the sum
clipped at 0. Without that matrix, or with unequal units, a combination that holds the gradient has no error.

Where the loss has several terms, Ȳ = Σ_k Ȳᵏ (the reward's, a KL term's, a bonus'), the gradient's part W(Ȳ) Ȳ is the sum of
W(Ȳ) Ȳᵏ: one v⁺ of all terms. A term's share has the rows −XS_u · W(Ȳ_−u) Ȳᵏ_−u / s_u, so that shares add up to the part. Its
error is made as the part's, with the matrix XS_u · (W YᵏS_w + ∂W/∂Ȳ Ȳᵏ YS_w): how the share answers to unit w's responses
through its own Ȳᵏ and through v⁺. The reward's rows and matrix are the part's less those of the others. Everything in nats.
Source: docs/method.md, section 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from entropy_probe.common.arrays import FloatArray
from entropy_probe.statistics.estimate import Estimate
from entropy_probe.statistics.quantiles import t_quantile
from entropy_probe.statistics.this_step import shared_noise

PARTS = ("momentum", "gradient", "weight_decay")
"""What an AdamW step is the sum of."""
REWARD = "reward"
"""The term of the loss that is left when the others are taken out."""
LEAST_UNITS = 3
"""Units below which their spread is not known."""
TOO_FEW = "two units tell nothing of their spread; give three units or more"


@dataclass(frozen=True)
class TermShare:
    """What a term of the loss does to the entropy within the gradient's part, nats; ``v_at_t`` with v before this gradient."""

    estimate: Estimate
    v_at_t: float


@dataclass(frozen=True)
class StepPrediction:
    """What each of ``PARTS`` does to the entropy, to first order.

    Attributes:
        values: with v after this gradient, as the step has it, [3].
        values_v_at_t: with v at t, as δH₁ has it, [3].
        deviations: d_uk, [U, 3].
        shared_noise: variance of the gradient's part beyond its rows', nats²; None where it is not known.
        why_not: why it is not.
        terms: shares of the gradient's part by term of the loss, which add up to it; empty where the loss has one term alone.
    """

    values: FloatArray
    values_v_at_t: FloatArray
    deviations: FloatArray
    shared_noise: float | None
    why_not: str
    terms: Mapping[str, TermShare] = field(default_factory=dict)

    def of(self, momentum: float = 0.0, gradient: float = 0.0, weight_decay: float = 0.0) -> Estimate:
        """What a combination of the parts does, nats; its 95 % interval is value ± t SE, t with U − 1 degrees of freedom."""
        factors = np.array([momentum, gradient, weight_decay])
        noise = 0.0 if gradient == 0.0 else None if self.shared_noise is None else gradient**2 * self.shared_noise
        return _estimate(float(factors @ self.values) + 0.0, self.deviations @ factors, noise, self.why_not)

    @property
    def parts(self) -> dict[str, Estimate]:
        """Each of them alone."""
        return {name: self.of(**{name: 1.0}) for name in PARTS}

    @property
    def total(self) -> Estimate:
        """The whole step."""
        return self.of(1.0, 1.0, 1.0)

    def most(self) -> str | None:
        """The part that is more than half of the total, where the errors can tell that; else None."""
        total = self.total
        if not total.excludes_zero:
            return None
        for name in PARTS:
            excess = self.of(**{part: float(part == name) - 0.5 for part in PARTS})
            if excess.value * total.value > 0 and excess.excludes_zero:
                return name
        return None


def predict_parts(
    along: FloatArray,
    kernel: FloatArray | None,
    sizes: Sequence[int],
    terms: Sequence[str] = (),
    term_kernels: FloatArray | None = None,
    weights: FloatArray | None = None,
) -> StepPrediction:
    """From the dots of :class:`~entropy_probe.optimizers.steps_of_others.StepsOfOthers`; two units or more.

    Args:
        along: XS_u along momentum, fresh gradient and weight decay of Ȳ_−u with v at t + 1, and the same with v at t; then
            along the shares of ``terms`` with v at t + 1, and with v at t: [U, 6 + 2 terms].
        kernel: XS_u · J YS_w, [U, U]; None where vectors were streamed.
        sizes: s_u.
        terms: names of the terms of the loss beside the reward's.
        term_kernels: XS_u · (W YᵏS_w + ∂W/∂Ȳ Ȳᵏ YS_w) of each, [terms, U, U]; None where vectors were streamed.
        weights: W_u / W̄, where X carry 1/W̄ (:mod:`~entropy_probe.statistics.tied_units`), [U]; None where they do not.
    """
    counts = np.asarray(sizes, dtype=np.float64)[:, None]
    pairs = counts * (counts.sum() - counts)
    shares = np.hstack([counts, pairs, counts]) / np.array([counts.sum(), pairs.sum(), counts.sum()])
    rows = -along / counts
    updated, at_t = rows[:, :3], rows[:, 3:6]
    values = (shares * updated).sum(0)
    noise, why_not = _shared(kernel, counts)
    # What a unit does to W̄, by which all rows are divided.
    tied = np.zeros_like(counts) if weights is None else counts / counts.sum() * (weights[:, None] - 1.0)
    found: dict[str, TermShare] = {}
    if terms:
        of_terms, terms_at_t = np.split(rows[:, 6:], 2, axis=1)
        names = (REWARD, *terms)
        # The reward's is what is left of the gradient's part.
        left = (updated[:, 1] - of_terms.sum(1), at_t[:, 1] - terms_at_t.sum(1))
        matrices: list[FloatArray | None] = [None] * len(names)
        if kernel is not None and term_kernels is not None:
            matrices = [kernel - term_kernels.sum(0), *term_kernels]
        for k, (name, matrix) in enumerate(zip(names, matrices, strict=True)):
            own, own_at_t = left if k == 0 else (of_terms[:, k - 1], terms_at_t[:, k - 1])
            value = float(shares[:, 1] @ own)
            deviations = shares[:, 1] * (own - value) - value * tied[:, 0]
            estimate = _estimate(value + 0.0, deviations, _shared(matrix, counts)[0], why_not)
            found[name] = TermShare(estimate, float(shares[:, 1] @ own_at_t) + 0.0)
    deviations = shares * (updated - values) - values * tied
    return StepPrediction(values, (shares * at_t).sum(0), deviations, noise, why_not, found)


def _estimate(value: float, deviations: FloatArray, noise: float | None, why_not: str) -> Estimate:
    """value ± t SE from the units' deviations [U] and the noise beyond theirs, None where that is not known."""
    units = len(deviations)
    if units < LEAST_UNITS:
        return Estimate(value, why_not=TOO_FEW)
    if noise is None:
        return Estimate(value, why_not=why_not)
    variance = float((deviations**2).sum()) * units / (units - 1) + noise
    return Estimate.from_variance(value, variance, t_quantile(units))


def _shared(kernel: FloatArray | None, counts: FloatArray) -> tuple[float | None, str]:
    """The noise that X_u and Y_u share through their responses, or why it is not known."""
    if kernel is None:
        return None, "needs the matrix of unit dots, which streaming does not keep"
    if not (counts == counts[0]).all():
        return None, "defined for units of equal size"
    units = len(kernel)
    of_units = kernel / float(counts[0, 0]) ** 2
    others = of_units - np.diag(np.diagonal(of_units))
    row_x, row_y = others.sum(1) / (units - 1), others.sum(0) / (units - 1)
    return shared_noise(of_units, row_x, row_y, float(row_x.mean())), ""
