"""A computed update against the one that two checkpoints show, beside what the rounding of the weights explains.

With Δ the computed update and R = θ⁺ − θ the real one, all norms over every trainable element,

    relative error  ‖Δ − R‖ / ‖R‖                    rounding floor  ‖ulp(θ⁺)/2‖ / ‖R‖, what storing θ⁺ may cost at most
    expected rounding  r = ‖rd(θ + Δ) − (θ + Δ)‖ / ‖R‖    net error  √max(0, error² − r²)

rd rounds to the type that the weights are stored in, as often as the optimizer does. An error of storage has no relation to one
of the computation, so their squares add, and what is left after r² is the computation's own. Everything is summed in float64.
Source: IEEE 754 rounding to nearest; the recovered gradient is Adam's recursion m⁺ = β₁ m + (1 − β₁) g solved for g (Kingma &
Ba, 2015).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_probe.optimizers.state import AdamState
from entropy_probe.optimizers.stored_precision import shrunk_then_added, spacing, storage_type


@dataclass(frozen=True)
class ParameterError:
    """One parameter: ‖Δ − R‖ / ‖R‖ over it, None where it did not move, and its share of the squared error of all."""

    name: str
    relative_error: float | None
    share: float


@dataclass(frozen=True)
class UpdateComparison:
    """See the module. ``cosine`` is of Δ and R and ``norm_ratio`` ‖Δ‖/‖R‖; ``cosine`` is None where Δ is zero.

    ``update_norm`` is ‖R‖; ``parameters`` come with the largest share of the squared error first.
    """

    relative_error: float
    error_net: float
    rounding_floor: float
    rounding_expected: float
    cosine: float | None
    norm_ratio: float
    update_norm: float
    parameters: tuple[ParameterError, ...]


def compare_updates(
    before: Mapping[str, Tensor],
    computed: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    decays: Mapping[str, float] | None = None,
) -> UpdateComparison:
    """Δ against θ⁺ − θ.

    Args:
        before: θ by name.
        computed: Δ by name; a parameter without one is said not to move.
        after: θ⁺, the same names.
        decays: η λ by name, of decoupled weight decay: the optimizer multiplies it in first, a rounding more.

    Raises:
        ValueError: the weights did not move, so that nothing is relative to anything.
    """
    decays = decays or {}
    errors: dict[str, tuple[float, float]] = {}
    error = real = made = dot = floor = rounding = 0.0
    for name, old in before.items():
        theta = old.detach().double()
        new = after[name].detach().to(theta)
        moved = new - theta
        delta = computed[name].to(theta) if name in computed else torch.zeros_like(theta)
        gap, size = _squared(delta - moved), _squared(moved)
        errors[name] = (gap, size)
        error, real, made = error + gap, real + size, made + _squared(delta)
        dot += float((delta * moved).sum())
        if size > 0.0 or name in computed:
            stored = storage_type(new)
            floor += _squared(spacing(new, stored) / 2)
            rounding += _squared(shrunk_then_added(theta, delta, decays.get(name, 0.0), stored) - (theta + delta))
    if real == 0.0:
        raise ValueError("the weights did not move")
    ordered = sorted(errors.items(), key=lambda item: -item[1][0])
    return UpdateComparison(
        relative_error=math.sqrt(error / real),
        error_net=math.sqrt(max(0.0, error - rounding) / real),
        rounding_floor=math.sqrt(floor / real),
        rounding_expected=math.sqrt(rounding / real),
        cosine=dot / math.sqrt(made * real) if made > 0.0 else None,
        norm_ratio=math.sqrt(made / real),
        update_norm=math.sqrt(real),
        parameters=tuple(
            ParameterError(name, math.sqrt(gap / size) if size > 0.0 else None, gap / error if error > 0.0 else 0.0)
            for name, (gap, size) in ordered
        ),
    )


def recovered_gradient(
    before: AdamState, after: AdamState, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """g = (m⁺ − β₁ m) / (1 − β₁), the clipped loss gradient that the optimizer was given, by name, float64.

    Coupled weight decay was added to it and is taken off. Rounding leaves an error of about ulp(m) / (1 − β₁).

    Args:
        before: at θ.
        after: one step later, under the same names.
        parameters: θ by name.

    Returns:
        None where a parameter's moments are not one step apart, or are on one side only.
    """
    found = {}
    for name, group in before.group_of().items():
        if name not in parameters:
            continue
        old, new = before.moments.get(name), after.moments.get(name)
        if old is None or new is None or new.step != old.step + 1:
            return None
        gradient = (new.exp_avg.double() - group.beta1 * old.exp_avg.double()) / (1.0 - group.beta1)
        if not group.decoupled_weight_decay:
            gradient -= group.weight_decay * parameters[name].detach().double().to(gradient.device)
        found[name] = gradient
    return found


@dataclass(frozen=True)
class GradientComparison:
    """The computed gradient against the recovered one: ‖ours − theirs‖/‖theirs‖, cosine, ‖ours‖/‖theirs‖.

    ``scale`` is the factor that brings ours nearest to theirs. None where one of them is zero.
    """

    relative_error: float
    cosine: float
    norm_ratio: float
    scale: float


def compare_gradients(computed: Mapping[str, Tensor], recovered: Mapping[str, Tensor]) -> GradientComparison | None:
    """Two gradients by name; a parameter that ours lacks is zero there. None where one of them is zero."""
    gap = ours = theirs = dot = 0.0
    for name, expected in recovered.items():
        g = expected.double()
        mine = computed[name].to(g) if name in computed else torch.zeros_like(g)
        gap, ours, theirs = gap + _squared(mine - g), ours + _squared(mine), theirs + _squared(g)
        dot += float((mine * g).sum())
    if ours == 0.0 or theirs == 0.0:
        return None
    return GradientComparison(
        math.sqrt(gap / theirs), dot / math.sqrt(ours * theirs), math.sqrt(ours / theirs), dot / ours
    )


def fitted_factor(computed: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> float | None:
    """c that minimises ‖real − c computed‖² over the computed names; None where computed is zero."""
    size = sum(_squared(value) for value in computed.values())
    if size == 0.0:
        return None
    return (
        sum(float((value.double() * real[name].to(value.device).double()).sum()) for name, value in computed.items())
        / size
    )


def micro_batch_entropy(
    entropies: Tensor, lengths: Sequence[int], micro_batches: Sequence[int], mask: Tensor | None = None
) -> float:
    """What TRL logs as ``entropy``: the mean over micro-batches of Σ_t m_t H_t / Σ_t m_t, nats per token.

    Args:
        entropies: H_t of every response token, flat [tokens].
        lengths: T of every response.
        micro_batches: its micro-batch.
        mask: m, 0 at tokens that are not in the loss, [tokens]; None for ones.
    """
    kept = torch.ones(len(entropies), dtype=torch.float64) if mask is None else mask.double()
    index = torch.unique(torch.tensor(list(micro_batches)), return_inverse=True)[1]
    sums, counts = (
        torch.stack([part.sum() for part in torch.split(values, list(lengths))])
        for values in (entropies.double() * kept, kept)
    )
    count = int(index.max()) + 1
    nats = torch.zeros(count, dtype=torch.float64).index_add_(0, index, sums)
    tokens = torch.zeros(count, dtype=torch.float64).index_add_(0, index, counts)
    return float((nats / tokens.clamp(min=1.0)).mean())


def _squared(values: Tensor) -> float:
    return float((values.double() ** 2).sum())
