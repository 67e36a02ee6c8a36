"""Quantiles that an interval is made with, and Satterthwaite's degrees of freedom."""

from __future__ import annotations

from scipy import special


def normal_quantile(level: float = 0.95) -> float:
    """The standard normal's two-sided quantile: 1.96 at 95 %."""
    return float(special.ndtri(0.5 * (1.0 + level)))


def t_quantile(units: int, level: float = 0.95) -> float:
    """Student's two-sided quantile with U − 1 degrees of freedom."""
    return student_quantile(0.5 * (1.0 + level), units - 1)


def student_quantile(probability: float, degrees: float) -> float:
    """Student's quantile with ``degrees`` of freedom; ``scipy.stats`` takes fifty times as long for the same number."""
    return float(special.stdtrit(degrees, probability))


def satterthwaite(count: int, excess_kurtosis: float) -> float:
    """2 (n−1) / (2 + max(κ, 0) (n−1)/n), 2 at least: degrees of freedom of the sample variance of n values.

    They match the first two moments of the sample variance of values with excess kurtosis κ. Source: Satterthwaite (1946).
    """
    return max(2.0, 2.0 * (count - 1) / (2.0 + max(excess_kurtosis, 0.0) * (count - 1) / count))
