"""The step that δH₁ is about: Δθ = η P Ȳ with v at t."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def preconditioned_step(
    ascent: Mapping[str, Tensor], preconditioners: Mapping[str, Tensor], learning_rates: Mapping[str, float]
) -> dict[str, Tensor]:
    """Δθ = η P Ȳ by parameter name, float64."""
    return {name: learning_rates[name] * preconditioners[name].to(y.device) * y.double() for name, y in ascent.items()}
