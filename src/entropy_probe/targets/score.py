"""The score estimator of the entropy: what multiplies ∇S_ng in X_n, one value a response.

S_ng = Σ_t log π_θ(y_t | prefix) is the score of response g to prompt n, in nats; H = E[−S]. Since E[∇S] = 0,
∇H = −E[S ∇S], and any baseline that does not depend on response g may be taken off S_ng without a bias:

    X_n = Σ_g c_ng ∇S_ng,  c_ng = (S_ng − S̄_n,−g) / G_n          E[X_n] = −∇H_n

with S̄_n,−g the mean over the prompt's other responses. Of rows of another policy c_ng = w_g (S_ng − S̄_n,−g) / (W̄ G_n) with the
others' mean weighted by their own w. The coefficient is a constant of the loss: were it not detached,
Σ_g S_g ∇S̄_−g = Σ_g S̄_−g ∇S_g would add a second X. Source: docs/method.md, sections 2 and 9; Williams (1992).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from entropy_probe.data.groups import leave_one_out_mean, less_weighted_others, repeat_by_group
from entropy_probe.data.importance import Importance
from entropy_probe.targets.base import EntropyEstimator, Sample, TokenPair


class Score(EntropyEstimator):
    """From log-probabilities of what was drawn. A prompt needs two responses."""

    name = "score"

    def values(self, sample: Sample) -> Tensor:
        """−S_i, [N], nats."""
        assert sample.scores is not None, "the score estimator needs scores"
        return -sample.scores

    def coefficients(self, sample: Sample, rate: float = 0.0) -> TokenPair:
        """c_ng of S + rate · T in the place of S: [N]."""
        f = -self.values(sample).detach() + rate * sample.exact_lengths
        return TokenPair(score_coefficients(f, sample.group_sizes, sample.importance))


def score_coefficients(scores: Tensor, group_sizes: Sequence[int], importance: Importance | None = None) -> Tensor:
    """c_ng = (S_ng − S̄_n,−g) / G_n, detached; shape [N], in the unit of S.

    The leave-one-out mean is a baseline that is independent of response g, so E[X_n] = −∇H_n exactly, without the
    1/G shrinkage of the full mean.

    Raises:
        InputError: a prompt with a single response.
    """
    detached = scores.detach()
    if importance is None:
        centred = detached - leave_one_out_mean(detached, group_sizes)
    else:
        centred = less_weighted_others(detached, importance.log_weights, group_sizes) * importance.weights
    return centred / repeat_by_group(group_sizes, group_sizes)
