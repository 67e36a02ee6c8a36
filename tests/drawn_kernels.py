"""Kernels of drawn units for the tests of statistics, and their statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from entropy_probe.statistics.u_statistics import CrossStatistics, cross_statistics
from entropy_probe.statistics.unit_dots import UnitDots


def unit_sums(vectors: np.ndarray, sizes: list[int]) -> np.ndarray:
    return np.add.reduceat(vectors, np.concatenate([[0], np.cumsum(sizes)[:-1]]), axis=0)


def dots_of(xs: np.ndarray, ys: np.ndarray, sizes: list[int]) -> UnitDots:
    return UnitDots.from_kernel(unit_sums(xs, sizes) @ unit_sums(ys, sizes).T, sizes)


def replicates(
    units: int, draws: int, signal: float, noise: float, seed: int, pairing: float = 0.0
) -> tuple[np.ndarray, float]:
    """Kernels of Gaussian units X = signal e + noise, Y likewise, partly sharing their noise; and the true U."""
    rng = np.random.default_rng(seed)
    dim = 6
    mean = np.zeros(dim)
    mean[0] = signal
    shared = rng.normal(size=(draws, units, dim))
    xs = mean + noise * (pairing * shared + math.sqrt(1 - pairing**2) * rng.normal(size=(draws, units, dim)))
    ys = mean + noise * (pairing * shared + math.sqrt(1 - pairing**2) * rng.normal(size=(draws, units, dim)))
    return np.einsum("dup,dwp->duw", xs, ys), signal**2


def found_for(kernels: np.ndarray) -> list:
    return [cross_statistics(UnitDots.from_kernel(kernel, [1] * len(kernel))) for kernel in kernels]


def kernels(
    units: int, draws: int, signal: float, noise: float, seed: int, *, dim: int = 6, sigma: float = 0.0
) -> np.ndarray:
    """Kernels [draws, U, U] of X = s (signal e + noise z), Y likewise, half of their noise shared; truth signal²."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(draws, units, dim))
    size = np.exp(sigma * rng.normal(size=(draws, units, 1)) - 0.5 * sigma**2)
    mean = signal * np.eye(dim)[0]
    xs, ys = (
        size * (mean + noise * (0.5 * shared + math.sqrt(0.75) * rng.normal(size=shared.shape))) for _ in range(2)
    )
    return np.einsum("dup,dwp->duw", xs, ys)


def one(units: int = 9, seed: int = 0) -> np.ndarray:
    return kernels(units, 1, 1.0, 0.8, seed)[0]


def statistics(kernel: np.ndarray) -> CrossStatistics:
    return cross_statistics(UnitDots.from_kernel(kernel, [1] * len(kernel)))


def symmetric(kernel: np.ndarray) -> np.ndarray:
    h = 0.5 * (kernel + kernel.T)
    np.fill_diagonal(h, 0.0)
    return h


def coverage(found: Iterable[tuple[float, float]], truth: float) -> float:
    """The share of intervals that hold the truth."""
    return float(np.mean([low <= truth <= high for low, high in found]))
