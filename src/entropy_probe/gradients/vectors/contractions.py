"""Dots of sequences' gradients with given directions: g_i · V_k, without keeping a g_i or anything of its size.

A sequence's gradient is formed a chunk at a time, as for :mod:`~entropy_probe.gradients.vectors.unit_vectors`, and
contracted while it is in cache. With V = Δθ these are the first-order changes of the scores, dS_i = g_i · Δθ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from entropy_probe.gradients.capture.backward_order import BackwardOrder, outside
from entropy_probe.gradients.capture.sequences import IDLE, Strip, row_chunks
from entropy_probe.gradients.vectors.outer_products import MOST_ROWS, SHORT, OuterProducts
from entropy_probe.ranks.sharding import WHOLE, Sharding


class Contractions:
    """D_uc = Σ_{i∈u} w_ci g_i · V_k by parameter, with w the strips' mixing weights and k the direction of channel c.

    Args:
        directions: V by parameter name, [K, elements].
        units: u.
        of_channel: the direction of every channel; None takes each in turn.
        sharding: where ranks have their spans of V alone, a layer's are gathered while a backward is at it.
        layers: parameter names by layer, the model's last one first.
        dtype: of products; sums over chunks are float64.
        device: where gradients are.

    ``values`` has [units, channels] a parameter; ``reached`` names the parameters that some gradient arrived at.
    """

    def __init__(
        self,
        directions: Mapping[str, Tensor],
        units: int,
        dtype: torch.dtype,
        device: torch.device,
        of_channel: Sequence[int] | None = None,
        sharding: Sharding = WHOLE,
        layers: Sequence[Sequence[str]] = (),
    ) -> None:
        """See the class."""
        self.arithmetic = torch.promote_types(dtype, torch.float32)
        self.reached: set[str] = set()
        self._own = {name: v.to(device, self.arithmetic) for name, v in directions.items()}
        self._of_channel = list(of_channel if of_channel is not None else range(len(next(iter(directions.values())))))
        self.values = {
            name: torch.zeros((units, len(self._of_channel)), dtype=torch.float64, device=device) for name in self._own
        }
        self._sharding, self._layers = sharding, layers
        self._directions = {} if sharding.sharded else self._own
        self._order = BackwardOrder(layers, self._gather_layer, self._drop_layer)
        self._rest = outside(layers, directions)
        self._outer = OuterProducts(self.arithmetic, device)

    @property
    def total(self) -> Tensor:
        """D over all parameters, [units, channels]."""
        return torch.stack([*self.values.values()]).sum(0)

    def begin_backward(self, channels: slice, units_of_rank: Sequence[Sequence[int]]) -> None:
        """All ranks run a backward."""
        if self._sharding.sharded:
            self._gather(self._rest)
            self._order.begin()

    def arrive(self, layer: int) -> None:
        """It is at a layer's output."""
        if self._sharding.sharded:
            self._order.arrive(layer)

    def end_backward(self) -> None:
        """It is over."""
        if self._sharding.sharded:
            self._order.end()
            self._directions.clear()

    def _gather_layer(self, layer: int) -> None:
        self._gather(self._layers[layer])

    def _drop_layer(self, layer: int) -> None:
        for name in self._layers[layer]:
            del self._directions[name]

    def _gather(self, names: Sequence[str]) -> None:
        """Whole directions of some parameters, from every rank's spans."""
        if not names:
            return
        counts = [len(self._own[name]) for name in names]
        of_name = [self._sharding.spans[name] for name in names]
        lengths = [
            [count * (spans[rank].stop - spans[rank].start) for spans, count in zip(of_name, counts, strict=True)]
            for rank in range(self._sharding.ranks.count)
        ]
        own = torch.cat([self._own[name].flatten() for name in names])
        every = self._sharding.ranks.gather_directions(own, [sum(of_rank) for of_rank in lengths])
        apart = [torch.split(flat, of_rank) for flat, of_rank in zip(every, lengths, strict=True)]
        for number, (name, count) in enumerate(zip(names, counts, strict=True)):
            self._directions[name] = torch.cat([parts[number].view(count, -1) for parts in apart], dim=1)

    def add_outer(self, name: str, left: Tensor, right: Tensor, strip: Strip) -> None:
        """g_i = left_iᵀ right_i: left [n, T, p], right [n, T, q], the parameter [p, q]."""
        directions = self._used(name, strip)
        dots = torch.zeros((strip.count, len(directions)), dtype=torch.float64, device=left.device)
        for part in row_chunks(slice(0, strip.count), MOST_ROWS):
            if left.shape[1] < SHORT:
                l_part, r_part = left[part].to(self.arithmetic), right[part].to(self.arithmetic)
                shaped = directions.view(-1, left.shape[-1], right.shape[-1])
                for k, direction in enumerate(shaped):
                    dots[part, k] = ((r_part @ direction.T) * l_part).sum((1, 2), dtype=torch.float64)
            else:
                for elements, g in self._outer.chunks(left[part], right[part]):
                    dots[part] += g @ directions[:, elements].T
        self._into(name, dots, strip)

    def add_rows(self, name: str, indices: Tensor, values: Tensor, strip: Strip) -> None:
        """g_i = Σ_t values_it at row indices_it: indices [n, T], values [n, T, q], the parameter [V, q]."""
        directions = self._used(name, strip)
        wide = values.to(self.arithmetic)
        tables = directions.view(len(directions), -1, values.shape[-1])
        dots = [(table[indices] * wide).sum((1, 2), dtype=torch.float64) for table in tables]
        self._into(name, torch.stack(dots, dim=1), strip)

    def add(self, name: str, gradients: Tensor, strip: Strip) -> None:
        """g_i itself: [n, *the parameter's shape]."""
        directions = self._used(name, strip)
        self._into(name, gradients.flatten(1).to(self.arithmetic) @ directions.T, strip)

    def _used(self, name: str, strip: Strip) -> Tensor:
        (mixing,) = strip.mixing
        self.reached.add(name)
        if self._sharding.sharded:
            self._order.reach(name)
        wanted = self._of_channel[mixing.channels]
        return self._directions[name][min(wanted) : max(wanted) + 1]

    def _into(self, name: str, dots: Tensor, strip: Strip) -> None:
        """Add [n, directions used] to the units' sums, channel by channel."""
        if strip.units == IDLE:
            return
        (mixing,) = strip.mixing
        wanted = self._of_channel[mixing.channels]
        dots = dots[:, [direction - min(wanted) for direction in wanted]]
        units = torch.tensor(strip.units, device=dots.device)
        self.values[name][:, mixing.channels].index_add_(0, units, mixing.weights.T.double() * dots.double())
