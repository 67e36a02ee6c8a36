"""What responses of another policy count: whether any may need a weight, which weights are taken, and why.

The sampler's log-probs of a row are its ``logprobs``, else its ``old_logprobs``. A row counts exactly once where it says
that it is on-policy, where it has neither column, or where at no token the log-ratio of what came before differs from 0 by
more than

    min(0.1, 0.01 √T) nats,    T the tokens that the policy drew.

That is far above what one policy's log-probs differ by in float32 (1e-6 a token, 5e-5 a response of 1024), and no weight that
it leaves out differs from 1 by more than a tenth. A sampler in bfloat16 (0.015 a token) drew from another distribution and is
weighed as one. Source: docs/method.md, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import assert_never

import torch
from torch import Tensor

from entropy_probe.data.importance import Importance
from entropy_probe.data.rollouts import Rollout, RolloutBatch
from entropy_probe.errors import InputError
from entropy_probe.model.measured import Measured
from entropy_probe.pipeline.settings import Settings
from entropy_probe.report.sections.off_policy import FEW, NONE, OffPolicySection
from entropy_probe.statistics.importance_sampling import Weighting, effective_sample_size
from entropy_probe.targets.choices import Estimator, SamplerWeights

ROUNDING_A_TOKEN, MOST_ROUNDING = 0.01, 0.1
"""Nats by which log-probs of one policy may differ: times √T, and at most."""
LEAST_ESS = 0.1
"""ESS / N of the responses' weights below which nothing is taken unasked."""


def may_need_weights(batch: RolloutBatch, settings: Settings) -> bool:
    """Whether log-probs at θ are needed to know what responses count.

    Raises:
        InputError: a row says that another policy drew it, and has no log-probs of that policy.
    """
    if settings.sampler_weights is SamplerWeights.OFF:
        return False
    for row in batch.responses:
        if row.on_policy is False and _samplers(row) is None:
            raise InputError(
                f"prompt_id {row.prompt_id!r} has a row that says on_policy false, and neither logprobs nor old_logprobs; give "
                "its sampler's log-probs, or set sampler_weights to off, which counts it as this policy's own"
            )
    return any(row.on_policy is not True and _samplers(row) is not None for row in batch.responses)


def reweighted(
    batch: RolloutBatch, measured: Measured | None, settings: Settings
) -> tuple[RolloutBatch, OffPolicySection]:
    """The batch with what its responses count, and what is told of it.

    Args:
        batch: the rollouts.
        measured: log-probs of every response token at θ; None where :func:`may_need_weights` says that none are needed.
        settings: which weights are asked for, of which estimator.

    Raises:
        InputError: unasked-for weights would leave almost nothing, or weights are asked for in a form that does not exist.
    """
    asked = settings.sampler_weights
    batch = replace(batch, importance=None)
    if asked is SamplerWeights.OFF:
        return batch, OffPolicySection.unweighted(asked, "sampler_weights is off")
    if measured is None:
        return batch, OffPolicySection.unweighted(NONE, "no row may come from another policy that says so")
    assert measured.log_probs is not None, "weights need log-probs at θ"
    ratios = _log_ratios(batch, measured.log_probs)
    rows = sum(bool((ratio != 0.0).any()) for ratio in ratios)
    if rows == 0:
        return batch, OffPolicySection.unweighted(NONE, "the samplers' log-probs are this policy's, within rounding")
    if settings.weighting is Weighting.PER_PROMPT:
        raise InputError(
            f"{rows} rows come from another policy, whose importance weights are normalised over all rows, and weighting is "
            "per-prompt; set it to global, or sampler_weights to off"
        )
    importance = Importance.of(ratios, batch.group_sizes)
    ess, fraction = effective_sample_size(importance.log_weights.numpy(), batch.group_sizes)
    taken, reason = _choice(asked, settings.estimator, ess, fraction)
    importance = replace(importance, by_prefix=taken is SamplerWeights.PREFIX)
    if importance.by_prefix and not bool(importance.before.isfinite().all()):
        raise InputError(
            "a ratio of this policy to the sampler's exceeds what float64 holds: these rows are not near this checkpoint's "
            "policy; pair checkpoint N with the rollouts of step N+1, or sample again"
        )
    return replace(batch, importance=importance), OffPolicySection(taken, ess, fraction, rows, reason)


def _choice(asked: SamplerWeights, estimator: Estimator, ess: float, fraction: float) -> tuple[SamplerWeights, str]:
    """Which weights are taken, and why."""
    match asked:
        case SamplerWeights.RESPONSE | SamplerWeights.PREFIX:
            return asked, "asked for"
        case SamplerWeights.AUTO:
            pass
        case SamplerWeights.OFF:
            raise AssertionError("off takes no weights")
        case unknown:
            assert_never(unknown)
    if fraction >= FEW:
        return SamplerWeights.RESPONSE, "their effective sample size is half of all or more"
    if fraction < LEAST_ESS:
        others = "response, prefix" if estimator is Estimator.RAO_BLACKWELL else "response"
        raise InputError(
            "the rows come from a policy so far from this checkpoint's that importance weights leave an effective sample size "
            f"of {ess:.3g}, {100.0 * fraction:.2g} % of all; pair checkpoint N with the rollouts of step N+1, sample again, or "
            f"set sampler_weights to {others} (large errors) or off (a bias)"
        )
    if estimator is Estimator.SCORE:
        return (
            SamplerWeights.RESPONSE,
            "their effective sample size is under half of all, but by score there is no other form",
        )
    return SamplerWeights.PREFIX, "weights of whole responses have an effective sample size under half of all"


def _log_ratios(batch: RolloutBatch, log_probs: Tensor) -> list[Tensor]:
    """log π_θ − log π_sampler at every response's tokens; zeros where a row counts exactly once."""
    found = []
    for row, own in zip(batch.responses, torch.split(log_probs.double(), list(batch.lengths)), strict=True):
        sampler = None if row.on_policy is True else _samplers(row)
        ratio = torch.zeros_like(own) if sampler is None else own - torch.tensor(sampler, dtype=torch.float64)
        found.append(torch.zeros_like(own) if counts_once(ratio) else ratio)
    return found


def counts_once(log_ratios: Tensor) -> bool:
    """Whether a response's log π_θ − log π_sampler, [T], is within rounding at every prefix, so that it counts exactly once."""
    within = min(MOST_ROUNDING, ROUNDING_A_TOKEN * math.sqrt(len(log_ratios)))
    return float(log_ratios.cumsum(0).abs().max()) <= within


def _samplers(row: Rollout) -> Sequence[float] | None:
    """The sampler's log-probs at the tokens that it drew, as far as the row has them."""
    values = row.logprobs if row.logprobs is not None else row.old_logprobs
    return None if values is None else row.at_sampled(values)
