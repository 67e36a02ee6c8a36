"""Dots under P between units' vectors, in float64 and in chunks that stay in cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from entropy_probe.gradients.unit_vectors import UnitVectors, uninitialised
from entropy_probe.u_statistics import UnitDots

CHUNK = 1 << 19
"""Float64 elements, over all units, that a product is taken over at a time: 4 MiB."""

FEW_UNITS = 8
"""Up to so many, the kernel's rows are matrix-vector products: a GEMM of that shape is slower."""


@dataclass(frozen=True)
class Dots:
    """Unit dots by learning rate, and Σ_u Y_u by parameter."""

    dots: dict[float, UnitDots]
    y_sums: dict[str, Tensor]


def stored_dots(
    vectors: UnitVectors,
    sizes: Sequence[int],
    preconditioners: Mapping[str, Tensor],
    learning_rates: Mapping[str, float],
) -> Dots:
    """K_uw = X_u · P · Y_w from all units' vectors; ΣX · P · ΣY is taken from the sums, apart from K."""
    units = range(len(sizes))
    device = next(iter(vectors.values.values())).device
    kernels: dict[float, Tensor] = {}
    sum_dots: dict[float, float] = {}
    y_sums: dict[str, Tensor] = {}
    width = max(1, CHUNK // (2 * len(units)))
    # One buffer for all chunks: memory that is allocated anew is paged in anew, which costs more than the products.
    buffer = torch.empty((2, len(units), width), dtype=torch.float64, device=device)
    for name in vectors.values:
        values, p, rate = vectors.of(name, units), preconditioners[name].flatten(), learning_rates[name]
        kernel = kernels.setdefault(rate, torch.zeros((len(units), len(units)), dtype=torch.float64, device=device))
        total = torch.zeros((), dtype=torch.float64, device=device)
        y_sum = uninitialised((values.shape[-1],), torch.float64, device)
        for part in _chunks(values.shape[-1], width):
            x, y = buffer[:, :, : part.stop - part.start]
            x.copy_(values[:, 0, part])
            y.copy_(values[:, 1, part])
            x *= p[part].to(device, torch.float64)
            torch.sum(y, dim=0, out=y_sum[part])
            total += torch.dot(x.sum(0), y_sum[part])
            if len(units) <= FEW_UNITS:
                for row, x_row in zip(kernel, x, strict=True):
                    row += torch.mv(y, x_row)
            else:
                kernel.addmm_(x, y.T)
        sum_dots[rate] = sum_dots.get(rate, 0.0) + float(total)
        if name in vectors.reached:
            y_sums[name] = y_sum
    dots = {rate: UnitDots.from_kernel(k.cpu().numpy(), sizes, sum_dots[rate]) for rate, k in kernels.items()}
    return Dots(dots, y_sums)


@dataclass
class StreamedDots:
    """Two passes over the units, whose vectors are there one after another: first :meth:`add`, then :meth:`contract`."""

    preconditioners: Mapping[str, Tensor]
    learning_rates: Mapping[str, float]
    x_sums: dict[str, Tensor] = field(default_factory=dict)
    y_sums: dict[str, Tensor] = field(default_factory=dict)
    _diagonal: dict[float, dict[int, float]] = field(default_factory=dict)
    _x_dot_sum: dict[float, dict[int, float]] = field(default_factory=dict)
    _y_dot_sum: dict[float, dict[int, float]] = field(default_factory=dict)

    def add(self, vectors: UnitVectors, unit: int) -> None:
        """First pass: ΣX += X_u, ΣY += Y_u, and X_u · P · Y_u."""
        for name in vectors.values:
            values = vectors.of(name, [unit])[0]
            if name not in self.x_sums:
                self.x_sums[name], self.y_sums[name] = (
                    torch.zeros(values.shape[-1], dtype=torch.float64, device=values.device) for _ in range(2)
                )
            total = torch.zeros((), dtype=torch.float64, device=values.device)
            for part, scale in self._parts(name, values):
                x, y = values[:, part].double()
                self.x_sums[name][part] += x
                self.y_sums[name][part] += y
                total += torch.dot(x.mul_(scale), y)
            self._into(self._diagonal, name, unit, total)

    def contract(self, vectors: UnitVectors, unit: int) -> None:
        """Second pass: X_u · P · ΣY and Y_u · P · ΣX."""
        for name in vectors.values:
            values = vectors.of(name, [unit])[0]
            x_total, y_total = (torch.zeros((), dtype=torch.float64, device=values.device) for _ in range(2))
            for part, scale in self._parts(name, values):
                x, y = values[:, part].double()
                x_total += torch.dot(x.mul_(scale), self.y_sums[name][part])
                y_total += torch.dot(y.mul_(scale), self.x_sums[name][part])
            self._into(self._x_dot_sum, name, unit, x_total)
            self._into(self._y_dot_sum, name, unit, y_total)

    def finish(self, vectors: UnitVectors, sizes: Sequence[int]) -> Dots:
        """After both passes."""
        sum_dots: dict[float, float] = {}
        for name, x_sum in self.x_sums.items():
            rate = self.learning_rates[name]
            parts = [torch.dot(x_sum[c] * scale, self.y_sums[name][c]) for c, scale in self._parts(name, x_sum)]
            sum_dots[rate] = sum_dots.get(rate, 0.0) + float(torch.stack(parts).sum())

        def in_order(by_unit: Mapping[int, float]) -> list[float]:
            return [by_unit[unit] for unit in range(len(sizes))]

        dots = {
            rate: UnitDots.streamed(
                sizes,
                in_order(self._x_dot_sum[rate]),
                in_order(self._y_dot_sum[rate]),
                in_order(self._diagonal[rate]),
                sum_dots[rate],
            )
            for rate in self._diagonal
        }
        return Dots(dots, {name: y for name, y in self.y_sums.items() if name in vectors.reached})

    def _parts(self, name: str, values: Tensor) -> Iterator[tuple[slice, Tensor]]:
        p = self.preconditioners[name].flatten()
        for part in _chunks(values.shape[-1], CHUNK // 4):
            yield part, p[part].to(values.device, torch.float64)

    def _into(self, totals: dict[float, dict[int, float]], name: str, unit: int, value: Tensor) -> None:
        by_unit = totals.setdefault(self.learning_rates[name], {})
        by_unit[unit] = by_unit.get(unit, 0.0) + float(value)


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
