"""The scalar whose gradient is a weighted sum of ∇S_ng."""

from __future__ import annotations

from torch import Tensor


def probe_loss(scores: Tensor, coefficients: Tensor) -> Tensor:
    """L = Σ_i coefficient_i S_i, a scalar whose gradient is Σ_i coefficient_i ∇S_i.

    With :func:`~entropy_probe.targets.score.score_coefficients` this is the guide's L_X summed over prompts, with A w its L_Y.
    """
    return (coefficients.detach().to(scores) * scores).sum()
