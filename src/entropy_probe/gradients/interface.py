"""What a gradient backend returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from torch import Tensor

from entropy_probe.common.arrays import FloatArray
from entropy_probe.gradients.treatments import Rules
from entropy_probe.model.measured import Measured
from entropy_probe.optimizers.base import DotGroup, Look
from entropy_probe.statistics.unit_dots import UnitDots


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


@dataclass(frozen=True)
class Wanted:
    """What is done with unit vectors besides their dots with each other.

    Attributes:
        storage: keep all of them (and get the kernel), or stream them in two passes.
        thirds: whether to find the directions of :mod:`entropy_probe.statistics.noise`, three units or more; where vectors are
            stored.
        look: from Ȳ, and what each term of the loss has in it, what else to take dots of them with. Stored vectors are at hand;
            streamed, it is a third pass.
    """

    storage: Storage = Storage.STORED
    thirds: bool = False
    look: Callable[[Mapping[str, Tensor], Sequence[Mapping[str, Tensor]]], Look] | None = None


DOTS_ALONE = Wanted()
"""Vectors are stored, and nothing else is taken of them."""


@dataclass(frozen=True)
class Directions:
    """What responses are contracted with, each direction by parameter name: ``of_x`` their parts of X, ``of_y`` those of Y."""

    of_x: Sequence[Mapping[str, Tensor]]
    of_y: Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Looked:
    """``along``: XS_u · V_uk, [U, K]. ``kernel``: XS_u · J YS_w with J elementwise, [U, U]; None where streamed. Without P.

    ``term_kernels``: of every term of the loss, XS_u · (J YᵏS_w + J' YS_w), [terms, U, U]; None where streamed.
    """

    along: FloatArray
    kernel: FloatArray | None
    term_kernels: FloatArray | None = None


@dataclass(frozen=True)
class UnitGradients:
    """Dots of unit sums XS_u, YS_u, and the mean update direction.

    Attributes:
        scores: S of every response as this backend's own forward found it, float64 [N], on the CPU.
        dots: by dot group, the dots over its parameters; their sum is the dots over all parameters.
        token_entropies: H_t of every response token by the same forward, flat [tokens]; None where neither X nor Y needed them.
        token_log_probs: log π(y_t) of every response token, [tokens].
        slope: X̄ = (1/B) Σ_n X_n by parameter name, without P: its dot with a step is minus what that does to the entropy, to
            first order.
        ascent: Ȳ = (1/B) Σ_n Y_n by parameter name, without P: minus the gradient of the training loss. Only parameters
            that some response reaches are there.
        untouched: trainable parameters that no response reaches (autograd gives None for them).
        cut: those of them that no routing to experts explains (:func:`~entropy_probe.gradients.unreached.unexplained`).
        third_directions: η P Ȳᵈ and η P X̄ᵈ over the prompts of each third d of the units, by name, what
            :mod:`entropy_probe.statistics.noise` contracts responses with; None where they were not asked for, or vectors
            were streamed.
        coverage: how parameters got their gradients.
        rules: for the next call on the same model; None where the backend has none.
        looked: the dots of the ``look`` that was asked for.
        also: by name of a further target, the dots of its vectors Z_u in the place of X_u, by dot group.
        zero_v: by dot group Σ_{u≠w} XS_u · (1/ε) YS_w over elements with v = 0, in ``dots`` or left out of them.
    """

    dots: Mapping[DotGroup, UnitDots]
    ascent: Mapping[str, Tensor]
    untouched: tuple[str, ...]
    scores: Tensor
    token_entropies: Tensor | None = None
    token_log_probs: Tensor | None = None
    slope: Mapping[str, Tensor] = field(default_factory=dict)
    third_directions: Directions | None = None
    coverage: Coverage = Coverage()
    rules: Rules | None = None
    looked: Looked | None = None
    zero_v: Mapping[DotGroup, float] = field(default_factory=dict)
    also: Mapping[str, Mapping[DotGroup, UnitDots]] = field(default_factory=dict)
    cut: tuple[str, ...] = ()

    @property
    def measured(self) -> Measured:
        """What the forwards found."""
        return Measured(self.scores, self.token_entropies, self.token_log_probs)

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
        """Σ over dot groups η · dots: the inner product in which δH₁ = −U_cross."""
        return self.weighted({group: group.learning_rate for group in self.dots})

    def step_weighted_of(self, name: str) -> UnitDots:
        """The same of a further target: the inner product in which its first-order change is +U_cross."""
        return replace(self, dots=self.also[name]).step_weighted

    @property
    def delta_h1_of_zero_v(self) -> float:
        """−Σ over dot groups η · zero_v / D, D = B² − Σ s_u²: what elements with v = 0 add to δH₁ under P = 1/ε."""
        sizes = next(iter(self.dots.values())).sizes
        pairs = float(sizes.sum() ** 2 - (sizes**2).sum())
        return -sum(group.learning_rate * dot for group, dot in self.zero_v.items()) / pairs + 0.0

    def weighted(self, weights: Mapping[DotGroup, float]) -> UnitDots:
        """Σ over dot groups weight · dots; a group without a weight, as one that no gradient reaches, counts as 0."""
        parts = [dots.scaled(weights.get(group, 0.0)) for group, dots in self.dots.items()]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total
