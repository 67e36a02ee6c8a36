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
from entropy_probe.errors import InputError


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


class AdvantageRule(StrEnum):
    """Where advantages come from. ``given``: the rollouts; the others: from rewards, prompt by prompt."""

    GIVEN = "given"
    DR_GRPO = "dr_grpo"
    GRPO = "grpo"
    RLOO = "rloo"


class LengthWeight(StrEnum):
    """How the training loss weighs a response by its length; see :func:`length_weights`."""

    GUIDE = "guide"
    DR_GRPO = "dr_grpo"
    GRPO = "grpo"
    DAPO = "dapo"
    BNPO = "bnpo"


def by_group(values: Tensor, group_sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """``values`` [N] prompt by prompt: tensors of shape [G_n]."""
    return torch.split(values, list(group_sizes))


def group_mean(values: Tensor, group_sizes: Sequence[int]) -> Tensor:
    """Mean of ``values`` [N] over each prompt's responses, repeated for each response: [N]."""
    return torch.cat([part.mean().expand(len(part)) for part in by_group(values, group_sizes)])


def leave_one_out_mean(values: Tensor, group_sizes: Sequence[int]) -> Tensor:
    """Mean of the prompt's *other* responses: (G_n mean − value) / (G_n − 1), shape [N].

    Raises:
        InputError: a prompt with a single response.
    """
    if min(group_sizes) < 2:
        raise InputError("a prompt has one response; the leave-one-out mean needs at least two")
    counts = repeat_by_group([float(size) for size in group_sizes], group_sizes)
    return (counts * group_mean(values, group_sizes) - values) / (counts - 1)


def repeat_by_group(values: Sequence[float], group_sizes: Sequence[int]) -> Tensor:
    """One value a prompt, repeated for each of its responses: float64 [N]."""
    return torch.repeat_interleave(torch.tensor(values, dtype=torch.float64), torch.tensor(list(group_sizes)))


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
                / (scale * _of_tokens(repeat_by_group(group_sizes, group_sizes), lengths)),
                -1.0 / (scale * _of_tokens(repeat_by_group(group_sizes, group_sizes), lengths)),
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


def score_coefficients(scores: Tensor, group_sizes: Sequence[int]) -> Tensor:
    """c_ng = (S_ng − S̄_n,−g) / G_n, detached; shape [N], nats.

    The leave-one-out mean is a baseline that is independent of response g, so E[X_n] = −∇H_n exactly, without the
    1/G shrinkage of the full mean.
    """
    detached = scores.detach()
    return (detached - leave_one_out_mean(detached, group_sizes)) / repeat_by_group(group_sizes, group_sizes)


def entropy_to_come(token_entropies: Tensor, lengths: Sequence[int], rate: float = 0.0) -> Tensor:
    """F_t − h (T − t) with F_t = Σ_{s>t} H_s and T − t the tokens after t: flat [tokens], nats.

    Given the tokens up to t, F_t has the mean of −Σ_{s>t} log π(y_s), without the noise of what was drawn there.
    """
    return torch.cat(
        [(h - rate).flip(0).cumsum(0).flip(0) - (h - rate) for h in torch.split(token_entropies, list(lengths))]
    )


def leave_one_out_by_position(values: Tensor, lengths: Sequence[int], group_sizes: Sequence[int]) -> Tensor:
    """At every response token, the mean of ``values`` [tokens] at that position over the prompt's other responses.

    A response counts as 0 past its end. For a prompt with one response it is 0: there is no baseline, and no bias either.
    """
    found = []
    start = 0
    parts = torch.split(values, list(lengths))
    for size in group_sizes:
        group = parts[start : start + size]
        start += size
        total = torch.nn.utils.rnn.pad_sequence(list(group), batch_first=True).sum(0)
        found += [(total[: len(own)] - own) / max(1, size - 1) for own in group]
    return torch.cat(found)


def _of_tokens(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """One value a response, repeated for each of its tokens."""
    return torch.repeat_interleave(values, torch.tensor(list(lengths)))


def advantages_from_rewards(rewards: Tensor, group_sizes: Sequence[int], rule: AdvantageRule) -> Tensor:
    """Advantages A_ng from rewards [N].

    ``dr_grpo``: r − mean (arXiv 2503.20783). ``grpo``: (r − mean) / (std + 1e-4) with the sample standard deviation
    (arXiv 2402.03300, as TRL computes it). ``rloo``: r − mean of the others (arXiv 2402.14740).

    Raises:
        InputError: ``given``, which is read and not computed, or a rule that is not known.
    """
    # Equal rewards give exactly zero, which the rounding of their mean would not.
    spread = [float(part.max() - part.min()) for part in by_group(rewards, group_sizes)]
    informative = repeat_by_group(spread, group_sizes) > 0
    centred = torch.where(informative, rewards - group_mean(rewards, group_sizes), 0.0)
    match member("advantage", rule, AdvantageRule):
        case AdvantageRule.RLOO:
            return torch.where(informative, rewards - leave_one_out_mean(rewards, group_sizes), 0.0)
        case AdvantageRule.DR_GRPO:
            return centred
        case AdvantageRule.GRPO:
            deviations = [float(part.std(correction=1)) for part in by_group(rewards, group_sizes)]
            return centred / (repeat_by_group(deviations, group_sizes) + 1e-4)
        case AdvantageRule.GIVEN:
            raise InputError("advantages by the rule 'given' are read from the rollouts, not computed from rewards")
        case unknown:
            assert_never(unknown)


def advantages_over_batch(rewards: Tensor, group_sizes: Sequence[int]) -> Tensor:
    """(r − mean) / (std + 1e-4), the mean of the prompt and the sample standard deviation of all rewards [N].

    TRL's ``scale_rewards="batch"`` (arXiv 2508.08221), for the rewards of one generation batch.
    """
    centred = advantages_from_rewards(rewards, group_sizes, AdvantageRule.DR_GRPO)
    return centred / (float(rewards.std(correction=1)) + 1e-4)


def length_weights(
    lengths: Sequence[int],
    group_sizes: Sequence[int],
    rule: LengthWeight,
    *,
    max_completion_length: int | None = None,
    window_tokens: float | None = None,
    micro_batches: Sequence[int] | None = None,
) -> Tensor:
    """w_ng with a_ng = A_ng w_ng and Ȳ = (1/B) Σ_n Σ_g a_ng ∇S_ng; float64 [N].

    ``guide``: 1/(G_n L_n), L_n the prompt's longest response. ``dr_grpo``: 1/(G_n L_max). ``grpo``: 1/(G_n T_ng).
    ``dapo``: B/ΣT over the accumulation window. ``bnpo``: B/(K ΣT_k) over the response's micro-batch k of K.

    Args:
        lengths: T_ng, response tokens.
        group_sizes: G_n.
        rule: which of the above.
        max_completion_length: L_max, the trainer's constant (``dr_grpo`` only, required there).
        window_tokens: ΣT of the window where it is not this batch's (``dapo``).
        micro_batches: the micro-batch of each response (``bnpo``); one for all if not given.

    Raises:
        InputError: ``dr_grpo`` without L_max, an L_max shorter than a response, or a rule that is not known.
    """
    tokens = torch.tensor(lengths, dtype=torch.float64)
    sizes = repeat_by_group(group_sizes, group_sizes)
    prompts = len(group_sizes)
    match member("length_weight", rule, LengthWeight):
        case LengthWeight.GUIDE:
            longest = [float(part.max()) for part in by_group(tokens, group_sizes)]
            return 1.0 / (sizes * repeat_by_group(longest, group_sizes))
        case LengthWeight.GRPO:
            return 1.0 / (sizes * tokens)
        case LengthWeight.DAPO:
            window = window_tokens if window_tokens is not None else float(tokens.sum())
            return torch.full_like(tokens, prompts / window)
        case LengthWeight.BNPO:
            if micro_batches is None:
                return torch.full_like(tokens, prompts / float(tokens.sum()))
            index = torch.unique(torch.tensor(list(micro_batches)), return_inverse=True)[1]
            sums = torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add_(0, index, tokens)
            return prompts / (len(sums) * sums[index])
        case LengthWeight.DR_GRPO:
            return 1.0 / (sizes * _trainers_constant(max_completion_length, max(lengths)))
        case unknown:
            assert_never(unknown)


def _trainers_constant(max_completion_length: int | None, longest: int) -> int:
    if max_completion_length is None:
        raise InputError(
            "length weight dr_grpo divides by the trainer's constant; give max_completion_length (as TRL calls it), as a "
            "setting or as a column of the rows"
        )
    if max_completion_length < longest:
        raise InputError(
            f"max_completion_length is {max_completion_length}, but a response has {longest} tokens; "
            "expected the trainer's constant, at least as long"
        )
    return max_completion_length


def probe_loss(scores: Tensor, coefficients: Tensor) -> Tensor:
    """L = Σ_i coefficient_i S_i, a scalar whose gradient is Σ_i coefficient_i ∇S_i.

    With ``score_coefficients`` this is the guide's L_X summed over prompts, with A w its L_Y.
    """
    return (coefficients.detach().to(scores) * scores).sum()
