"""What a trainer's loss sees of the rows: values a response token, laid end to end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from entropy_probe.errors import InputError


@dataclass(frozen=True)
class LossRows:
    """What a loss is a function of. Tensors are flat over response tokens, [tokens], float64 and without graph.

    Attributes:
        lengths: T of every response, [N]; a response's tokens stand together, in the order of responses.
        log_probs: log π_θ(y_t) at θ, nats.
        advantages: A at every token.
        mask: 1 where a token is in the loss, 0 where it is not.
        old_log_probs: the trainer's log π_old, of which it takes the ratio; None where the ratio is 1.
        sampler_log_probs: the sampler's log-probs; None where they are not known.
        ref_log_probs: the reference policy's, for a KL term; None without one.
        entropies: H_t of the distribution that token t was drawn from, nats; None where no loss needs it.
        micro_batches: the micro-batch of every response, [N]; None: all in one.
        token_weights: what multiplies a token's loss, and no term beside it; None for ones.
    """

    lengths: tuple[int, ...]
    log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    old_log_probs: Tensor | None = None
    sampler_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    entropies: Tensor | None = None
    micro_batches: tuple[int, ...] | None = None
    token_weights: Tensor | None = None

    @cached_property
    def row_of_token(self) -> Tensor:
        """The response of every token, [tokens]."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))

    @cached_property
    def counts(self) -> Tensor:
        """Σ_t m_t of every response, 1 at least, float64 [N]."""
        return self.summed(self.mask).clamp(min=1.0)

    @property
    def tokens_in_loss(self) -> list[int]:
        """Σ_t m_t of every response, as it is."""
        return [round(count) for count in self.summed(torch.ones_like(self.mask)).tolist()]

    @cached_property
    def micro_batch_of_token(self) -> Tensor:
        """Which micro-batch a token is in, from 0, [tokens]."""
        if self.micro_batches is None:
            return torch.zeros_like(self.row_of_token)
        places = {part: place for place, part in enumerate(dict.fromkeys(self.micro_batches))}
        return torch.tensor([places[part] for part in self.micro_batches])[self.row_of_token]

    @property
    def old(self) -> Tensor:
        """log π_old; log π_θ where the ratio is 1."""
        return self.log_probs if self.old_log_probs is None else self.old_log_probs

    def summed(self, values: Tensor) -> Tensor:
        """Σ_t m_t v_t of every response: [N] from [tokens]."""
        return values.new_zeros(len(self.lengths)).index_add(0, self.row_of_token, values * self.mask)

    def averaged(self, values: Tensor) -> Tensor:
        """Σ_t m_t v_t / Σ_t m_t of every response: [N] from [tokens]."""
        return self.summed(values) / self.counts

    def at_tokens(self, values: Tensor) -> Tensor:
        """A response's value at each of its tokens: [tokens] from [N]."""
        return values[self.row_of_token]


def required(values: Tensor | None, column: str, why: str) -> Tensor:
    """A column that a loss cannot do without.

    Raises:
        InputError: the rows do not have it.
    """
    if values is None:
        raise InputError(f"{why} needs {column} at every response token, which the rows lack; record them")
    return values
