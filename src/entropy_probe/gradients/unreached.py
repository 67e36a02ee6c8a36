"""Parameters whose modules run and which no gradient reaches: something cuts the graph between them and the log-probs.

An expert that no token is routed to does not run, and its gradient is rightly nothing. A module that runs and gets none stands
below a ``detach``, a ``no_grad`` or a kernel without a backward. Where Adam's moments say that training did reach it, the step
computed here would not be the trainer's, and silently so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
from torch import nn

from entropy_probe.adam_preconditioner import AdamState
from entropy_probe.collectives import Sharding
from entropy_probe.errors import InputError

CONTAINERS = (nn.ParameterDict, nn.ParameterList, nn.ModuleDict, nn.ModuleList)
"""Modules that hold parameters and are never called: the module around them is."""


def callers(model: nn.Module, owners: Mapping[nn.Module, Mapping[str, str]]) -> dict[nn.Module, set[str]]:
    """By module, the names of the parameters that run when it is called; ``owners`` are those that hold them."""
    around = {child: module for module in model.modules() for child in module.children()}
    found: dict[nn.Module, set[str]] = {}
    for owner, names in owners.items():
        module = owner
        while isinstance(module, CONTAINERS) and module in around:
            module = around[module]
        found.setdefault(module, set()).update(names.values())
    return found


@contextmanager
def noting(of: Mapping[nn.Module, set[str]], ran: set[str]) -> Iterator[None]:
    """Within the block ``ran`` takes up the names of modules that are called; those that it has are not watched."""
    with ExitStack() as stack:
        for module, names in of.items():
            if not names <= ran:
                stack.callback(module.register_forward_pre_hook(_noting(names, ran)).remove)
        yield


def _noting(names: set[str], ran: set[str]) -> Callable[..., None]:
    def hook(module: nn.Module, args: object) -> None:
        ran.update(names)

    return hook


def refuse_cut(cut: Sequence[str], adam: AdamState, sharding: Sharding) -> None:
    """Refuse parameters that ran, that no gradient reached, and that training did reach.

    Args:
        cut: names of parameters that ran and that no response reaches; the same on all ranks.
        adam: whose second moments tell that a gradient came in training; of shards this rank's rows.
        sharding: who holds what.

    Raises:
        InputError: the first of them is named.
    """
    known = [name for name in cut if name in adam.moments]
    if not known:
        return
    flags = np.array([float(bool((adam.moments[name].exp_avg_sq != 0).any())) for name in known])
    every = sharding.ranks.sum_numbers(flags) if sharding.sharded else flags
    trained = [name for name, flag in zip(known, every, strict=True) if flag]
    if trained:
        more = f" (and {len(trained) - 1} more parameters)" if len(trained) > 1 else ""
        raise InputError(
            f"parameter {trained[0]}{more} was trained, as Adam's moments tell, and its module runs in the forward, but no "
            "response's gradient reaches it: something cuts the graph (detach, no_grad, or quantised layers without a backward "
            "in evaluation mode); mend the forward, or switch requires_grad off for what is not to be trained"
        )
