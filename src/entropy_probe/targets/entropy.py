"""The entropy as a target: which estimator, and per response or per token.

H = E[−S] is nats per response; H/T̄ nats per token. The estimators are :mod:`~entropy_probe.targets.score` and
:mod:`~entropy_probe.targets.rao_blackwell`, the ratio is :mod:`~entropy_probe.targets.per_token`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from entropy_probe.common.arrays import FloatArray
from entropy_probe.common.choices import member
from entropy_probe.statistics.by_decision import TokensOfPrompts, change_by_decision, changes_of_responses
from entropy_probe.statistics.importance_sampling import EntropyChange, Weighting, base_weights
from entropy_probe.targets.base import EntropyEstimator, Ratio, Sample, Target, TokenPair, at_tokens, sum_by_response
from entropy_probe.targets.choices import EntropyUnit, Estimator
from entropy_probe.targets.per_token import entropy_ratio, per_token
from entropy_probe.targets.registry import ESTIMATORS


@dataclass(frozen=True)
class EntropyTarget(Target):
    """Which entropy's gradient X estimates, and how: E[X] = −∇H, or −∇(H/T̄)."""

    sign: ClassVar[int] = -1

    estimator: Estimator = Estimator.SCORE
    unit: EntropyUnit = EntropyUnit.PER_RESPONSE

    def __post_init__(self) -> None:
        """Put names into members, and refuse unknown ones."""
        object.__setattr__(self, "estimator", member("estimator", self.estimator, Estimator))
        object.__setattr__(self, "unit", member("entropy", self.unit, EntropyUnit))

    @property
    def _estimator(self) -> EntropyEstimator:
        return ESTIMATORS[self.estimator]

    @property
    def needs_token_entropies(self) -> bool:
        """Whether H_t of every response token is asked for."""
        return self._estimator.needs_token_entropies

    @property
    def of_whole_batch(self) -> bool:
        """True of the ratio."""
        return self.unit is EntropyUnit.PER_TOKEN

    def values(self, sample: Sample) -> Tensor:
        """One unbiased estimate of a prompt's H a response, per response whatever the unit: [N], nats."""
        return self._estimator.values(sample)

    def exposure(self, sample: Sample) -> Tensor | None:
        """T for the entropy per token."""
        return sample.exact_lengths if self.of_whole_batch else None

    @property
    def by_decision(self) -> bool:
        """Whether a change is realised token by token (:mod:`~entropy_probe.statistics.by_decision`)."""
        return self.needs_token_entropies

    def change(self, before: Sample, after: Sample, weighting: Weighting = Weighting.GLOBAL) -> EntropyChange:
        """By Rao-Blackwell by decision, where weights are not asked for prompt by prompt; its ESS, k̂ and smoothed change are
        those of whole responses' weights.

        Raises:
            ValueError: a score is not finite.
        """
        found = super().change(before, after, weighting)
        if not self.by_decision or weighting is not Weighting.GLOBAL:
            return found
        own = change_by_decision(
            TokensOfPrompts(before.group_sizes, before.lengths, _log_counts(before)),
            (_numbers(before.token_entropies), _numbers(after.token_entropies)),
            (_numbers(before.token_log_probs), _numbers(after.token_log_probs)),
            per_token=self.of_whole_batch,
        )
        return replace(
            found,
            entropy_before=own.entropy_before,
            entropy_after=own.entropy_after,
            delta_h=own.delta_h,
            se=own.se,
        )

    def parts(self, before: Sample, after: Sample, weighting: Weighting = Weighting.GLOBAL) -> FloatArray:
        """What every response has in the change, [N]: ΔH is their mean over prompts of means over responses.

        By decision exactly, but that of a ratio, and of whole responses' weights, to first order.
        """
        assert before.scores is not None, "a realised change needs scores at both policies"
        assert after.scores is not None, "a realised change needs scores at both policies"
        values, exposure = self.counted(before)
        mean = 1.0 if exposure is None else float(base_weights(before.group_sizes) @ exposure.numpy())
        if self.by_decision and weighting is Weighting.GLOBAL:
            tokens = TokensOfPrompts(before.group_sizes, before.lengths, _log_counts(before))
            log_probs = (_numbers(before.token_log_probs), _numbers(after.token_log_probs))
            found = changes_of_responses(
                tokens, (_numbers(before.token_entropies), _numbers(after.token_entropies)), log_probs
            )
            if not self.of_whole_batch:
                return found
            ones = np.ones(len(log_probs[0]))
            h = float(base_weights(before.group_sizes) @ values.numpy()) / mean
            by_token: FloatArray = (found - h * changes_of_responses(tokens, (ones, ones), log_probs)) / mean
            return by_token
        own = self.values(after) - self.values(before)
        centred = values - (float(base_weights(before.group_sizes) @ values.numpy()) / mean) * (
            torch.ones_like(values) if exposure is None else exposure
        )
        counts = torch.ones_like(values) if before.importance is None else before.importance.weights
        whole: FloatArray = ((counts * own + centred * (after.scores - before.scores)) / mean).numpy()
        return whole

    def ratio(self, sample: Sample) -> Ratio | None:
        """h and T̄ of a whole batch, for the entropy per token."""
        if not self.of_whole_batch:
            return None
        entropies, lengths = self.counted(sample)
        assert lengths is not None
        return entropy_ratio(entropies, lengths, sample.group_sizes)

    def counted(self, sample: Sample) -> tuple[Tensor, Tensor | None]:
        """As of every target; by Rao-Blackwell with weights by prefix, Σ_s w_{<s} H_s and, per token, Σ_s w_{<s}, over W̄."""
        importance = sample.importance
        if importance is None or not importance.by_prefix or not self.needs_token_entropies:
            return super().counted(sample)
        assert sample.token_entropies is not None
        before = importance.before
        entropies = sum_by_response(before * sample.token_entropies, sample.lengths)
        return entropies, sum_by_response(before, sample.lengths) if self.of_whole_batch else importance.weights

    def coefficients(self, sample: Sample, ratio: Ratio | None = None) -> TokenPair:
        """The estimator's, [N] each or [tokens] each; for the entropy per token with its length term and over T̄."""
        if not self.of_whole_batch:
            return self._estimator.coefficients(sample)
        assert ratio is not None, "the entropy per token needs the batch's ratio"
        return per_token(self._estimator, sample, ratio)


def _log_counts(sample: Sample) -> tuple[FloatArray, FloatArray] | None:
    """log u at the tokens and past the responses' ends, where responses of another policy are weighed."""
    importance = sample.importance
    if importance is None:
        return None
    of_responses = importance.log_weights
    at_own = torch.cat(importance.log_before) if importance.by_prefix else at_tokens(of_responses, sample.lengths)
    return at_own.numpy(), of_responses.numpy()


def _numbers(values: Tensor | None) -> FloatArray:
    assert values is not None, "a change by decision needs entropies and log-probs of every token at both policies"
    found: FloatArray = values.numpy()
    return found
