"""In which order a backward comes by a sharded model's layers: the same on every rank, whatever its own rows reach.

Collectives of a layer must be run by all ranks in one order, and between the same two of FSDP2's own. A backward comes by the
decoder layers from the last to the first; what a layer's parameters need is done when the gradient of its output arrives, and
for layers that were passed by, when a later one's or the end does. Parameters outside of layers, and those whose gradients
autograd hands over at the end, are the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakMethod

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from entropy_probe.compat.checkpoint_wrappers import named_parameters
from entropy_probe.errors import InputError
from entropy_probe.gradients.capture.modules import Treatment


@dataclass(frozen=True)
class Layer:
    """A module that FSDP2 gathers by itself, and those of its matrices whose gradients come while a backward is at it."""

    module: nn.Module
    names: tuple[str, ...]


def sharded_layers(model: nn.Module, treatments: Mapping[str, Treatment]) -> list[Layer]:
    """The model's layers, the last one first; without parameters whose gradients autograd hands over at the end."""
    found: list[Layer] = []
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if not path or module in inside or FSDPModule not in type(module).__mro__:
            continue
        inside.update(module.modules())
        names = (name for name, p in named_parameters(module, path) if p.dim() == 2)
        at_once = (Treatment.FUNCTION, Treatment.RECOMPUTE)
        found.append(Layer(module, tuple(name for name in names if treatments.get(name) in at_once)))
    return [layer for layer in reversed(found) if layer.names]


def outside(layers: Sequence[Sequence[str]], names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are in no layer."""
    inside = {name for of_layer in layers for name in of_layer}
    return [name for name in names if name not in inside]


@contextmanager
def announced(layers: Sequence[Layer], arrive: Callable[[int], None]) -> Iterator[None]:
    """Forwards within the block let every later backward call ``arrive`` with a layer's number before it goes through it.

    By its output, which every rank's rows go through: which of its parameters they reach is each rank's own.
    """
    handles = [layer.module.register_forward_hook(_announcing(number, arrive)) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _announcing(number: int, arrive: Callable[[int], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: arrive(number))

    return hook


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
                "exchanged layer by layer; use replicated sharding"
            )
        self._go_to(layer)
        return True

    def arrive(self, layer: int) -> None:
        """The backward is at a layer's output."""
        self._go_to(layer)

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
