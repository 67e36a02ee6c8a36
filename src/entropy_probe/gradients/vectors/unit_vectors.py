"""X_u and Y_u of many units, built from each use of a parameter in a backward pass.

At a use of W with input x and output gradient δ, sequence i's gradient is g_i = δ_iᵀ x_i and enters X_u += c_i g_i,
Y_u += a_i g_i. A chunk of g_i is formed, mixed and added while it is in cache; nothing of the size of W is kept per sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from entropy_probe.gradients.capture.sequences import Mixing, Segment, Strip, row_chunks
from entropy_probe.gradients.vectors.outer_products import MOST_ROWS, SHORT, OuterProducts


class UnitVectors:
    """Unpreconditioned XS_u, YS_u by parameter: [slots, channels, elements], a slot for each unit that is open.

    Args:
        shapes: of the parameters, by name.
        slots: units held at a time.
        dtype: of the stored values (bfloat16 halves the memory of float32); sums of products are taken in float32 or better.
        device: where they live.
        channels: 2 for X and Y, further ones for the vectors of further targets.
    """

    def __init__(
        self, shapes: Mapping[str, torch.Size], slots: int, dtype: torch.dtype, device: torch.device, channels: int = 2
    ) -> None:
        """See the class."""
        self.values = {
            name: uninitialised((slots, channels, shape.numel()), dtype, device) for name, shape in shapes.items()
        }
        self.layout = (dtype, device, channels)
        self.arithmetic = torch.promote_types(dtype, torch.float32)
        self._outer = OuterProducts(self.arithmetic, device)
        self._shapes = dict(shapes)
        self._slot_of: dict[int, int] = {}
        self._free = list(range(slots))
        self._touched: set[tuple[str, int, int]] = set()
        self.reached: set[str] = set()

    def open(self, units: Iterable[int]) -> None:
        """Give each unit that has none a slot."""
        for unit in units:
            if unit not in self._slot_of:
                self._slot_of[unit] = self._free.pop(0)

    def close(self, units: Iterable[int]) -> None:
        """Take the units' slots back."""
        slots = {self._slot_of.pop(unit) for unit in units}
        self._free = sorted({*self._free, *slots})
        self._touched = {(name, slot, channel) for name, slot, channel in self._touched if slot not in slots}

    def settle(self, units: Iterable[int]) -> None:
        """Zero what no sequence of these units has reached, so that every slot can be read."""
        for unit in units:
            slot = self._slot_of[unit]
            for name, values in self.values.items():
                for channel in range(values.shape[1]):
                    if (name, slot, channel) not in self._touched:
                        values[slot, channel].zero_()
                        self._touched.add((name, slot, channel))

    def of(self, name: str, units: Sequence[int]) -> Tensor:
        """[units, channels, elements], a view where the slots lie in order."""
        slots = [self._slot_of[unit] for unit in units]
        if not slots:
            return self.values[name][:0]
        if slots == list(range(slots[0], slots[0] + len(slots))):
            return self.values[name][slots[0] : slots[0] + len(slots)]
        return self.values[name][slots]

    def first(self, name: str) -> int:
        """0: parameters are here from their first element on."""
        return 0

    def give_up(self, name: str) -> None:
        """Free one parameter's values for good."""
        del self.values[name]

    def add_outer(self, name: str, left: Tensor, right: Tensor, strip: Strip) -> None:
        """g_i = left_iᵀ right_i: left [n, T, p], right [n, T, q], the parameter [p, q]."""
        mixing = self._mixing(strip)
        rows, columns = left.shape[-1], right.shape[-1]
        if left.shape[1] >= SHORT and self._outer.fits(strip.count * rows * columns):
            ((_, g),) = self._outer.chunks(left, right)
            self.add(name, g, strip)
            return
        for segment in self._segments(strip):
            target = self._target(name, segment.unit, mixing)
            fresh = self._first_touch(name, segment.unit, mixing)
            for part in row_chunks(segment.rows, MOST_ROWS):
                weights = mixing.weights[:, part]
                if left.shape[1] < SHORT:
                    l_part, r_part = left[part].to(self.arithmetic), right[part].to(self.arithmetic)
                    _add_weighted(target.view(-1, rows, columns), l_part, r_part, weights, fresh)
                else:
                    for elements, g in self._outer.chunks(left[part], right[part]):
                        _mix(target[:, elements], weights, g, fresh)
                fresh = False

    def add_rows(self, name: str, indices: Tensor, values: Tensor, strip: Strip) -> None:
        """Σ_t values_it at row indices_it: indices [n, T], values [n, T, q], the parameter [V, q]."""
        mixing = self._mixing(strip)
        columns = values.shape[-1]
        for segment in self._segments(strip):
            target = self._target(name, segment.unit, mixing)
            if self._first_touch(name, segment.unit, mixing):
                target.zero_()
            where = indices[segment.rows].flatten()
            for channel, weights in enumerate(mixing.weights[:, segment.rows]):
                weighted = (values[segment.rows] * weights[:, None, None]).flatten(0, 1)
                table = target[channel].view(-1, columns)
                if target.dtype == self.arithmetic:
                    table.index_add_(0, where, weighted.to(target.dtype))
                else:
                    # A token that comes again and again is summed before it is rounded.
                    rows, places = where.unique(return_inverse=True)
                    summed = torch.zeros((len(rows), columns), dtype=self.arithmetic, device=target.device)
                    table[rows] += summed.index_add_(0, places, weighted.to(self.arithmetic)).to(target.dtype)

    def add(self, name: str, gradients: Tensor, strip: Strip) -> None:
        """g_i itself: [n, *the parameter's shape]."""
        mixing = self._mixing(strip)
        flat = gradients.flatten(1).to(self.arithmetic)
        units = [segment.unit for segment in strip.segments]
        slots = [self._slot_of.get(unit, -1) for unit in units]
        if slots[0] >= 0 and slots == list(range(slots[0], slots[0] + len(slots))):
            # Many small parameters: one product with a block-diagonal matrix costs less than one a unit.
            first = [self._first_touch(name, unit, mixing) for unit in units]
            if not all(first):
                for unit, untouched in zip(units, first, strict=True):
                    if untouched:
                        self._target(name, unit, mixing).zero_()
            target = self.values[name][slots[0] : slots[-1] + 1, mixing.channels]
            if len(units) > 1 and 1 < target.shape[1] < self.values[name].shape[1]:
                # Some of several channels of several units do not lie in even steps.
                mixed = (strip.block_weights @ flat).view(target.shape)
                target.copy_(mixed if all(first) else target + mixed)
            else:
                _mix(target.view(-1, flat.shape[1]), strip.block_weights, flat, all(first))
            return
        for segment in self._segments(strip):
            fresh = self._first_touch(name, segment.unit, mixing)
            target = self._target(name, segment.unit, mixing)
            _mix(target, mixing.weights[:, segment.rows], flat[segment.rows], fresh)

    def add_part(self, name: str, unit: int, channels: slice, part: slice, values: Tensor) -> None:
        """What another rank has found of some elements: values [channels, elements], of these ``channels``."""
        mixing = Mixing(values, channels)
        target = self._target(name, unit, mixing)
        if self._first_touch(name, unit, mixing):
            target.zero_()
        target[:, part] += values

    def begin_backward(self, channels: slice, units_of_rank: Sequence[Sequence[int]]) -> None:
        """Nothing: units are this rank's own."""

    def arrive(self, layer: int) -> None:
        """Nothing."""

    def end_backward(self) -> None:
        """Nothing."""

    def _segments(self, strip: Strip) -> list[Segment]:
        """The strip's rows by unit; units that are not open receive nothing."""
        return [segment for segment in strip.segments if segment.unit in self._slot_of]

    def _mixing(self, strip: Strip) -> Mixing:
        (mixing,) = strip.mixing
        return mixing

    def _target(self, name: str, unit: int, mixing: Mixing) -> Tensor:
        return self.values[name][self._slot_of[unit], mixing.channels]

    def _first_touch(self, name: str, unit: int, mixing: Mixing) -> bool:
        """Whether these values are still unwritten memory; they count as written from now on."""
        self.reached.add(name)
        slot = self._slot_of[unit]
        channels = range(*mixing.channels.indices(self.values[name].shape[1]))
        keys = {(name, slot, channel) for channel in channels}
        fresh = not keys & self._touched
        assert fresh or keys <= self._touched
        self._touched |= keys
        return fresh


def uninitialised(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory. On the CPU from NumPy, which asks for huge pages: paging in is then a tenth of the work."""
    if device.type == "cpu" and dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.empty(shape, np.float32 if dtype == torch.float32 else np.float64))
    return torch.empty(shape, dtype=dtype, device=device)


def _mix(target: Tensor, weights: Tensor, g: Tensor, fresh: bool) -> None:
    """target (+)= weights @ g, [channels, elements]."""
    if target.dtype != g.dtype:
        mixed = weights @ g
        target.copy_(mixed if fresh else target + mixed)
    elif fresh:
        torch.mm(weights, g, out=target)
    else:
        target.addmm_(weights, g)


def _add_weighted(target: Tensor, left: Tensor, right: Tensor, weights: Tensor, fresh: bool) -> None:
    """target[k] (+)= Σ_i weights_ki left_iᵀ right_i as one GEMM a channel; target [channels, p, q]."""
    flat = right.flatten(0, 1)
    for channel, row in enumerate(weights):
        weighted = (left * row[:, None, None]).flatten(0, 1)
        if target.dtype != flat.dtype:
            product = weighted.T @ flat
            target[channel].copy_(product if fresh else target[channel] + product)
        elif fresh:
            torch.mm(weighted.T, flat, out=target[channel])
        else:
            target[channel].addmm_(weighted.T, flat)
