"""What a gradient backend returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor

from entropy_probe.gradients.treatments import Rules
from entropy_probe.u_statistics import FloatArray, UnitDots


class Storage(StrEnum):
    """``stored``: all unit vectors are held and one product gives the U × U matrix. ``streamed``: two passes, no matrix."""

    STORED = "stored"
    STREAMED = "streamed"


@dataclass(frozen=True)
class Coverage:
    """How trainable parameters got their sequences' gradients, by name. All are exact; they differ in cost.

    Attributes:
        recomputed: their module ran once more in the backward, a sequence at a time.
        fallback: a forward and two backwards of whole units; rules could not tell their sequences apart.
        fallback_share: of the trainable elements, by fallback.
    """

    recomputed: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()
    fallback_share: float = 0.0


class Look(Protocol):
    """What else to take dots with, once Ȳ is known."""

    def of(self, name: str, part: slice) -> tuple[Tensor, Tensor]:
        """V [K, elements] and W [J, elements] of elements ``part`` of one parameter laid flat, float64."""


@dataclass(frozen=True)
class Looked:
    """``along``: XS_u · V_k, [U, K]. ``own``: XS_u · W_j YS_u with W elementwise, [U, J]. Without P."""

    along: FloatArray
    own: FloatArray


@dataclass(frozen=True)
class UnitGradients:
    """Dots of unit sums XS_u, YS_u, and the mean update direction.

    Attributes:
        scores: S of every response as this backend's own forward found it, float64 [N], on the CPU.
        dots: by learning rate, the dots over the parameters that have it; their sum is the dots over all parameters.
        token_entropies: H_t of every response token by the same forward, flat [tokens]; None where X did not need them.
        ascent: Ȳ = (1/B) Σ_n Y_n by parameter name, without P: minus the gradient of the training loss. Only parameters
            that some response reaches are there.
        untouched: trainable parameters that no response reaches (autograd gives None for them).
        coverage: how parameters got their gradients.
        rules: for the next call on the same model; None where the backend has none.
        looked: the dots of the ``look`` that was asked for.
    """

    dots: Mapping[float, UnitDots]
    ascent: Mapping[str, Tensor]
    untouched: tuple[str, ...]
    scores: Tensor
    token_entropies: Tensor | None = None
    coverage: Coverage = Coverage()
    rules: Rules | None = None
    looked: Looked | None = None

    @property
    def total(self) -> UnitDots:
        """The dots over all parameters."""
        parts = iter(self.dots.values())
        total = next(parts)
        for part in parts:
            total = total + part
        return total

    @property
    def step_weighted(self) -> UnitDots:
        """Σ over learning rates η · dots: the inner product in which δH₁ = −U_cross."""
        return self.weighted({rate: rate for rate in self.dots})

    def weighted(self, weights: Mapping[float, float]) -> UnitDots:
        """Σ over learning rates weight · dots."""
        parts = [dots.scaled(weights[rate]) for rate, dots in self.dots.items()]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total
