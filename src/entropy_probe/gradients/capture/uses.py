"""Watch a model's forwards so that each use of a trainable parameter hands its sequences' gradients over in the backward.

Capture looks at the torch functions that a model calls and not at its classes: ``F.linear(x, W)`` with a trainable W is the
same whether an ``nn.Linear``, a LoRA factor, a router or a head calls it, and a tied weight is the same tensor wherever it
is used.

Rules by function are in :mod:`~entropy_probe.gradients.capture.layers`. What no function shows (norms spelled by hand,
expert tensors) is handled by module, :mod:`~entropy_probe.gradients.capture.modules`. A parameter that a rule cannot serve
stays in autograd's graph, where :func:`leaked` finds it: nothing is skipped unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from entropy_probe.gradients.capture.sequences import Strip
from entropy_probe.model.float64_mode import Float64Mode

Rule = Callable[["Capture", tuple[Any, ...], Mapping[str, Any]], Any]
"""Computes what a torch function would, with trainable parameters captured; NotImplemented leaves it to torch."""

Leaf = tuple[str, Tensor, Strip]
"""A parameter's name, its copy with a leading sequence dimension, and the rows that it was made for."""


class Sink(Protocol):
    """Where the sequences' gradients of a backward go; ``arithmetic`` is the type in which sums over positions are taken."""

    arithmetic: torch.dtype

    def begin_backward(self, channels: slice, units_of_rank: Sequence[Sequence[int]]) -> None:
        """A backward for these channels begins, of these units by rank."""

    def arrive(self, layer: int) -> None:
        """It is at the output of a sharded model's layer, counted from the last one."""

    def end_backward(self) -> None:
        """It is over."""

    def add_outer(self, name: str, left: Tensor, right: Tensor, strip: Strip) -> None:
        """g_i = left_iᵀ right_i: left [n, T, p], right [n, T, q], the parameter [p, q]."""

    def add_rows(self, name: str, indices: Tensor, values: Tensor, strip: Strip) -> None:
        """g_i = Σ_t values_it at row indices_it: indices [n, T], values [n, T, q], the parameter [V, q]."""

    def add(self, name: str, gradients: Tensor, strip: Strip) -> None:
        """g_i itself: [n, *the parameter's shape]."""


class Capture(TorchFunctionMode):
    """While active, uses of ``parameters`` are captured by ``rules``.

    Args:
        parameters: captured ones, by name. Others, trainable or not, are left to autograd.
        rules: by torch function.
        anchor: a scalar that requires grad: it makes a backward run where neither input nor weight would ask for one.
        float64: whether forwards run under :class:`Float64Mode`.
        keeps_casts: whether a weight that autocast casts stays cast for all the strips of a microbatch. Of weights that FSDP2
            gathers and frees the casts would be the whole model.

    ``used`` holds the names of the parameters that a rule has met.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rules: Mapping[Any, Rule],
        anchor: Tensor,
        *,
        float64: bool = False,
        keeps_casts: bool = True,
    ) -> None:
        """See the class."""
        super().__init__()
        self._float64 = float64
        self.keeps_casts = keeps_casts
        self.anchor = anchor
        self._sink: Sink | None = None
        self.used: set[str] = set()
        self._leaves: list[Leaf] = []
        self._names = {id(p): name for name, p in parameters.items()}
        self._parameters = dict(parameters)  # keeps the ids alive
        self._rules = rules
        self._strips: list[Strip] = []
        self._collects = True
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function's rule where it has one and a captured parameter is among its arguments."""
        rule = self._rules.get(func)
        if rule is not None and torch.is_grad_enabled() and self._concerns(args, kwargs):
            found = rule(self, args, kwargs or {})
            if found is not NotImplemented:
                return found
        return func(*args, **(kwargs or {}))

    def _concerns(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> bool:
        if any(id(value) in self._names for value in args):
            return True
        return kwargs is not None and any(id(value) in self._names for value in kwargs.values())

    def name_of(self, tensor: Any) -> str | None:
        """The captured parameter that this very tensor is; it counts as used."""
        name = self._names.get(id(tensor))
        if name is not None:
            self.used.add(name)
        return name

    def cast(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """The parameter's values in another type, cast once for all the strips of a microbatch."""
        found = self._casts.get(id(parameter))
        if found is None or found[0] is not parameter:
            # Held with the tensor, so that its id stays its own.
            found = self._casts[id(parameter)] = (parameter, parameter.detach().to(dtype))
        return found[1]

    @property
    def strip(self) -> Strip:
        """The rows of the forward, or of the part of it, that runs."""
        return self._strips[-1]

    @contextmanager
    def over(self, strip: Strip) -> Iterator[None]:
        """Forwards within the block are of these rows."""
        self._strips.append(strip)
        try:
            yield
        finally:
            self._strips.pop()

    @contextmanager
    def into(self, sink: Sink) -> Iterator[None]:
        """Backwards within the block add to ``sink``; what checkpointing recomputes there makes no new leaves."""
        self._sink, self._collects = sink, False
        try:
            yield
        finally:
            self._sink, self._collects = None, True

    @contextmanager
    def collecting(self) -> Iterator[list[Leaf]]:
        """A list of its own for the leaves that a forward inside a backward makes."""
        before = self._leaves, self._collects
        self._leaves, self._collects = [], True
        try:
            yield self._leaves
        finally:
            self._leaves, self._collects = before

    def modes(self) -> Callable[[], AbstractContextManager[None]]:
        """What enters this forward's modes and rows again in the backward
        (:mod:`~entropy_probe.gradients.capture.checkpointing`)."""
        strip = self.strip

        @contextmanager
        def again() -> Iterator[None]:
            with self.resumed(), self.over(strip):
                yield

        return again

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """The forward's modes within a backward: ``torch.autograd.grad`` takes every function mode off while it runs."""
        with Float64Mode() if self._float64 else nullcontext(), self:
            yield

    @property
    def sink(self) -> Sink:
        """Where gradients go; only within :meth:`into`."""
        assert self._sink is not None, "a captured backward ran outside of the engine's"
        return self._sink

    def leaf(self, name: str, parameter: Tensor, like: Tensor) -> Tensor | None:
        """The parameter once a sequence, shaped to broadcast against ``like`` [n, …]; autograd then keeps sequences apart.

        None where the rows of ``like`` cannot be told apart.
        """
        strip = self.strip
        self.used.add(name)
        apart = strip.by_sequence(like)
        if apart is None or like.dim() <= parameter.dim():
            return None
        leaf = parameter.detach().expand(strip.count, *parameter.shape).requires_grad_()
        if self._collects:
            self._leaves.append((name, leaf, strip))
        if apart is like:
            per_sequence: Tensor = leaf.unflatten(0, (strip.count, *[1] * (like.dim() - 1 - parameter.dim())))
            return per_sequence
        if strip.count == 1:
            return leaf[0]
        repeated = leaf[:, None].expand(strip.count, strip.length, *parameter.shape).flatten(0, 1)
        shaped: Tensor = repeated.unflatten(0, (len(repeated), *[1] * (like.dim() - 1 - parameter.dim())))
        return shaped

    def take_leaves(self) -> list[Leaf]:
        """The leaves made since the last call."""
        taken, self._leaves = self._leaves, []
        return taken


def leaked(roots: Iterable[Tensor], parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of the parameters that autograd's graph below ``roots`` reaches: those that no rule captured."""
    names = {id(p): name for name, p in parameters.items()}
    stack: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(stack)
    found: dict[str, None] = {}
    while stack:
        node = stack.pop()
        # Only the node that accumulates into a leaf has a variable.
        if type(node).__name__ == "AccumulateGrad":
            name = names.get(id(node.variable))
            if name is not None:
                found[name] = None
            continue
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return list(found)
