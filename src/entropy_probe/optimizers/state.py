"""Adam's state as the probe uses it: moments and settings, by parameter name.

After t steps on gradients g₁ … g_t a parameter's moments are m = (1 − β₁) Σ_k β₁^{t−k} g_k (``exp_avg``) and
v = (1 − β₂) Σ_k β₂^{t−k} g_k² (``exp_avg_sq``), both without bias correction, and under amsgrad the largest v so far
(``max_exp_avg_sq``). t counts the steps in which the parameter had a gradient, so parameters may differ in it.
Sources: Kingma & Ba (2015); Reddi et al. (2018); torch.optim.Adam and AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from entropy_probe.errors import InputError

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class Library(StrEnum):
    """Whose code takes the step. All but torch's compute it in float32, whatever type weights and moments are held in."""

    TORCH = "torch"
    BITSANDBYTES = "bitsandbytes"
    TORCHAO = "torchao"


@dataclass(frozen=True)
class AdamMoments:
    """Adam's state for one parameter, as torch.optim keeps it.

    ``step`` is t, the number of updates taken; ``max_exp_avg_sq`` is amsgrad's running maximum of v, or None.
    """

    step: int
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None = None


@dataclass(frozen=True)
class AdamGroup:
    """Settings of one parameter group, and the parameters' names in the optimizer's order.

    ``decoupled_weight_decay`` tells AdamW (true) from Adam with L2 (false); ``fused`` torch's fused kernel, whose arithmetic is
    float32 whatever the weights are held in; ``library`` whose optimizer it is.
    """

    names: tuple[str, ...]
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    decoupled_weight_decay: bool
    fused: bool = False
    library: Library = Library.TORCH

    @property
    def in_float32(self) -> bool:
        """Whether the step is computed in float32 and only its result is rounded to the type of the weights."""
        return self.fused or self.library is not Library.TORCH


@dataclass(frozen=True)
class AdamState:
    """The whole optimizer: its groups, and the moments of every trainable parameter by name.

    Attributes:
        groups: settings of every parameter group (learning rate, β₁, β₂, ε, weight decay), with its parameters' names.
        moments: m, v and the step count t of every parameter, in the parameter's own shape. m has the unit of the gradient
            (nats per unit of the parameter), v its square.

    Example:
        >>> import torch
        >>> from entropy_probe import state_of_optimizer
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.0)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> state = state_of_optimizer(optimizer, model)
        >>> tuple(state.moments["weight"].exp_avg_sq.shape), state.with_learning_rate(0.25).learning_rates
        ((2, 3), (0.25,))
    """

    groups: tuple[AdamGroup, ...]
    moments: Mapping[str, AdamMoments]

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The distinct learning rates of non-empty groups, in the order of the groups."""
        return tuple(dict.fromkeys(self.group_rates))

    @property
    def group_rates(self) -> tuple[float, ...]:
        """The learning rate of every non-empty group, in order."""
        return tuple(group.learning_rate for group in self.groups if group.names)

    def with_learning_rate(self, learning_rate: float) -> AdamState:
        """The same state with one learning rate for every group.

        Raises:
            InputError: not finite, or below 0.
        """
        if not (math.isfinite(learning_rate) and learning_rate >= 0):
            raise InputError(f"learning rate is {learning_rate}; expected a finite number, 0 or above")
        return AdamState(tuple(replace(group, learning_rate=learning_rate) for group in self.groups), self.moments)

    def group_of(self) -> dict[str, AdamGroup]:
        """The group of each parameter, by name."""
        return {name: group for group in self.groups for name in group.names}


def second_moment(moments: AdamMoments, group: AdamGroup) -> Tensor:
    """v of one parameter, as P has it: amsgrad's running maximum where there is one."""
    largest = moments.max_exp_avg_sq if group.amsgrad else None
    return moments.exp_avg_sq if largest is None else largest


def moments_problem(moments: AdamMoments | None, shape: torch.Size) -> str | None:
    """What is wrong with one parameter's Adam state, in words, or None."""
    if moments is None:
        return (
            "no Adam state (exp_avg_sq): it never received a gradient, or the optimizer did not train it; "
            "freeze it, or train a step that reaches it"
        )
    problem = misshapen(moments, shape)
    if problem is not None:
        return problem
    for field in MOMENTS:
        moment: Tensor | None = getattr(moments, field)
        if moment is None:
            continue
        for what, bad in (("NaN", moment.isnan()), ("an infinite value", moment.isinf())):
            if bool(bad.any()):
                return f"{field} holds {what}; the optimizer state is damaged"
        if field != "exp_avg" and bool((moment < 0).any()):
            return f"{field} holds a negative value, which a mean of squares cannot; the optimizer state is damaged"
    if moments.step < 1:
        return f"Adam's step is {moments.step}; the preconditioner needs at least one step"
    return None


def misshapen(moments: AdamMoments, shape: torch.Size) -> str | None:
    """Which moment is not of the parameter's shape, in words, or None."""
    for field in MOMENTS:
        moment: Tensor | None = getattr(moments, field)
        if moment is not None and moment.shape != shape:
            return (
                f"{field} has shape {tuple(moment.shape)}, the parameter {tuple(shape)}; "
                "is this the optimizer state of another model?"
            )
    return None


def moments_from_entry(entry: Mapping[str, Any]) -> AdamMoments:
    """One parameter's entry of ``optimizer.state``; its step may be an int or a tensor."""
    return AdamMoments(int(entry["step"]), entry["exp_avg"], entry["exp_avg_sq"], entry.get("max_exp_avg_sq"))


def group_from_settings(group: Mapping[str, Any], names: Sequence[str]) -> AdamGroup:
    """One of ``optimizer.param_groups``, with its parameters' names.

    Raises:
        InputError: a setting that Adam has is missing or out of range.
    """
    missing = [key for key in ("lr", "betas", "eps") if key not in group]
    if missing:
        raise InputError(f"a parameter group has no {', '.join(missing)}; expected the groups of Adam or AdamW")
    try:
        learning_rate, eps = float(group["lr"]), float(group["eps"])
        beta1, beta2 = (float(beta) for beta in group["betas"])
        weight_decay = float(group.get("weight_decay", 0.0))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"a parameter group's lr, eps, betas or weight_decay are not what Adam has ({error})"
        ) from error
    for what, value, limit in (
        ("learning rate", learning_rate, math.inf),
        ("beta1", beta1, 1.0),
        ("beta2", beta2, 1.0),
        ("eps", eps, math.inf),
        ("weight_decay", weight_decay, math.inf),
    ):
        if not 0.0 <= value < limit:
            upper = "finite" if limit == math.inf else "below 1"
            raise InputError(f"a parameter group's {what} is {value}; expected 0 or above, and {upper}")
    return AdamGroup(
        names=tuple(names),
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=bool(group.get("amsgrad", False)),
        maximize=bool(group.get("maximize", False)),
        # Written by torch from 2.7 on; the Trainer's default has always been AdamW.
        decoupled_weight_decay=bool(group.get("decoupled_weight_decay", True)),
        fused=bool(group.get("fused", False)),
        library=Library(group.get("library", Library.TORCH)),
    )
