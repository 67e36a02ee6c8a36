"""Parameters that no gradient reaches: something cuts the graph between them and the log-probs, or the forward leaves them out.

An expert that no token is routed to does not run, and its gradient is rightly nothing. Any other stands below a ``detach``, a
``no_grad`` or a kernel without a backward, or in a layer that is skipped. Where Adam's moments say that training did reach it,
the step computed here would not be the trainer's, and silently so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
from torch import nn

from entropy_probe.compat.checkpoint_wrappers import unwrapped_names
from entropy_probe.errors import InputError
from entropy_probe.gradients.capture.modules import parameter_owners
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.base import OptimizerState
from entropy_probe.ranks.sharding import Sharding

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


@contextmanager
def watched(policy: Policy) -> Iterator[set[str]]:
    """Within the block, the names of trainable parameters whose modules are called gather in the set that it yields."""
    ran: set[str] = set()
    with noting(callers(policy.model, parameter_owners(policy.model, policy.trainable())), ran):
        yield ran


def unexplained(model: nn.Module, untouched: Sequence[str], ran: Collection[str]) -> tuple[str, ...]:
    """Of parameters that no response reaches, those for which routing is no reason.

    Routing is the reason where a component of the parameter's name holds "expert", its module did not run, and a router (a
    module called "gate", or with "router" in its name) stands beside the experts or above. That the router itself ran is not
    asked: it may be frozen, and a trained one in a layer that is left out is named for itself.

    Args:
        model: whose modules tell where routers are.
        untouched: names of trainable parameters that no response reaches.
        ran: names of parameters whose modules a forward has called, on any rank.
    """
    paths = unwrapped_names(model)
    around = {
        path.rpartition(".")[0]
        for path in paths
        for last in [path.rpartition(".")[2]]
        if last == "gate" or "router" in last
    }
    return tuple(name for name in untouched if name in ran or not _routed(name, around))


def _routed(name: str, around_routers: Collection[str]) -> bool:
    """Whether the experts that a parameter is of stand in a module, or inside of one, that holds a router."""
    parts = name.split(".")
    expert = next((number for number, part in enumerate(parts) if "expert" in part), None)
    return expert is not None and any(".".join(parts[:end]) in around_routers for end in range(expert + 1))


def trained_before(names: Sequence[str], optimizer: OptimizerState, sharding: Sharding) -> tuple[str, ...]:
    """Those to which a gradient came in training, as the optimizer's state tells.

    Args:
        names: of parameters; the same on all ranks.
        optimizer: its state; of shards this rank's rows.
        sharding: who holds what.
    """
    if not names:
        return ()
    flags = np.array([float(optimizer.had_gradient(name)) for name in names])
    every = sharding.ranks.sum_numbers(flags) if sharding.sharded else flags
    return tuple(name for name, flag in zip(names, every, strict=True) if flag)


def refuse_cut(cut: Sequence[str], optimizer: OptimizerState, sharding: Sharding) -> None:
    """Refuse parameters that no gradient reached, for no reason of routing, and that training did reach.

    Args:
        cut: see :func:`unexplained`; the same on all ranks.
        optimizer: whose state tells that a gradient came in training; of shards this rank's rows.
        sharding: who holds what.

    Raises:
        InputError: the first of them is named.
    """
    trained = trained_before(cut, optimizer, sharding)
    if trained:
        more = f" (and {len(trained) - 1} more parameters)" if len(trained) > 1 else ""
        raise InputError(
            f"parameter {trained[0]}{more} was trained, as Adam's moments tell, but no response's gradient reaches it: "
            "something cuts the graph (detach, no_grad, or quantised layers without a backward in evaluation mode), or the "
            "forward leaves it out; mend the forward, or switch requires_grad off for what is not to be trained"
        )
