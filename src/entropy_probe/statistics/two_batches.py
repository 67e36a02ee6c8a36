"""δH₁ from two independent batches: the entropy gradient of one, E, against the update of the other, U.

With K_nm = X_n · P Y_m for prompts n of E and m of U, δH₁ = −η mean K; there is no diagonal to remove. With row means x_n,
column means y_m, k̃_nm = K_nm − x_n − y_m + mean the doubly centred matrix,

    Var mean K = Σ (x_n − mean)² / (B_E (B_E−1)) + Σ (y_m − mean)² / (B_U (B_U−1)) − Σ k̃² / ((B_E−1)(B_U−1) B_E B_U)

Each of the first two already holds the cross term once. Source: docs/method.md, section 5; ``docs/coverage.md`` has the
measured coverage of the interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from entropy_probe.common.arrays import FloatArray
from entropy_probe.statistics.estimate import Estimate
from entropy_probe.statistics.quantiles import satterthwaite, student_quantile
from entropy_probe.statistics.skewness import lengthened, row_mean_shape, skew_extension

FEW_PROMPTS = 16
"""Prompts in the smaller batch below which coverage was measured to depend on the kernel."""


@dataclass(frozen=True)
class TwoBatchStatistics:
    """The mean of K and its uncertainty, in the unit of K.

    ``evaluation`` and ``update`` are the first two terms of the variance, ``product`` the third (what is subtracted).
    ``shortfall`` says why the interval is known to cover less than it says, where it is.
    """

    mean: float
    variance: float
    evaluation: float
    update: float
    product: float
    ci95: tuple[float, float]
    shortfall: str | None

    @property
    def se(self) -> float:
        """Square root of the variance."""
        return math.sqrt(self.variance)

    @property
    def negated(self) -> Estimate:
        """Minus the mean: where K is in the η-weighted inner product, δH₁ in nats."""
        return Estimate(self.mean, self.se, self.ci95).scaled(-1.0)


def two_batch_statistics(kernel: FloatArray, weights: FloatArray | None = None) -> TwoBatchStatistics:
    """From K [B_E, B_U], two prompts or more on either side.

    The variance V is at least the product's, which it holds in truth: where the first two terms cancel, V would be 0 otherwise.
    The interval is ``skewed_t`` (:mod:`entropy_probe.statistics.intervals.skewed_t`) for two samples: with share
    w = evaluation / (evaluation + update), s = (V − product) / V, κ and G₁ the sample excess kurtosis and skewness of row and
    of column means,

        half width t_ν √V,  1/ν = w²/ν_E + (1−w)²/ν_U,  ν_E and ν_U as there from s² κ  (Satterthwaite 1946)
        further by min(1.5, |γ| (2 t² + 1) / 6) √V on γ's side,  γ = 2 [G₁ evaluation^{3/2} / √B_E + … update … U] / V^{3/2}

    t has ν's degrees with κ = 0; those of the smaller batch where the product is all of V. γ counts the linear parts' third
    cumulant twice, for the same reason as there.

    With ``weights`` W_n / W̄ of the evaluation batch's prompts, whose X carry 1/W̄, row n loses mean · (W_n/W̄ − 1) of every entry
    (:mod:`~entropy_probe.statistics.tied_units`), which leaves the mean as it is.
    """
    rows, columns = kernel.shape
    assert min(rows, columns) >= 2, "the caller refuses fewer than two prompts in a batch"
    mean = float(kernel.mean())
    if weights is not None:
        kernel = kernel - mean * (weights[:, None] - 1.0)
    x, y = kernel.mean(axis=1), kernel.mean(axis=0)
    centred = kernel - x[:, None] - y[None, :] + mean
    evaluation = float(((x - mean) ** 2).sum()) / (rows * (rows - 1))
    update = float(((y - mean) ** 2).sum()) / (columns * (columns - 1))
    product = float((centred**2).sum()) / ((rows - 1) * (columns - 1) * rows * columns)
    variance = max(evaluation + update - product, product)
    (skewness_x, kurtosis_x), (skewness_y, kurtosis_y) = _shape(x), _shape(y)
    product_alone = evaluation + update <= product + product
    linear = 0.0 if product_alone else (variance - product) / variance

    def degrees(kurtosis_of_x: float, kurtosis_of_y: float) -> float:
        of_x, of_y = satterthwaite(rows, kurtosis_of_x), satterthwaite(columns, kurtosis_of_y)
        if product_alone:
            return float(min(rows, columns) - 1)
        share = evaluation / (evaluation + update)
        return float(1.0 / (share**2 / of_x + (1.0 - share) ** 2 / of_y))

    half_width = student_quantile(0.975, degrees(linear**2 * kurtosis_x, linear**2 * kurtosis_y)) * math.sqrt(variance)
    skewness = 0.0
    if variance > 0.0:
        third = skewness_x * evaluation**1.5 / math.sqrt(rows) + skewness_y * update**1.5 / math.sqrt(columns)
        skewness = 2.0 * third / variance**1.5
    further = skew_extension(skewness, student_quantile(0.975, degrees(0.0, 0.0))) * math.sqrt(variance)
    ci95 = lengthened(mean, half_width, further, skewness)
    return TwoBatchStatistics(mean, variance, evaluation, update, product, ci95, _shortfall(rows, columns))


def _shape(means: FloatArray) -> tuple[float, float]:
    """G₁ and G₂; fewer than four values do not show them."""
    return row_mean_shape(means) if len(means) >= 4 else (0.0, 0.0)


def _shortfall(rows: int, columns: int) -> str | None:
    if min(rows, columns) >= FEW_PROMPTS:
        return None
    return (
        f"{rows} evaluation and {columns} update prompts, fewer than {FEW_PROMPTS} in one of them: where a few kinds of "
        "prompts carry the mean, the 95 % interval of two batches was measured to cover less"
    )


@dataclass(frozen=True)
class FoldStatistics:
    """``by_fold`` is mean X of each fold against mean Y of the others; ``estimate`` their mean with its delete-one error.

    No interval is given: its coverage was not measured.
    """

    estimate: Estimate
    by_fold: tuple[float, ...]


def folds_of(prompts: int, folds: int) -> list[int]:
    """The fold of every prompt, dealt in turn."""
    return [n % folds for n in range(prompts)]


def fold_statistics(kernel: FloatArray, folds: Sequence[int], weights: FloatArray | None = None) -> FoldStatistics:
    """Cross-fitting: X̄ of one fold · P Ȳ of the others, averaged over folds.

    With n_f prompts in fold f, S_f = Σ K over n in f and m outside, R_df = Σ_{m∈f} K_dm and C_fd = Σ_{n∈f} K_nd, a fold's
    estimate is S_f / (n_f (B − n_f)), and without prompt d, in O(B²) for all d,

        (S_f − Σ_{g≠f} R_dg) / ((n_f − 1) (B − n_f))  of d's own fold        (S_f − C_fd) / (n_f (B − n_f − 1))  of another

    Args:
        kernel: K_nm over the prompts of one batch, [B, B].
        folds: of every prompt, [B]; two folds or more.
        weights: W_n / W̄ of every prompt, where X carry 1/W̄, [B]; the error then counts what that ties
            (:mod:`~entropy_probe.statistics.tied_units`).

    Returns:
        Folds in ascending order. The error is the delete-one jackknife over prompts (it counts the degenerate part twice, so it
        is conservative); None where a fold would be left empty.
    """
    if weights is not None:
        found = fold_statistics(kernel, folds)
        tied = fold_statistics(kernel - found.estimate.value * (weights[:, None] - 1.0), folds)
        return replace(found, estimate=replace(found.estimate, se=tied.estimate.se))
    _, fold_of, sizes = np.unique(np.asarray(folds), return_inverse=True, return_counts=True)
    prompts, everyone = len(fold_of), np.arange(len(fold_of))
    order, starts = np.argsort(fold_of, kind="stable"), np.concatenate([[0], np.cumsum(sizes)[:-1]])
    of_row = np.add.reduceat(kernel[:, order], starts, axis=1)
    of_column = np.add.reduceat(kernel[order], starts, axis=0)
    of_row[everyone, fold_of] = 0.0  # not subtracted from the sum: the diagonal, which it holds, may be large
    outside = of_row.sum(axis=1)
    sums = np.bincount(fold_of, weights=outside)
    by_fold = sums / (sizes * (prompts - sizes))
    error, why_not = None, "a fold of one prompt cannot be left empty"
    if sizes.min() >= 2:
        left = (sums[:, None] - of_column) / (sizes * (prompts - sizes - 1))[:, None]
        left[fold_of, everyone] = (sums[fold_of] - outside) / ((sizes - 1) * (prompts - sizes))[fold_of]
        means = left.mean(axis=0)
        error = math.sqrt((prompts - 1) / prompts * float(((means - means.mean()) ** 2).sum()))
        why_not = "the coverage of an interval over folds was not measured"
    return FoldStatistics(Estimate(float(by_fold.mean()), error, None, why_not), tuple(by_fold.tolist()))
