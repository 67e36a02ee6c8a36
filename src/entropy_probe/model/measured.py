"""What a forward of the policy gives: log-probs and entropies, a token or a response each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenValues:
    """log π(y_t) of each response token and the entropy H_t of the distribution that it was drawn from, nats.

    [tokens] each, float32 or float64, with the graph if gradients are enabled; ``entropies`` is None where not asked for.
    """

    log_probs: Tensor
    entropies: Tensor | None


@dataclass(frozen=True)
class Measured:
    """S of every response [N], and H and log π(y_t) of every response token [tokens] in the order of the responses; nats.

    Float64, on the CPU, without gradients. ``entropies`` and ``log_probs`` are None where they were not asked for.
    """

    scores: Tensor
    entropies: Tensor | None
    log_probs: Tensor | None = None
