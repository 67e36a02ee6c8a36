"""In which order a backward comes by a sharded model's layers: the same on every rank, whatever its own rows reach.

Collectives of a layer must be run by all ranks in one order. A backward reaches decoder layers from the last to the first; what
a layer's parameters need is done when the first of its gradients arrives, and of layers that no gradient has come from, when a
later one or the end does. Parameters outside of layers, and those whose gradients autograd hands over at the end, are the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from weakref import WeakMethod

from torch import nn
from torch.distributed.fsdp import FSDPModule

from entropy_probe.errors import InputError
from entropy_probe.gradients.modules import Treatment


def sharded_layers(model: nn.Module, treatments: Mapping[str, Treatment]) -> list[list[str]]:
    """The matrices of every layer that FSDP2 gathers by itself, the last layer first; without those that come at the end."""
    found: list[list[str]] = []
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if not path or module in inside or FSDPModule not in type(module).__mro__:
            continue
        inside.update(module.modules())
        names = (f"{path}.{name}" for name, p in module.named_parameters() if p.dim() == 2)
        found.append([name for name in names if treatments.get(name) in (Treatment.FUNCTION, Treatment.RECOMPUTE)])
    return [names for names in reversed(found) if names]


class BackwardOrder:
    """Layers by number in the order of a backward.

    Args:
        layers: parameter names of each, first those of the model's last layer.
        enter: called for every layer in turn, once a backward: a method of who owns this.
        leave: called for every layer, before the next is entered; another one.
    """

    def __init__(
        self, layers: Sequence[Sequence[str]], enter: Callable[[int], None], leave: Callable[[int], None]
    ) -> None:
        """See the class."""
        self._count = len(layers)
        self._layer_of = {name: number for number, names in enumerate(layers) for name in names}
        # Weakly: the owner would else hold itself, and its vectors stay until garbage is next collected.
        self._enter, self._leave = WeakMethod(enter), WeakMethod(leave)
        self._at = self._count

    def begin(self) -> None:
        """A backward begins."""
        self._at = -1

    def reach(self, name: str) -> bool:
        """A gradient of this parameter has come; whether the parameter is in a layer.

        Raises:
            InputError: its layer has been left, or no backward has begun.
        """
        layer = self._layer_of.get(name)
        if layer is None:
            return False
        if layer < self._at:
            raise InputError(
                f"parameter {name}: its layer's gradients come after those of an earlier layer, so that shards cannot be "
                "exchanged layer by layer; use --sharding replicated"
            )
        self._go_to(layer)
        return True

    def end(self) -> None:
        """The backward is over."""
        self._go_to(self._count)

    def _go_to(self, layer: int) -> None:
        while self._at < layer:
            if self._at >= 0:
                self._call(self._leave)
            self._at += 1
            if self._at < self._count:
                self._call(self._enter)

    def _call(self, method: WeakMethod[Callable[[int], None]]) -> None:
        called = method()
        assert called is not None
        called(self._at)
