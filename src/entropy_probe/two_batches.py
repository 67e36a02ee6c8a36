"""δH₁ from two independent batches: the entropy gradient of one, E, against the update of the other, U.

With K_nm = X_n · P Y_m for prompts n of E and m of U, δH₁ = −η mean K; there is no diagonal to remove. With row means x_n,
column means y_m, k̃_nm = K_nm − x_n − y_m + mean the doubly centred matrix,

    Var mean K = Σ (x_n − mean)² / (B_E (B_E−1)) + Σ (y_m − mean)² / (B_U (B_U−1)) − Σ k̃² / ((B_E−1)(B_U−1) B_E B_U)

Each of the first two already holds the cross term once. Source: design section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from entropy_probe.u_statistics import FloatArray


@dataclass(frozen=True)
class TwoBatchStatistics:
    """The mean of K and its uncertainty, in the unit of K.

    ``evaluation`` and ``update`` are the first two terms of the variance, ``product`` the third (what is subtracted). The
    interval is mean ± t SE with Satterthwaite's degrees of freedom of the first two terms, or those of the smaller batch where
    the product is all of the variance.
    """

    mean: float
    variance: float
    evaluation: float
    update: float
    product: float
    ci95: tuple[float, float]

    @property
    def se(self) -> float:
        """Square root of the variance."""
        return math.sqrt(self.variance)


def two_batch_statistics(kernel: FloatArray) -> TwoBatchStatistics:
    """From K [B_E, B_U], two prompts or more on either side.

    The variance is at least the product's, which it holds in truth: where the first two terms cancel, V would be 0 otherwise.
    """
    rows, columns = kernel.shape
    assert min(rows, columns) >= 2, "the caller refuses fewer than two prompts in a batch"
    mean = float(kernel.mean())
    x, y = kernel.mean(axis=1), kernel.mean(axis=0)
    centred = kernel - x[:, None] - y[None, :] + mean
    evaluation = float(((x - mean) ** 2).sum()) / (rows * (rows - 1))
    update = float(((y - mean) ** 2).sum()) / (columns * (columns - 1))
    product = float((centred**2).sum()) / ((rows - 1) * (columns - 1) * rows * columns)
    variance = max(evaluation + update - product, product)
    degrees = float(min(rows, columns) - 1)
    if evaluation + update > product + product:
        share = evaluation / (evaluation + update)
        degrees = 1.0 / (share**2 / (rows - 1) + (1.0 - share) ** 2 / (columns - 1))
    half_width = float(stats.t.ppf(0.975, degrees)) * math.sqrt(variance)
    return TwoBatchStatistics(mean, variance, evaluation, update, product, (mean - half_width, mean + half_width))


@dataclass(frozen=True)
class FoldStatistics:
    """``by_fold`` is mean X of each fold against mean Y of the others; ``mean`` their mean, ``se`` its delete-one error."""

    mean: float
    by_fold: tuple[float, ...]
    se: float | None


def folds_of(prompts: int, folds: int) -> list[int]:
    """The fold of every prompt, dealt in turn."""
    return [n % folds for n in range(prompts)]


def fold_statistics(kernel: FloatArray, folds: Sequence[int]) -> FoldStatistics:
    """Cross-fitting: X̄ of one fold · P Ȳ of the others, averaged over folds.

    Args:
        kernel: K_nm over the prompts of one batch, [B, B].
        folds: of every prompt, [B].

    Returns:
        The error is the delete-one jackknife over prompts (it counts the degenerate part twice, so it is conservative); None
        where a fold would be left empty.
    """
    labels = np.asarray(folds)

    def estimate(kept: FloatArray) -> list[float]:
        found = []
        for fold in np.unique(labels):
            inside, outside = kept * (labels == fold), kept * (labels != fold)
            found.append(float(inside @ kernel @ outside) / float(inside.sum() * outside.sum()))
        return found

    everyone = np.ones(len(labels))
    by_fold = estimate(everyone)
    error = None
    if min(np.bincount(labels)) >= 2:
        left = np.array(
            [np.mean(estimate(np.where(np.arange(len(labels)) == n, 0.0, 1.0))) for n in range(len(labels))]
        )
        error = math.sqrt((len(labels) - 1) / len(labels) * float(((left - left.mean()) ** 2).sum()))
    return FoldStatistics(float(np.mean(by_fold)), tuple(by_fold), error)
