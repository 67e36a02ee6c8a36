"""The interface of what the probe differentiates: its value a response, its coefficients, its realised change.

A target f(θ) is a mean over prompts of an expectation over their responses. Its gradient is estimated prompt by prompt from
what multiplies ∇log π(y_t) and ∇H_t at every response token,

    X_n = Σ_g Σ_t (l_ngt ∇log π(y_ngt) + e_ngt ∇H_ngt)          E[X_n] = sign · ∇f_n

with (l, e) a :class:`TokenPair` of constants: were they not detached, their own gradients would add further terms. Where
responses come from another policy, each term carries an importance weight over W̄ (:mod:`~entropy_probe.data.importance`).
A step Δθ = η P Ȳ then changes f to first order by sign · η E[X̄ · P Ȳ]. Entropies have the sign −1, as the U-statistic
U_cross has it (δH₁ = −η U_cross), all others +1. Source: docs/method.md, sections 1 to 3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from entropy_probe.data.importance import Importance
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.model.measured import Measured
from entropy_probe.statistics.importance_sampling import EntropyChange, Weighting, entropy_change


@dataclass(frozen=True)
class TokenPair:
    """Something on ∇log π and something on ∇H: Σ_t (l_t ∇log π(y_t) + e_t ∇H_t) over response tokens.

    Attributes:
        log_probs: l, one value a response [N], or one a response token [tokens], flat.
        entropies: e, alike; None for zeros.
    """

    log_probs: Tensor
    entropies: Tensor | None = None

    @staticmethod
    def of(coefficients: Tensor | TokenPair) -> TokenPair:
        """Bare coefficients are l's."""
        return TokenPair(coefficients) if isinstance(coefficients, Tensor) else coefficients

    def weighs_responses(self, batch: RolloutBatch) -> bool:
        """Whether it is one weight a response of ``batch`` on ∇S and nothing on ∇H: it then stands outside of a backward."""
        return self.entropies is None and not self.is_per_token(batch)

    def is_per_token(self, batch: RolloutBatch) -> bool:
        """Whether l has one value a token of ``batch``, whose pair this is. (Of rows of one token each it cannot be told.)"""
        assert len(self.log_probs) in (len(batch.responses), batch.tokens)
        return len(self.log_probs) != len(batch.responses)

    def of_rows(self, rows: Sequence[int], batch: RolloutBatch) -> TokenPair:
        """The part that belongs to these rows of ``batch``, whose pair this is, one row after the other."""
        return self._with(lambda values: of_rows(values, rows, batch))

    def at_tokens(self, lengths: Sequence[int]) -> TokenPair:
        """The same with one value a token, from responses of these lengths: float64."""
        return self._with(lambda values: at_tokens(values, lengths))

    def scaled(self, factor: float) -> TokenPair:
        """Both times ``factor``."""
        return self._with(lambda values: factor * values)

    def _with(self, change: Callable[[Tensor], Tensor]) -> TokenPair:
        return TokenPair(change(self.log_probs), None if self.entropies is None else change(self.entropies))


def of_rows(values: Tensor, rows: Sequence[int], batch: RolloutBatch) -> Tensor:
    """Those of ``values``, one a response or one a response token of ``batch``, that belong to these rows."""
    if len(values) == len(batch.responses):
        return values[list(rows)]
    assert len(values) == batch.tokens
    return torch.cat([values[batch.first_token[row] : batch.first_token[row + 1]] for row in rows])


def at_tokens(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """One value a response token, float64, from as many or from one a response of these lengths."""
    if len(values) == len(lengths):
        return torch.repeat_interleave(values.double(), torch.tensor(list(lengths)))
    assert len(values) == sum(lengths)
    return values.double()


def sum_by_response(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sums over the tokens of every response, [N], of values a token, [tokens]."""
    return torch.stack([part.sum() for part in torch.split(values, list(lengths))])


@dataclass(frozen=True)
class Sample:
    """All responses to some prompts as a target sees them, flat, prompt by prompt.

    Attributes:
        group_sizes: G_n.
        lengths: T, response tokens, [N].
        scores: S, nats, [N]; None where no forward has been.
        token_entropies: H_t of the response tokens, nats, [tokens]; None where not asked for.
        rewards: R, [N]; None where there are none.
        importance: what the responses count; None where each counts once.
        log_probs: log π of the response tokens, nats, [tokens]; None where not asked for.
    """

    group_sizes: Sequence[int]
    lengths: Sequence[int]
    scores: Tensor | None = None
    token_entropies: Tensor | None = None
    rewards: Tensor | None = None
    importance: Importance | None = None
    log_probs: Tensor | None = None

    @staticmethod
    def of(batch: RolloutBatch, measured: Measured | None = None) -> Sample:
        """A whole batch with what its responses count, and what a forward has found of it."""
        return Sample(
            batch.group_sizes,
            batch.lengths,
            None if measured is None else measured.scores,
            None if measured is None else measured.entropies,
            rewards_of(batch),
            batch.importance,
            None if measured is None else measured.log_probs,
        )

    @property
    def exact_lengths(self) -> Tensor:
        """T as numbers, float64 [N]."""
        return torch.tensor(self.lengths, dtype=torch.float64)


def rewards_of(batch: RolloutBatch) -> Tensor | None:
    """R of every response, float64 [N]; None where a row has none."""
    rewards = [response.reward for response in batch.responses]
    return None if any(reward is None for reward in rewards) else torch.tensor(rewards, dtype=torch.float64)


@dataclass(frozen=True)
class Ratio:
    """h = Ĥ/T̄, nats per token, and T̄ of the whole batch, both held fixed as constants of the loss."""

    per_token: float
    mean_length: float


class EntropyEstimator(ABC):
    """One way to estimate H − rate · T and its gradient, nats per response. ``name`` is its member of ``Estimator``."""

    name: str
    needs_token_entropies: bool = False
    """Whether H_t of every response token is asked for."""

    @abstractmethod
    def values(self, sample: Sample) -> Tensor:
        """One unbiased estimate of a prompt's H a response: [N], nats."""

    @abstractmethod
    def coefficients(self, sample: Sample, rate: float = 0.0) -> TokenPair:
        """What multiplies ∇log π and ∇H_t in a vector whose mean is −∇(H − rate · T), detached."""


class Target(ABC):
    """Something that a step moves. ``sign`` · ∇f is what the coefficients' gradients have as their mean."""

    sign: ClassVar[int] = 1

    @property
    def needs_token_entropies(self) -> bool:
        """Whether H_t of every response token is asked for."""
        return False

    @property
    def of_whole_batch(self) -> bool:
        """Whether coefficients depend on all prompts, by :meth:`ratio`."""
        return False

    @abstractmethod
    def values(self, sample: Sample) -> Tensor:
        """v_i, one unbiased estimate a response of its prompt's f (of its numerator, for a ratio): [N]."""

    @abstractmethod
    def coefficients(self, sample: Sample, ratio: Ratio | None = None) -> TokenPair:
        """What multiplies ∇log π and ∇H_t in X, detached.

        Args:
            sample: of whole prompts.
            ratio: of the whole batch, for a target that is one.
        """

    def ratio(self, sample: Sample) -> Ratio | None:
        """The constants of the whole batch that its coefficients depend on; None where they depend on their prompt alone."""
        return None

    def exposure(self, sample: Sample) -> Tensor | None:
        """τ_i, what the mean of v is divided by the mean of, [N]; None for ones."""
        return None

    def counted(self, sample: Sample) -> tuple[Tensor, Tensor | None]:
        """v and τ of every response times what the response counts, [N] each: f is the ratio of their means.

        The second is None where it is all ones.
        """
        values, exposure = self.values(sample), self.exposure(sample)
        if sample.importance is None:
            return values, exposure
        weights = sample.importance.weights
        return weights * values, weights if exposure is None else weights * exposure

    def change(self, before: Sample, after: Sample, weighting: Weighting = Weighting.GLOBAL) -> EntropyChange:
        """f(θ⁺) − f(θ) on the same responses by importance weights: two samples that differ in what forwards found.

        Raises:
            ValueError: a score is not finite.
        """
        assert before.scores is not None, "a realised change needs scores at both policies"
        assert after.scores is not None, "a realised change needs scores at both policies"
        exposure = self.exposure(before)
        return entropy_change(
            before.scores.numpy(),
            after.scores.numpy(),
            before.group_sizes,
            entropies=(self.values(before).numpy(), self.values(after).numpy()),
            lengths=None if exposure is None else exposure.numpy(),
            weighting=weighting,
            log_weights=None if before.importance is None else before.importance.log_weights.numpy(),
        )
