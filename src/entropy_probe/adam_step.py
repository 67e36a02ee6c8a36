"""Steps that an optimizer would take from θ along a given ascent direction Ȳ.

``preconditioned_step`` is the step that δH₁ is about, Δθ = η P Ȳ with v at t. ``optimizer_step`` is what torch.optim does
with the gradient −Ȳ: momentum, v updated with the fresh gradient, bias correction at t + 1, weight decay. Source: guide
section 4A.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from entropy_probe.adam_preconditioner import AdamState


def preconditioned_step(
    ascent: Mapping[str, Tensor], preconditioners: Mapping[str, Tensor], learning_rates: Mapping[str, float]
) -> dict[str, Tensor]:
    """Δθ = η P Ȳ by parameter name, float64."""
    return {name: learning_rates[name] * preconditioners[name].to(y.device) * y.double() for name, y in ascent.items()}


def optimizer_step(
    parameters: Mapping[str, nn.Parameter], state: AdamState, ascent: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Δθ, float64, of one real ``torch.optim`` step on the loss gradient −Ȳ from the given state; no gradient clipping.

    The step is taken on clones of the parameters and of the state, which are left alone. Groups whose weight decay is
    decoupled are stepped by AdamW, the others by Adam. Parameters that no response reaches have no gradient and stay, as in
    training. (A deep copy of the whole model would not do: a trainer may have bound a patched forward to the original.)

    Args:
        parameters: the trainable parameters at θ, by name.
        state: of every one of them.
        ascent: Ȳ by name.
    """
    deltas: dict[str, Tensor] = {}
    for group in state.groups:
        # A parameter frozen since the state was taken has no gradient, and the optimizer would pass it by.
        clones = {n: nn.Parameter(parameters[n].detach().clone()) for n in group.names if n in parameters}
        if not clones:
            continue
        optimizer_class = torch.optim.AdamW if group.decoupled_weight_decay else torch.optim.Adam
        optimizer = optimizer_class(
            list(clones.values()),
            lr=group.learning_rate,
            betas=(group.beta1, group.beta2),
            eps=group.eps,
            weight_decay=group.weight_decay,
            amsgrad=group.amsgrad,
            maximize=group.maximize,
        )
        for name, clone in clones.items():
            moments = state.moments[name]
            entry = {
                "step": torch.tensor(float(moments.step)),
                "exp_avg": moments.exp_avg.to(clone, copy=True),
                "exp_avg_sq": moments.exp_avg_sq.to(clone, copy=True),
            }
            if group.amsgrad and moments.max_exp_avg_sq is not None:
                entry["max_exp_avg_sq"] = moments.max_exp_avg_sq.to(clone, copy=True)
            optimizer.state[clone] = entry
            if name in ascent:
                # Under maximize the optimizer ascends what it is given.
                sign = 1.0 if group.maximize else -1.0
                clone.grad = (sign * ascent[name]).to(clone)
        optimizer.step()
        for name, clone in clones.items():
            deltas[name] = clone.detach().double() - parameters[name].detach().double()
    return deltas
