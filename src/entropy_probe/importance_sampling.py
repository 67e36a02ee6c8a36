"""The realised entropy change on common samples: self-normalised importance sampling from θ to θ⁺.

With b_i = 1/(B G_n) the weight of response i in a mean over prompts of the mean over responses,

    w_i = b_i exp(S⁺_i − S_i),   ŵ_i = w_i / Σ w         in log space and float64
    Ĥ(θ) = −Σ b_i S_i            Ĥ(θ⁺) = −Σ ŵ_i S⁺_i      ΔH = Ĥ(θ⁺) − Ĥ(θ)          nats per response
    ESS = 1 / Σ ŵ²               SE² = B/(B−1) Σ_n ( Σ_{i∈n} [ŵ_i (−S⁺_i − Ĥ⁺) − b_i (−S_i − Ĥ)] )²   clustered by prompt

The linear term of this very estimator, with dS_i = g_i · Δθ, is −Σ b dS − Σ b (S − S̄) dS = Σ p_i dS_i with
p_i = −b_i (1 + S_i − S̄): one gradient of Σ p_i S_i gives it for every Δθ. Sources: guide section 4; design section 5;
Vehtari et al., arXiv 1507.02646 (Pareto smoothing).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from arviz_stats.base import array_stats
from numpy.typing import NDArray
from scipy.special import logsumexp

from entropy_probe.u_statistics import FloatArray

LOW_ESS_FRACTION = 0.3
"""The guide's threshold (section 4D): below it, resample at θ⁺ or smooth."""


@dataclass(frozen=True)
class ImportanceWeights:
    """Normalised weights with their diagnostics.

    ``ess_fraction`` is ESS Σ b²: ESS / N for groups of one size, and 1 at a step of zero for groups of any. ``pareto_k`` and
    ``smoothed`` (the Pareto-smoothed weights) are None with ``pareto_reason`` where no tail can be fitted.
    """

    weights: FloatArray
    ess: float
    ess_fraction: float
    pareto_k: float | None
    smoothed: FloatArray | None
    pareto_reason: str | None

    @property
    def is_low(self) -> bool:
        """Whether ESS / N is under the guide's threshold."""
        return self.ess_fraction < LOW_ESS_FRACTION


@dataclass(frozen=True)
class EntropyChange:
    """ΔH between two policies on common samples, nats per response; ``se`` is clustered by prompt."""

    entropy_before: float
    entropy_after: float
    delta_h: float
    se: float
    delta_h_smoothed: float | None
    weights: ImportanceWeights


def importance_weights(scores: FloatArray, scores_after: FloatArray, response_weights: FloatArray) -> ImportanceWeights:
    """ŵ, ESS and Pareto diagnostics from S and S⁺ (nats, [N]) and the b_i that sum to 1."""
    log_ratios = scores_after - scores
    log_weights = np.log(response_weights) + log_ratios
    weights = np.exp(log_weights - logsumexp(log_weights))
    ess = 1.0 / float((weights**2).sum())
    # The tail is that of the ratios: with b_i in it, k̂ would measure group sizes.
    pareto_k, smoothed_ratios, reason = pareto_smooth(log_ratios)
    smoothed = None
    if smoothed_ratios is not None:
        smoothed = response_weights * smoothed_ratios / float((response_weights * smoothed_ratios).sum())
    return ImportanceWeights(weights, ess, ess * float((response_weights**2).sum()), pareto_k, smoothed, reason)


def pareto_smooth(log_weights: FloatArray) -> tuple[float | None, FloatArray | None, str | None]:
    """(k̂, smoothed weights that sum to 1, None) by arviz-stats' PSIS, or (None, None, reason) where there is no tail to fit."""
    count = len(log_weights)
    tail = int(3 * math.sqrt(count)) if count > 225 else count // 5
    if tail < 5:
        return None, None, f"{count} responses; a tail of 5 (25 responses) is the least that can be fitted"
    ordered = np.sort(log_weights)
    if np.ptp(ordered[-tail - 1 :]) < 1e-13:
        return None, None, "the largest weights are equal, so there is no tail to fit"
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            # psislw takes minus the log weights, as leave-one-out cross-validation does.
            smoothed_log, k_hat = array_stats.psislw(-log_weights)
        except ValueError as error:
            return None, None, f"the tail could not be fitted ({error})"
    if not (math.isfinite(float(k_hat)) and bool(np.isfinite(smoothed_log).all())):
        return None, None, "the tail could not be fitted (no finite shape)"
    smoothed = np.exp(smoothed_log - logsumexp(smoothed_log))
    return float(k_hat), smoothed, None


def entropy_change(scores: FloatArray, scores_after: FloatArray, group_sizes: Sequence[int]) -> EntropyChange:
    """ΔH with its clustered standard error.

    Args:
        scores: S_i at θ, [N], flat by prompt.
        scores_after: S⁺_i at θ⁺ of the same tokens, [N].
        group_sizes: G_n, two prompts or more.

    Raises:
        ValueError: a score is not finite.
    """
    if not (np.isfinite(scores).all() and np.isfinite(scores_after).all()):
        raise ValueError("a log-probability is not finite; the step or the model has left the range of its number type")
    base = base_weights(group_sizes)
    found = importance_weights(scores, scores_after, base)
    before = -float((base * scores).sum())
    after = -float((found.weights * scores_after).sum())
    influence = found.weights * (-scores_after - after) - base * (-scores - before)
    by_prompt = np.add.reduceat(influence, group_starts(group_sizes))
    prompts = len(group_sizes)
    se = math.sqrt(prompts / (prompts - 1) * float((by_prompt**2).sum()))
    smoothed = None
    if found.smoothed is not None:
        smoothed = -float((found.smoothed * scores_after).sum()) - before
    return EntropyChange(before, after, after - before, se, smoothed, found)


def linear_weights(scores: FloatArray, group_sizes: Sequence[int]) -> FloatArray:
    """p_i = −b_i (1 + S_i − S̄): d ΔH / d S⁺_i at θ⁺ = θ, so that predicted = Σ p_i dS_i; [N]."""
    base = base_weights(group_sizes)
    weights: FloatArray = -base * (1.0 + scores - (base * scores).sum())
    return weights


def base_weights(group_sizes: Sequence[int]) -> FloatArray:
    """b_i = 1/(B G_n), [N]; sums to 1."""
    sizes = np.asarray(group_sizes)
    return np.repeat(1.0 / (len(sizes) * sizes), sizes).astype(np.float64)


def group_starts(group_sizes: Sequence[int]) -> NDArray[np.int64]:
    """Index of each prompt's first response in a flat array."""
    return np.concatenate([[0], np.cumsum(np.asarray(group_sizes))[:-1]]).astype(np.int64)


def entropy_estimate(scores: FloatArray, group_sizes: Sequence[int]) -> tuple[float, float]:
    """Ĥ(θ) = −Σ b_i S_i and its standard error clustered by prompt, nats per response; two prompts or more."""
    base = base_weights(group_sizes)
    entropy = -float((base * scores).sum())
    by_prompt = np.add.reduceat(base * (-scores - entropy), group_starts(group_sizes))
    prompts = len(group_sizes)
    return entropy, math.sqrt(prompts / (prompts - 1) * float((by_prompt**2).sum()))
