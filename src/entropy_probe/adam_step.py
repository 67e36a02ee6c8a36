"""Steps that an optimizer would take from θ along a given ascent direction Ȳ.

``preconditioned_step`` is the step that δH₁ is about, Δθ = η P Ȳ with v at t. ``adamw_step`` is what torch.optim does with the
gradient −Ȳ: momentum, v updated with the fresh gradient, bias correction at t + 1, weight decay. Source: guide section 4A.
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


def take_adamw_step(model: nn.Module, state: AdamState, ascent: Mapping[str, Tensor]) -> None:
    """Move ``model`` by one real ``torch.optim`` step on the loss gradient −Ȳ, from the given state; no gradient clipping.

    Pass a clone. Groups whose weight decay is decoupled are stepped by AdamW, the others by Adam. Parameters that no
    response reaches have no gradient and stay, as in training.
    """
    parameters = dict(model.named_parameters())
    for group in state.groups:
        if not group.names:
            continue
        optimizer_class = torch.optim.AdamW if group.decoupled_weight_decay else torch.optim.Adam
        optimizer = optimizer_class(
            [parameters[name] for name in group.names],
            lr=group.learning_rate,
            betas=(group.beta1, group.beta2),
            eps=group.eps,
            weight_decay=group.weight_decay,
            amsgrad=group.amsgrad,
            maximize=group.maximize,
        )
        for name in group.names:
            parameter, moments = parameters[name], state.moments[name]
            entry = {
                "step": torch.tensor(float(moments.step)),
                "exp_avg": moments.exp_avg.to(parameter, copy=True),
                "exp_avg_sq": moments.exp_avg_sq.to(parameter, copy=True),
            }
            if group.amsgrad and moments.max_exp_avg_sq is not None:
                entry["max_exp_avg_sq"] = moments.max_exp_avg_sq.to(parameter, copy=True)
            optimizer.state[parameter] = entry
            if name in ascent:
                # Under maximize the optimizer ascends what it is given.
                sign = 1.0 if group.maximize else -1.0
                parameter.grad = (sign * ascent[name]).to(parameter)
            else:
                parameter.grad = None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
