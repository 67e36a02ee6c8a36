"""Unit vectors of a sharded model: a layer's gradients change hands as soon as a backward has formed them.

A rank forms its rows' gradients one layer at a time, whole; when the backward leaves the layer, every rank gives them away by
span. Whole are, of the units at hand, the layer's elements and those of parameters outside of layers: embeddings, the head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from entropy_probe.gradients.capture.backward_order import BackwardOrder, outside
from entropy_probe.gradients.capture.sequences import Strip
from entropy_probe.gradients.vectors.exchange import swapped
from entropy_probe.gradients.vectors.unit_vectors import UnitVectors
from entropy_probe.ranks.sharding import Sharding


class ShardedVectors:
    """All ranks' units' XS_u, YS_u, of this rank's spans; built like :class:`UnitVectors`, which it holds them in.

    Args:
        shapes: of the whole parameters, by name.
        slots: units held at a time, of all ranks.
        dtype: of the stored values.
        device: where they live.
        sharding: whose elements are whose.
        layers: parameter names by layer, the model's last one first.
        channels: 2 for X and Y, further ones for the vectors of further targets.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        sharding: Sharding,
        layers: Sequence[Sequence[str]],
        channels: int = 2,
    ) -> None:
        """See the class."""
        self._sharding = sharding
        self._shapes = dict(shapes)
        self._layers = layers
        self._rest = outside(layers, shapes)
        own = {name: torch.Size([len(range(*sharding.own(name).indices(shapes[name].numel())))]) for name in shapes}
        self._shards = UnitVectors(own, slots, dtype, device, channels)
        self.arithmetic = self._shards.arithmetic
        self._order = BackwardOrder(layers, self._enter, self._leave)
        self._units_of_rank: Sequence[Sequence[int]] = ()
        self._channels = slice(0, 0)
        self._layer = self._outside = UnitVectors({}, 0, dtype, device)
        self.reached: set[str] = set()

    @property
    def values(self) -> dict[str, Tensor]:
        """See :class:`~entropy_probe.gradients.vectors.exchange.Shards`."""
        return self._shards.values

    def of(self, name: str, units: Sequence[int]) -> Tensor:
        """[units, channels, elements of this rank's span]."""
        return self._shards.of(name, units)

    def first(self, name: str) -> int:
        """See :class:`~entropy_probe.gradients.vectors.exchange.Shards`."""
        return self._sharding.first(name)

    def open(self, units: Iterable[int]) -> None:
        """Give each unit that has none a slot: units of all ranks."""
        self._shards.open(units)

    def settle(self, units: Iterable[int]) -> None:
        """Zero what no sequence of these units has reached."""
        self._shards.settle(units)

    def close(self, units: Iterable[int]) -> None:
        """Take the units' slots back."""
        self._shards.close(units)

    def begin_backward(self, channels: slice, units_of_rank: Sequence[Sequence[int]]) -> None:
        """All ranks run a backward of these channels, each of its units."""
        self._channels, self._units_of_rank = channels, units_of_rank
        self._outside = self._whole(self._rest)
        self._order.begin()

    def arrive(self, layer: int) -> None:
        """It is at a layer's output."""
        self._order.arrive(layer)

    def end_backward(self) -> None:
        """It is over: exchange what has not been."""
        self._order.end()
        self._give_away(self._outside, self._rest)
        self._outside = self._whole([])

    def add_outer(self, name: str, left: Tensor, right: Tensor, strip: Strip) -> None:
        """See :class:`~entropy_probe.gradients.capture.uses.Sink`."""
        self._of_layer(name).add_outer(name, left, right, strip)

    def add_rows(self, name: str, indices: Tensor, values: Tensor, strip: Strip) -> None:
        """See :class:`~entropy_probe.gradients.capture.uses.Sink`."""
        self._of_layer(name).add_rows(name, indices, values, strip)

    def add(self, name: str, gradients: Tensor, strip: Strip) -> None:
        """See :class:`~entropy_probe.gradients.capture.uses.Sink`."""
        self._of_layer(name).add(name, gradients, strip)

    def _of_layer(self, name: str) -> UnitVectors:
        return self._layer if self._order.reach(name) else self._outside

    def _enter(self, layer: int) -> None:
        self._layer = self._whole(self._layers[layer])

    def _leave(self, layer: int) -> None:
        self._give_away(self._layer, self._layers[layer])
        self._layer = self._whole([])

    def _whole(self, names: Sequence[str]) -> UnitVectors:
        """Room for this rank's units' gradients of some parameters."""
        own = self._units_of_rank[self._sharding.ranks.rank]
        found = UnitVectors({name: self._shapes[name] for name in names}, len(own), *self._shards.layout)
        found.open(own)
        return found

    def _give_away(self, whole: UnitVectors, names: Sequence[str]) -> None:
        own = self._units_of_rank[self._sharding.ranks.rank]
        whole.settle(own)
        self.reached |= whole.reached
        counts = [len(units) for units in self._units_of_rank]
        channels = len(range(*self._channels.indices(self._shards.layout[2])))
        dtype = self._shards.layout[0]
        for piece in swapped(
            lambda name: whole.of(name, own)[:, self._channels], names, counts, channels, dtype, self._sharding
        ):
            for units, values in zip(self._units_of_rank, piece.of_rank, strict=True):
                part = slice(piece.part.start, piece.part.start + values.shape[-1])
                for unit, of_unit in zip(units, values, strict=True):
                    self._shards.add_part(piece.name, unit, self._channels, part, of_unit)
