"""The state of an optimizer that is in use: which ones are Adam, and what each parameter's entry holds.

Only steps that are known are taken: torch's Adam and AdamW, also inside of accelerate's wrapper. Others are refused by name.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from entropy_probe.compat.checkpoint_wrappers import named_parameters
from entropy_probe.compat.fsdp import held_part, reshard
from entropy_probe.compat.torch_modules import unwrap
from entropy_probe.errors import InputError
from entropy_probe.optimizers.state import AdamGroup, AdamMoments, AdamState, group_from_settings, moments_from_entry

ACCELERATED = ("accelerate.optimizer", "AcceleratedOptimizer")
"""Module and name of accelerate's wrapper, which need not be there to be known."""

MATRIX_WISE = ("muon", "shampoo", "soap")
"""Parts of the names of optimizers whose step is not elementwise, in lower case."""


def state_of_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> AdamState:
    """The state of a live Adam or AdamW, mapped to the model's names by parameter identity.

    Where FSDP2 has sharded the model, these are this rank's rows. The moments are the optimizer's own tensors, not copies.
    A trainable parameter without state is left out here, and :func:`probe` then names it.

    Args:
        optimizer: torch's Adam or AdamW, or accelerate's wrapper of one (``trainer.optimizer``).
        model: what the optimizer trains, wrapped by DDP or not.

    Raises:
        InputError: the optimizer is not Adam or AdamW, is a subclass with a step of its own, or holds a trainable parameter
            that the model does not.

    Example:
        >>> import torch
        >>> from entropy_probe import state_of_optimizer
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> state = state_of_optimizer(optimizer, model)
        >>> state.learning_rates, {name: moments.step for name, moments in state.moments.items()}
        ((0.5,), {'weight': 1, 'bias': 1})
    """
    optimizer = _plain_adam(optimizer)
    model = unwrap(model)
    reshard(model)
    names = {id(p): name for name, p in named_parameters(model)}
    groups: list[AdamGroup] = []
    moments: dict[str, AdamMoments] = {}
    for group in optimizer.param_groups:
        members = []
        for p in group["params"]:
            if not p.requires_grad:
                continue
            if id(p) not in names:
                raise InputError(
                    f"the optimizer trains a parameter of shape {tuple(p.shape)} that the model does not have"
                )
            members.append(names[id(p)])
            entry = optimizer.state.get(p, {})
            if "exp_avg_sq" in entry:
                held = {key: held_part(value) if isinstance(value, Tensor) else value for key, value in entry.items()}
                moments[names[id(p)]] = moments_from_entry(held)
        coupled = {"decoupled_weight_decay": isinstance(optimizer, torch.optim.AdamW)}
        groups.append(group_from_settings(coupled | dict(group), members))
    return AdamState(tuple(groups), moments)


def _is_matrix_wise(kind: type) -> bool:
    return any(name in cls.__name__.lower() for cls in kind.__mro__ for name in MATRIX_WISE)


def _plain_adam(optimizer: torch.optim.Optimizer) -> torch.optim.Adam:
    """The torch.optim.Adam or AdamW in accelerate's wrappers.

    Raises:
        InputError: it is another optimizer, or steps otherwise.
    """
    while any((cls.__module__, cls.__name__) == ACCELERATED for cls in type(optimizer).__mro__):
        inner = vars(optimizer).get("optimizer")
        if not isinstance(inner, torch.optim.Optimizer):
            raise InputError(
                f"the optimizer is accelerate's {type(optimizer).__name__} without an optimizer inside; give the "
                "torch.optim.Adam or AdamW that it steps"
            )
        optimizer = inner
    kind = type(optimizer)
    # AdamW has been a subclass of Adam only since torch 2.7.
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        why = ", whose step multiplies whole matrices and has no P of each element" if _is_matrix_wise(kind) else ""
        raise InputError(f"the optimizer is {kind.__name__}{why}; the probe needs torch.optim.Adam or AdamW")
    # torch wraps the step of a class for its profiler, schedulers that of an object.
    own = inspect.unwrap(kind.step)
    if own not in {inspect.unwrap(torch.optim.Adam.step), inspect.unwrap(torch.optim.AdamW.step)}:
        raise InputError(
            f"the optimizer is {kind.__module__}.{kind.__qualname__}, a subclass of Adam with a step of its own "
            f"({own.__module__}.{own.__qualname__}), which the probe does not know; it needs torch.optim.Adam or AdamW"
        )
    return optimizer
