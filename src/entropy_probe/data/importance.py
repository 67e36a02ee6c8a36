"""What rows of another policy count in a mean under the policy at θ.

A response y that π_sampler drew counts w = π_θ(y) / π_sampler(y), or at its token s by what came before it alone,

    w_{<s} = Π_{k<s} π_θ(y_k) / π_sampler(y_k)          E_sampler[w_{<s} f(y_1 … y_s)] = E_θ[f(y_1 … y_s) after y_{<s}]

With W_n the mean of a prompt's w, all of them are divided by W̄, the mean of W_n over the batch, never by W_n: a prompt's
own W_n is made of the very responses that it would divide, a bias that more prompts do not take away. Source:
docs/method.md, section 2; Precup, Sutton and Singh (2000) for weights by decision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from entropy_probe.data.groups import by_group


@dataclass(frozen=True, eq=False)
class Importance:
    """The weights of some rows, over W̄ of the whole batch.

    Attributes:
        log_ratios: of every response, log π_θ(y_t) − log π_sampler(y_t) at the T tokens that the policy drew, nats,
        float64; zeros
            for a row that counts once.
        log_mean: log W̄, of the whole batch even where these rows are a part of it.
        by_prefix: whether what can be weighed token by token is weighed by w_{<s}, and not by w.
    """

    log_ratios: tuple[Tensor, ...]
    log_mean: float
    by_prefix: bool = False

    @staticmethod
    def of(log_ratios: Sequence[Tensor], group_sizes: Sequence[int], *, by_prefix: bool = False) -> Importance:
        """Of a whole batch, whose prompts have so many responses each."""
        whole = Importance(tuple(log_ratios), 0.0, by_prefix)
        means = [part.logsumexp(0) - math.log(len(part)) for part in by_group(whole.log_weights, group_sizes)]
        log_mean = float(torch.stack(means).logsumexp(0)) - math.log(len(means))
        return Importance(whole.log_ratios, log_mean, by_prefix)

    @cached_property
    def log_weights(self) -> Tensor:
        """log(w / W̄) of every response, [N]."""
        sums = [ratios.sum() for ratios in self.log_ratios]
        return torch.stack(sums) - self.log_mean

    @property
    def weights(self) -> Tensor:
        """w / W̄ of every response, [N]."""
        return self.log_weights.exp()

    @property
    def log_before(self) -> tuple[Tensor, ...]:
        """log(w_{<s} / W̄) of every response at each of its tokens s, [T] each."""
        return tuple(ratios.cumsum(0) - ratios - self.log_mean for ratios in self.log_ratios)

    @property
    def before(self) -> Tensor:
        """w_{<s} / W̄ at every response token, flat [tokens]."""
        return torch.cat(self.log_before).exp()

    def of_prompts(self, group_sizes: Sequence[int]) -> Tensor:
        """W_n / W̄ of every prompt, [B]: their mean over the whole batch is 1."""
        return torch.stack([part.exp().mean() for part in by_group(self.log_weights, group_sizes)])

    def moved(self, log_changes: Tensor) -> Importance:
        """The weights under a policy whose log-probs of these tokens are higher by ``log_changes``, flat [tokens]."""
        parts = torch.split(log_changes, [len(ratios) for ratios in self.log_ratios])
        together = tuple(ratios + change for ratios, change in zip(self.log_ratios, parts, strict=True))
        return Importance(together, self.log_mean, self.by_prefix)

    def of_rows(self, rows: Sequence[int]) -> Importance:
        """Of these rows alone, W̄ unchanged."""
        return Importance(tuple(self.log_ratios[row] for row in rows), self.log_mean, self.by_prefix)
