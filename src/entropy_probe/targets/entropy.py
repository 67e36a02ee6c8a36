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
from entropy_probe.data.importance import Importance
from entropy_probe.statistics.by_decision import TokensOfPrompts, change_by_decision, changes_of_responses
from entropy_probe.statistics.importance_sampling import EntropyChange, Weighting, base_weights
from entropy_probe.statistics.ratio_change import ratio_change
from entropy_probe.targets.base import EntropyEstimator, Ratio, Sample, Target, TokenPair, at_tokens, sum_by_response
from entropy_probe.targets.choices import EntropyUnit, Estimator
from entropy_probe.targets.per_token import entropy_ratio, per_token
from entropy_probe.targets.rao_blackwell import entropy_to_come
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

    def by_decision(self, importance: Importance | None, weighting: Weighting = Weighting.GLOBAL) -> bool:
        """Whether a change is realised token by token (:mod:`~entropy_probe.statistics.by_decision`): by Rao-Blackwell, of
        responses that each count once, where weights are not asked for prompt by prompt."""
        return self.needs_token_entropies and importance is None and weighting is Weighting.GLOBAL

    def parts(self, before: Sample, after: Sample, weighting: Weighting = Weighting.GLOBAL) -> FloatArray:
        """What every response has in the change, [N]: ΔH is their mean over prompts of means over responses.

        By decision exactly, but that of a ratio, and of whole responses' weights, to first order.
        """
        assert before.scores is not None, "a realised change needs scores at both policies"
        assert after.scores is not None, "a realised change needs scores at both policies"
        values, exposure = self.counted(before)
        mean = 1.0 if exposure is None else float(base_weights(before.group_sizes) @ exposure.numpy())
        if self.by_decision(before.importance, weighting):
            tokens = TokensOfPrompts(before.group_sizes, before.lengths)
            log_probs = (_numbers(before.log_probs), _numbers(after.log_probs))
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
        if importance is None or not self.weighs_by_prefix(importance):
            return super().counted(sample)
        assert sample.token_entropies is not None
        before = importance.before
        entropies = sum_by_response(before * sample.token_entropies, sample.lengths)
        return entropies, sum_by_response(before, sample.lengths) if self.of_whole_batch else importance.weights

    def weighs_by_prefix(self, importance: Importance | None) -> bool:
        """Whether these weights are taken token by token: by Rao-Blackwell alone."""
        return importance is not None and importance.by_prefix and self.needs_token_entropies

    def change(self, before: Sample, after: Sample, weighting: Weighting = Weighting.GLOBAL) -> EntropyChange:
        """As of every target; by decision where that is; with weights by prefix
        :func:`~entropy_probe.statistics.ratio_change.ratio_change`. By decision ESS, k̂ and the smoothed change are of whole
        responses' weights.

        Raises:
            ValueError: a score is not finite.
        """
        found = super().change(before, after, weighting)
        if self.by_decision(before.importance, weighting):
            own = change_by_decision(
                TokensOfPrompts(before.group_sizes, before.lengths),
                (_numbers(before.token_entropies), _numbers(after.token_entropies)),
                (_numbers(before.log_probs), _numbers(after.log_probs)),
                per_token=self.of_whole_batch,
            )
            return replace(found, entropy_after=found.entropy_before + own.delta_h, delta_h=own.delta_h, se=own.se)
        if before.importance is None or not self.weighs_by_prefix(before.importance):
            return found
        moved = replace(after, importance=before.importance.moved(_known(after.log_probs) - _known(before.log_probs)))
        (entropies, counts), (entropies_after, counts_after) = (
            tuple(_known(values).numpy() for values in self.counted(sample)) for sample in (before, moved)
        )
        return ratio_change(
            (entropies, counts),
            (entropies_after, counts_after),
            before.group_sizes,
            replace(found.weights, smoothed=None),
        )

    def derivative(self, sample: Sample) -> TokenPair:
        """What multiplies ∇log π and ∇H_t in the derivative of that change, weights being by prefix: [tokens] each.

        dn = Σ_t [ (Σ_{s>t} w_{<s} H_s) dlog π_t + w_{<t} dH_t ]; dd = w Σ_t dlog π_t, per token Σ_t (Σ_{s>t} w_{<s}) dlog π_t.
        """
        importance = sample.importance
        assert importance is not None
        assert self.weighs_by_prefix(importance)
        entropies, counts = (_known(values) for values in self.counted(sample))
        base = torch.from_numpy(base_weights(sample.group_sizes))
        mean = float(base @ counts)
        rate = float(base @ entropies) / mean
        before, shares = importance.before, at_tokens(base / mean, sample.lengths)
        per_token = rate if self.of_whole_batch else 0.0
        to_come = entropy_to_come(before * (_known(sample.token_entropies) - per_token), sample.lengths)
        if not self.of_whole_batch:
            to_come = to_come - rate * at_tokens(importance.weights, sample.lengths)
        return TokenPair(shares * to_come, shares * before)

    def coefficients(self, sample: Sample, ratio: Ratio | None = None) -> TokenPair:
        """The estimator's, [N] each or [tokens] each; for the entropy per token with its length term and over T̄."""
        if not self.of_whole_batch:
            return self._estimator.coefficients(sample)
        assert ratio is not None, "the entropy per token needs the batch's ratio"
        return per_token(self._estimator, sample, ratio)


def _known(values: Tensor | None) -> Tensor:
    assert values is not None, "a change token by token needs entropies and log-probs of every token at both policies"
    return values


def _numbers(values: Tensor | None) -> FloatArray:
    found: FloatArray = _known(values).numpy()
    return found
