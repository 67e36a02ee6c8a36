"""Coefficients of the two probe losses: what multiplies ∇S_ng in X_n (entropy) and in Y_n (the trainer's update).

S_ng = Σ_t log π_θ(y_t | prefix) is the score of response g to prompt n, in nats. Values lie flat, prompt by prompt:
``scores`` has shape [N] with N = Σ_n G_n, and ``group_sizes`` holds the G_n. Then

    X_n = Σ_g c_ng ∇S_ng,  c_ng = (S_ng − S̄_n,−g) / G_n          E[X] = −∇H   (score-function identity, E[∇S] = 0)
    Y_n = Σ_g a_ng ∇S_ng                                          mean over n = minus the gradient of the training loss

The coefficient is a constant of the loss: were it not detached, Σ_g S_g ∇S̄_−g = Σ_g S̄_−g ∇S_g would add a second X.

Rao-Blackwell replaces what was drawn after a token by its expectation given the tokens so far: with H_t the entropy of the
next-token distribution and F_t = Σ_{s>t} H_s the entropy still to come,

    X_n = −(1/G_n) Σ_g [ Σ_t (F_gt − F̄_−g,t) ∇log π(y_gt) + Σ_t ∇H_gt ]           E[X] = −∇H

F̄_−g,t being the mean over the prompt's other responses at the same position, 0 past their end. A ratio H/T̄ (entropy per token)
adds the length's gradient: with h = H/T̄, S becomes S + h T, F_t becomes F_t − h (T − t), and all is divided by T̄.
Source: docs/method.md, sections 1 to 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

import torch
from torch import Tensor

from entropy_probe.common.choices import member
from entropy_probe.data.groups import by_group, repeat_by_group
from entropy_probe.targets.rao_blackwell import entropy_to_come, leave_one_out_by_position, of_tokens
from entropy_probe.targets.score import score_coefficients


class Estimator(StrEnum):
    """Of the entropy and its gradient.

    ``score``: the guide's, from whole-response scores. ``rao-blackwell``: from the entropy of every next-token distribution.
    """

    SCORE = "score"
    RAO_BLACKWELL = "rao-blackwell"


class EntropyUnit(StrEnum):
    """Per response: H = E[−S]. Per token: H/T̄ with T̄ = E[T], a ratio whose gradient has a length term."""

    PER_RESPONSE = "per-response"
    PER_TOKEN = "per-token"


@dataclass(frozen=True)
class EntropyTarget:
    """Which entropy's gradient X estimates, and how."""

    estimator: Estimator = Estimator.SCORE
    unit: EntropyUnit = EntropyUnit.PER_RESPONSE

    def __post_init__(self) -> None:
        """Put names into members, and refuse unknown ones."""
        object.__setattr__(self, "estimator", member("estimator", self.estimator, Estimator))
        object.__setattr__(self, "unit", member("entropy", self.unit, EntropyUnit))

    @property
    def needs_token_entropies(self) -> bool:
        """Whether H_t of every response token is asked for."""
        return self.estimator is Estimator.RAO_BLACKWELL


@dataclass(frozen=True)
class EntropyRatio:
    """h = Ĥ/T̄, nats per token, and T̄ of the whole batch, both held fixed as constants of the loss."""

    entropy_per_token: float
    mean_length: float


@dataclass(frozen=True)
class EntropyCoefficients:
    """X = Σ log_probs · ∇log π + Σ entropies · ∇H_t.

    ``log_probs`` has one value a response [N], or one a response token [tokens]; ``entropies`` [tokens], or None for zeros.
    """

    log_probs: Tensor
    entropies: Tensor | None = None


def entropy_coefficients(
    target: EntropyTarget,
    scores: Tensor,
    token_entropies: Tensor | None,
    lengths: Sequence[int],
    group_sizes: Sequence[int],
    ratio: EntropyRatio | None = None,
) -> EntropyCoefficients:
    """What multiplies ∇log π and ∇H_t in X, detached.

    Args:
        target: which entropy, and how.
        scores: S, [N].
        token_entropies: H_t of the response tokens, flat [tokens]; for Rao-Blackwell.
        lengths: T, response tokens, [N].
        group_sizes: G_n.
        ratio: of the whole batch, for the entropy per token.
    """
    match target.unit:
        case EntropyUnit.PER_RESPONSE:
            rate, scale = 0.0, 1.0
        case EntropyUnit.PER_TOKEN:
            assert ratio is not None, "the entropy per token needs the batch's ratio"
            rate, scale = ratio.entropy_per_token, ratio.mean_length
        case unknown:
            assert_never(unknown)
    match target.estimator:
        case Estimator.SCORE:
            f = scores.detach() + rate * torch.tensor(lengths, dtype=scores.dtype)
            return EntropyCoefficients(score_coefficients(f, group_sizes) / scale)
        case Estimator.RAO_BLACKWELL:
            assert token_entropies is not None, "Rao-Blackwell needs the entropies of the next-token distributions"
            to_come = entropy_to_come(token_entropies.detach(), lengths, rate)
            return EntropyCoefficients(
                -(to_come - leave_one_out_by_position(to_come, lengths, group_sizes))
                / (scale * of_tokens(repeat_by_group(group_sizes, group_sizes), lengths)),
                -1.0 / (scale * of_tokens(repeat_by_group(group_sizes, group_sizes), lengths)),
            )
        case missing:
            assert_never(missing)


def response_entropies(
    estimator: Estimator, scores: Tensor, token_entropies: Tensor | None, lengths: Sequence[int]
) -> Tensor:
    """One unbiased estimate of a prompt's H a response: −S, or Σ_t H_t by Rao-Blackwell; [N], nats."""
    match member("estimator", estimator, Estimator):
        case Estimator.SCORE:
            return -scores
        case Estimator.RAO_BLACKWELL:
            assert token_entropies is not None, "Rao-Blackwell needs the entropies of the next-token distributions"
            return torch.stack([part.sum() for part in torch.split(token_entropies, list(lengths))])
        case unknown:
            assert_never(unknown)


def entropy_ratio(entropies: Tensor, lengths: Sequence[int], group_sizes: Sequence[int]) -> EntropyRatio:
    """h and T̄ from one estimate of H a response, [N]: both means over prompts of means over responses."""
    tokens = torch.tensor(lengths, dtype=torch.float64)
    entropy, mean_length = (
        float(torch.stack([part.mean() for part in by_group(values, group_sizes)]).mean())
        for values in (entropies, tokens)
    )
    return EntropyRatio(entropy / mean_length, mean_length)
