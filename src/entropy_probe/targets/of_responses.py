"""Targets that are the mean of something known of every response, such as its reward: E[v], v fixed whatever the policy.

    Z_n = (1/G_n) Σ_g (v_ng − v̄_n,−g) ∇S_ng          E[Z_n] = +∇E[v]_n

by the score-function identity ∇E[v] = E[v ∇S]; the mean v̄_n,−g over the prompt's other responses does not depend on
response g and E[∇S] = 0, so it adds no bias. These coefficients need no forward and stand on the same ∇S as Y's: one more
vector a unit, and no backward more where a rule serves the parameter (what none serves takes one). The step Δθ = η P Ȳ
changes E[v] by δ = +η · mean over pairs n ≠ m of Z_n · P Y_m; a prompt's own pair is left out, as δH₁ leaves it out,
because both its sides are made of the same responses. Source: docs/method.md, section 4.
"""

from __future__ import annotations

from torch import Tensor

from entropy_probe.data.groups import less_weighted_others, repeat_by_group
from entropy_probe.losses.advantages import AdvantageRule, advantages_from_rewards
from entropy_probe.targets.base import Ratio, Sample, Target, TokenPair


class TargetOfResponses(Target):
    """E[v]. A subclass says what v is; δ is in its unit.

    Attributes:
        name: in the report.
        description: for people, its unit included.
    """

    name: str
    description: str
    needs_rewards: bool = False
    """Whether every row must have a reward."""

    def coefficients(self, sample: Sample, ratio: Ratio | None = None) -> TokenPair:
        """(v_ng − v̄_n,−g) / G_n, [N], exactly 0 where all of a prompt's v are equal; times w_g / W̄ off-policy."""
        values, importance = self.values(sample), sample.importance
        if importance is None:
            # The leave-one-out advantage of v in the place of the reward.
            centred = advantages_from_rewards(values, sample.group_sizes, AdvantageRule.RLOO)
        else:
            centred = less_weighted_others(values, importance.log_weights, sample.group_sizes) * importance.weights
        return TokenPair(centred / repeat_by_group(sample.group_sizes, sample.group_sizes))

    def weights(self, sample: Sample) -> Tensor:
        """Its coefficients, one a response: [N]."""
        return self.coefficients(sample).log_probs
