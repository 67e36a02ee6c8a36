"""The realised entropy change on common samples: self-normalised importance sampling from θ to θ⁺.

With b_i = 1/(B G_n) the weight of response i in a mean over prompts of the mean over responses, v_i its unbiased estimate of
its prompt's entropy (−S_i, or Σ_t H_t by Rao-Blackwell), and τ_i its exposure (1, or its length T_i for the entropy per token),

    w_i = b_i exp(S⁺_i − S_i),   ŵ_i = w_i / Σ w         in log space and float64
    ĥ(θ) = Σ b_i v_i / Σ b_i τ_i       ĥ(θ⁺) = Σ ŵ_i v⁺_i / Σ ŵ_i τ_i       ΔH = ĥ(θ⁺) − ĥ(θ)     nats per response or token
    ESS = 1 / Σ ŵ²                     SE² = B/(B−1) Σ_n ( Σ_{i∈n} [ŵ_i (v⁺_i − ĥ⁺ τ_i) / τ̄⁺ − b_i (v_i − ĥ τ_i) / τ̄] )²

Responses that another policy drew have b_i w_i / Σ b w in the place of b_i, w_i = exp(S_i − S_i^sampler).

The standard error is clustered by prompt (delta method). Weights may be normalised prompt by prompt instead, Σ_{i∈n} ŵ_i = 1/B.
With dS_i = g_i · Δθ the linear term of this very estimator is Σ b_i [dv_i + (e_i − ē) dS_i] / τ̄ with e_i = v_i − ĥ τ_i and ē
its mean (zero; of the prompt's own where weights are), and dv_i = −dS_i for the score. Sources: docs/method.md, section
7; Vehtari et al., arXiv 1507.02646 (Pareto smoothing).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from entropy_probe.common.arrays import FloatArray
from entropy_probe.common.choices import member


class Weighting(StrEnum):
    """Over which responses the importance weights w_i = b_i exp(S⁺_i − S_i) of a realised change are normalised.

    ``global``: over all of them, Σ ŵ = 1. ``per-prompt``: over each prompt's own, Σ_{i∈n} ŵ_i = 1/B; ΔH then shrinks by a share
    of about 1/G. Source: docs/method.md, section 7.

    Example:
        >>> from entropy_probe import Settings, Weighting
        >>> Weighting("per-prompt")
        <Weighting.PER_PROMPT: 'per-prompt'>
        >>> settings = Settings(weighting="per-prompt")
    """

    GLOBAL = "global"
    PER_PROMPT = "per-prompt"


def _prompt_by_prompt(weighting: Weighting) -> bool:
    """Whether each prompt's own responses are what weights are normalised over.

    Raises:
        InputError: a weighting that is not known.
    """
    match member("weighting", weighting, Weighting):
        case Weighting.GLOBAL:
            return False
        case Weighting.PER_PROMPT:
            return True
        case unknown:
            assert_never(unknown)


LOW_ESS_FRACTION = 0.3
"""ESS / N below which importance weights say little: draw fresh responses at θ⁺, or smooth the weights."""


@dataclass(frozen=True)
class ImportanceWeights:
    """Normalised weights with their diagnostics.

    ``ess_fraction`` is ESS Σ b²: ESS / N for groups of one size, and 1 at a step of zero for groups of any. ``pareto_k`` and
    ``smoothed`` (the Pareto-smoothed weights) are None with ``pareto_reason`` where no tail can be fitted. ``pareto_k_limit``
    is :func:`pareto_k_limit` of these weights.
    """

    weights: FloatArray
    ess: float
    ess_fraction: float
    pareto_k: float | None
    smoothed: FloatArray | None
    pareto_reason: str | None
    pareto_k_limit: float

    @property
    def is_low(self) -> bool:
        """Whether ESS / N is below ``LOW_ESS_FRACTION``."""
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


def importance_weights(
    scores: FloatArray,
    scores_after: FloatArray,
    response_weights: FloatArray,
    group_sizes: Sequence[int] | None = None,
) -> ImportanceWeights:
    """ŵ, ESS and Pareto diagnostics from S (of the policy that drew) and S⁺ (nats, [N]) and the b_i that sum to 1.

    With ``group_sizes`` the weights are normalised prompt by prompt, each prompt's to the sum of its b_i.
    """
    log_ratios = scores_after - scores
    log_weights = np.log(response_weights) + log_ratios
    if group_sizes is None:
        totals = np.full(len(log_weights), logsumexp(log_weights))
    else:
        starts, counts = group_starts(group_sizes), np.asarray(group_sizes)
        groups = zip(starts, counts, strict=True)
        log_sums = [logsumexp(log_weights[k : k + n]) - np.log(response_weights[k : k + n].sum()) for k, n in groups]
        totals = np.repeat(log_sums, counts)
    weights = np.exp(log_weights - totals)
    ess = 1.0 / float((weights**2).sum())
    # The tail is that of the ratios: with b_i in it, k̂ would measure group sizes.
    pareto_k, smoothed_ratios, reason = pareto_smooth(log_ratios)
    smoothed = None
    if smoothed_ratios is not None:
        smoothed = response_weights * smoothed_ratios / float((response_weights * smoothed_ratios).sum())
    fraction = ess * float((response_weights**2).sum())
    return ImportanceWeights(weights, ess, fraction, pareto_k, smoothed, reason, pareto_k_limit(len(weights)))


def pareto_k_limit(count: int) -> float:
    """min(1 − 1/log₁₀ N, 0.7): the k̂ up to which N smoothed weights have a reliable mean, as arviz has it.

    Source: Vehtari et al., arXiv 1507.02646.
    """
    return min(1.0 - 1.0 / math.log10(count), 0.7) if count > 1 else 0.7


def pareto_smooth(log_weights: FloatArray) -> tuple[float | None, FloatArray | None, str | None]:
    """(k̂, smoothed weights that sum to 1, None) by arviz-stats' PSIS, or (None, None, reason) where there is no tail to fit.

    Without arviz-stats, too, there are none, with that reason.
    """
    count = len(log_weights)
    tail = int(3 * math.sqrt(count)) if count > 225 else count // 5
    if tail < 5:
        return None, None, f"{count} responses; a tail of 5 (25 responses) is the least that can be fitted"
    ordered = np.sort(log_weights)
    if np.ptp(ordered[-tail - 1 :]) < 1e-13:
        return None, None, "the largest weights are equal, so there is no tail to fit"
    try:
        # Here: it takes longer to import than a small probe runs, and nothing else needs it.
        from arviz_stats.base import array_stats
    except ImportError as error:
        return None, None, f"arviz-stats, which fits the tail, is not installed ({error})"
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


def entropy_change(
    scores: FloatArray,
    scores_after: FloatArray,
    group_sizes: Sequence[int],
    *,
    entropies: tuple[FloatArray, FloatArray] | None = None,
    lengths: FloatArray | None = None,
    weighting: Weighting = Weighting.GLOBAL,
    log_weights: FloatArray | None = None,
) -> EntropyChange:
    """ΔH with its clustered standard error.

    Args:
        scores: S_i at θ, [N], flat by prompt.
        scores_after: S⁺_i at θ⁺ of the same tokens, [N].
        group_sizes: G_n, two prompts or more.
        entropies: v and v⁺, [N] each; None takes −S and −S⁺.
        lengths: T_i for the entropy per token, [N]; None for the entropy per response.
        weighting: how importance weights are normalised.
        log_weights: log w_i of responses that another policy drew, up to a common constant, [N]; None for ones.

    Raises:
        ValueError: a score is not finite.
    """
    if not (np.isfinite(scores).all() and np.isfinite(scores_after).all()):
        raise ValueError("a log-probability is not finite; the step or the model has left the range of its number type")
    base = base_weights(group_sizes)
    v, v_after = (-scores, -scores_after) if entropies is None else entropies
    exposure = np.ones(len(scores)) if lengths is None else lengths
    prompt_by_prompt = _prompt_by_prompt(weighting)
    assert log_weights is None or not prompt_by_prompt, "the caller refuses another policy's rows normalised by prompt"
    drawn_at = scores if log_weights is None else scores - log_weights
    found = importance_weights(drawn_at, scores_after, base, group_sizes if prompt_by_prompt else None)
    base = _at_theta(base, log_weights)
    mean, mean_after = float(base @ exposure), float(found.weights @ exposure)
    before = float(base @ v) / mean
    after = float(found.weights @ v_after) / mean_after
    influence = found.weights * (v_after - after * exposure) / mean_after - base * (v - before * exposure) / mean
    se = clustered_error(np.add.reduceat(influence, group_starts(group_sizes)))
    smoothed = None
    if found.smoothed is not None and not prompt_by_prompt:
        smoothed = float(found.smoothed @ v_after) / float(found.smoothed @ exposure) - before
    return EntropyChange(before, after, after - before, se, smoothed, found)


@dataclass(frozen=True)
class LinearTerm:
    """ΔH to first order is Σ on_scores · dS + Σ on_entropies · dv, [N] each; by the score, dv = −dS is in the first."""

    on_scores: FloatArray
    on_entropies: FloatArray | None


def linear_term(
    scores: FloatArray,
    group_sizes: Sequence[int],
    *,
    entropies: FloatArray | None = None,
    lengths: FloatArray | None = None,
    weighting: Weighting = Weighting.GLOBAL,
    log_weights: FloatArray | None = None,
) -> LinearTerm:
    """The derivative of :func:`entropy_change`'s ΔH at θ⁺ = θ; arguments as there, v at θ alone."""
    base = _at_theta(base_weights(group_sizes), log_weights)
    v = -scores if entropies is None else entropies
    exposure = np.ones(len(scores)) if lengths is None else lengths
    mean = float(base @ exposure)
    residual = v - float(base @ v) / mean * exposure
    if _prompt_by_prompt(weighting):
        sizes = np.asarray(group_sizes)
        residual = residual - np.repeat(np.add.reduceat(residual, group_starts(group_sizes)) / sizes, sizes)
    on_scores = base * residual / mean
    if entropies is None:
        return LinearTerm(on_scores - base / mean, None)
    return LinearTerm(on_scores, base / mean)


def _at_theta(base: FloatArray, log_weights: FloatArray | None) -> FloatArray:
    """b w / Σ b w; b itself where no other policy drew."""
    if log_weights is None:
        return base
    logs = np.log(base) + log_weights
    weighted: FloatArray = np.exp(logs - logsumexp(logs))
    return weighted


def effective_sample_size(log_weights: FloatArray, group_sizes: Sequence[int]) -> tuple[float, float]:
    """(Σ b w)² / Σ (b w)², and its share of what equal weights give, Σ b² times that: 1 where all w are equal.

    Source: Kong (1992). For groups of one size the share is ESS / N.
    """
    base = base_weights(group_sizes)
    ess = 1.0 / float((_at_theta(base, log_weights) ** 2).sum())
    return ess, ess * float((base**2).sum())


def base_weights(group_sizes: Sequence[int]) -> FloatArray:
    """b_i = 1/(B G_n), [N]; sums to 1."""
    sizes = np.asarray(group_sizes)
    return np.repeat(1.0 / (len(sizes) * sizes), sizes).astype(np.float64)


def group_starts(group_sizes: Sequence[int]) -> NDArray[np.int64]:
    """Index of each prompt's first response in a flat array."""
    return np.concatenate([[0], np.cumsum(np.asarray(group_sizes))[:-1]]).astype(np.int64)


def entropy_estimate(
    entropies: FloatArray, group_sizes: Sequence[int], lengths: FloatArray | None = None
) -> tuple[float, float]:
    """ĥ(θ) = Σ b v / Σ b τ and its standard error clustered by prompt; two prompts or more.

    Args:
        entropies: v, [N]: −S or Σ_t H_t of every response, nats.
        group_sizes: G_n.
        lengths: T for the entropy per token; None for the entropy per response.
    """
    estimate, by_prompt = ratio_by_prompt(entropies, group_sizes, lengths)
    return estimate, clustered_error(by_prompt)


def resampled_change(
    entropies: FloatArray,
    entropies_after: FloatArray,
    group_sizes: Sequence[int],
    group_sizes_after: Sequence[int],
    *,
    lengths: FloatArray | None = None,
    lengths_after: FloatArray | None = None,
) -> EntropyChange:
    """ĥ(θ⁺) − ĥ(θ) with fresh responses of θ⁺ to the same prompts: no importance weights, so each response counts as one.

    Responses are independent, prompts are common: the standard error is clustered by prompt over the difference of both
    influences, in which what prompts differ in cancels.

    Args:
        entropies: v of θ's responses, [N]: −S or Σ_t H_t, nats.
        entropies_after: v⁺ of θ⁺'s own responses, [N⁺].
        group_sizes: G_n of the first.
        group_sizes_after: of the second, the same prompts in the same order.
        lengths: T of the first for the entropy per token; None for the entropy per response.
        lengths_after: of the second.
    """
    before, influence = ratio_by_prompt(entropies, group_sizes, lengths)
    after, influence_after = ratio_by_prompt(entropies_after, group_sizes_after, lengths_after)
    base = base_weights(group_sizes_after)
    weights = ImportanceWeights(
        weights=base,
        ess=1.0 / float((base**2).sum()),
        ess_fraction=1.0,
        pareto_k=None,
        smoothed=None,
        pareto_reason="fresh responses of θ⁺ carry no importance weights",
        pareto_k_limit=pareto_k_limit(len(base)),
    )
    return EntropyChange(before, after, after - before, clustered_error(influence_after - influence), None, weights)


def ratio_by_prompt(
    entropies: FloatArray, group_sizes: Sequence[int], lengths: FloatArray | None
) -> tuple[float, FloatArray]:
    """ĥ = Σ b v / Σ b τ, and each prompt's influence on it: Σ_{i∈n} b_i (v_i − ĥ τ_i) / τ̄, [B]."""
    base = base_weights(group_sizes)
    exposure = np.ones(len(entropies)) if lengths is None else lengths
    mean = float(base @ exposure)
    estimate = float(base @ entropies) / mean
    influence: FloatArray = np.add.reduceat(base * (entropies - estimate * exposure) / mean, group_starts(group_sizes))
    return estimate, influence


def clustered_error(by_prompt: FloatArray) -> float:
    """√(B/(B−1) Σ_n influence²)."""
    prompts = len(by_prompt)
    return math.sqrt(prompts / (prompts - 1) * float((by_prompt**2).sum()))
