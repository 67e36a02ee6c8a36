"""Dots under P between units' vectors, in float64 and in chunks that stay in cache.

Of several ranks each has the elements of its own spans, or the sums of its own units; what it finds there is then summed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from entropy_probe.common.arrays import FloatArray
from entropy_probe.gradients.interface import Directions
from entropy_probe.gradients.vectors.contractions import Contractions
from entropy_probe.gradients.vectors.exchange import Shards
from entropy_probe.gradients.vectors.unit_vectors import uninitialised
from entropy_probe.optimizers.base import DotGroup, Look
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.ranks.collectives import ALONE, Ranks
from entropy_probe.ranks.sharding import WHOLE, Sharding
from entropy_probe.statistics.noise import THIRDS
from entropy_probe.statistics.unit_dots import UnitDots

CHUNK = 1 << 19
"""Float64 elements, over all units, that a product is taken over at a time: 4 MiB."""


@dataclass(frozen=True)
class Dots:
    """Unit dots and :func:`zero_v_dots` by dot group, and Σ_u X_u and Σ_u Y_u by parameter, of the elements that are here."""

    dots: dict[DotGroup, UnitDots]
    x_sums: dict[str, Tensor]
    y_sums: dict[str, Tensor]
    zero_v: dict[DotGroup, float]


def stored_dots(
    vectors: Shards,
    sizes: Sequence[int],
    geometry: Geometry,
    ranks: Ranks = ALONE,
    channels: tuple[int, int] = (0, 1),
) -> Dots:
    """K_uw = X_u · P · Y_w from all units' vectors; ΣX · P · ΣY is taken from the sums, apart from K. Summed over ranks.

    ``channels`` are X's and Y's: that of a further target's vectors in X's place gives their dots with Y, without sums and
    ``zero_v``.
    """
    left, right = channels
    units = range(len(sizes))
    device = next(iter(vectors.values.values())).device
    width = max(1, CHUNK // (2 * len(units)))
    # One buffer for all chunks: fresh memory has to be paged in, which costs more than the products.
    buffer = torch.empty((2, len(units), width), dtype=torch.float64, device=device)
    weights = torch.empty(width, dtype=torch.float64, device=device)
    groups = geometry.dot_groups
    kernels = {group: torch.zeros((len(units),) * 2, dtype=torch.float64, device=device) for group in groups}
    sum_dots = {group: torch.zeros((), dtype=torch.float64, device=device) for group in groups}
    # Sums and what v = 0 adds are the entropy's alone: of further targets they would be the same again, or of no use.
    first = left == 0
    x_sums, y_sums = (
        {
            name: uninitialised((values.shape[-1],), torch.float64, device)
            for name, values in (vectors.values.items() if first else ())
        }
        for _ in range(2)
    )

    def multiply(group: DotGroup, pieces: Sequence[tuple[str, slice]], used: int) -> None:
        x, y = buffer[:, :, :used]
        x_sum, y_sum, p = x.sum(0), y.sum(0), weights[:used]
        start = 0
        for name, part in pieces if first else ():
            stop = start + part.stop - part.start
            x_sums[name][part], y_sums[name][part] = x_sum[start:stop], y_sum[start:stop]
            start = stop
        sum_dots[group] += torch.dot(x_sum.mul_(p), y_sum)
        x *= p
        kernels[group].addmm_(x, y.T)

    for group in groups:
        pieces: list[tuple[str, slice]] = []
        used = 0
        for name in (name for name in vectors.values if geometry.groups[name] == group):
            values = vectors.of(name, units)
            for part in _chunks(values.shape[-1], width):
                count = part.stop - part.start
                if used + count > width:
                    multiply(group, pieces, used)
                    pieces, used = [], 0
                x, y = buffer[:, :, used : used + count]
                x.copy_(values[:, left, part])
                y.copy_(values[:, right, part])
                weights[used : used + count] = geometry.metric.chunk(name, _moved(part, vectors.first(name))).to(device)
                pieces.append((name, part))
                used += count
        if pieces:
            multiply(group, pieces, used)
    of_zeros = zero_v_dots(vectors, units, geometry, right) if first else {group: torch.zeros(()) for group in groups}
    found = [
        torch.cat([kernel.flatten(), sum_dots[group][None], of_zeros[group][None].to(kernel)]).cpu().numpy()
        for group, kernel in kernels.items()
    ]
    together = dict(zip(kernels, ranks.sum_numbers(np.stack(found)), strict=True))
    dots = {
        group: UnitDots.from_kernel(numbers[:-2].reshape((len(units),) * 2), sizes, float(numbers[-2]))
        for group, numbers in together.items()
    }
    return Dots(
        dots,
        {name: total for name, total in x_sums.items() if name in vectors.reached},
        {name: total for name, total in y_sums.items() if name in vectors.reached},
        {group: float(numbers[-1]) for group, numbers in together.items()},
    )


def zero_v_dots(
    vectors: Shards,
    units: Sequence[int],
    geometry: Geometry,
    right: int = 1,
) -> dict[DotGroup, Tensor]:
    """By dot group Σ_{u≠w} X_u · (1/ε) Y_w over the elements with v = 0 that are here, whether or not P has them; scalars.

    Parameters without such an element are passed by. Y's channel is ``right``.
    """
    found = {group: torch.zeros((), dtype=torch.float64) for group in geometry.dot_groups}
    for name in (name for name in vectors.values if name in geometry.metric.with_zeros):
        values = vectors.of(name, units)
        for part in _chunks(values.shape[-1], max(1, CHUNK // (2 * len(units)))):
            p = geometry.metric.guides_zeros(name, _moved(part, vectors.first(name))).to(values.device)
            x, y = values[:, 0, part].double(), values[:, right, part].double()
            pairs = torch.dot(x.sum(0) * p, y.sum(0)) - torch.dot((x * y).sum(0), p)
            found[geometry.groups[name]] += pairs.cpu()
    return found


def own_sums(vectors: Shards, units: Sequence[int], sharding: Sharding, right: int = 1) -> dict[str, Tensor]:
    """Σ of the vectors in channel ``right`` by parameter that is reached, float64, from the units that are here.

    Of replicated ranks' own units, summed over ranks.
    """
    found = {}
    for name in sorted(vectors.reached):
        values = vectors.of(name, units)
        found[name] = uninitialised((values.shape[-1],), torch.float64, values.device)
        for part in _chunks(values.shape[-1], max(1, CHUNK // max(1, len(units)))):
            torch.sum(values[:, right, part], 0, dtype=torch.float64, out=found[name][part])
    if sharding.replicated:
        sharding.ranks.sum_vectors(list(found.values()))
    return found


def add_sums(sums: dict[str, Tensor], vectors: Shards, units: Sequence[int], channel: int) -> None:
    """One channel of some units more, by parameter, float64; of no units, zeros where there is nothing yet."""
    for name in vectors.values:
        values = vectors.of(name, units)
        if name not in sums:
            sums[name] = torch.zeros(values.shape[-1], dtype=torch.float64, device=values.device)
        for part in _chunks(values.shape[-1], max(1, CHUNK // max(1, len(units)))):
            sums[name][part] += torch.sum(values[:, channel, part], 0, dtype=torch.float64)


def third_directions(
    vectors: Shards,
    units: Sequence[int],
    sizes: Sequence[int],
    geometry: Geometry,
    sharding: Sharding = WHOLE,
    right: int = 1,
) -> Directions:
    """η P Ȳᵈ for parts of X and η P X̄ᵈ for parts of Y, the means over the prompts of each third d of the units
    (:mod:`~entropy_probe.statistics.noise`), laid flat.

    In the dtype of the vectors' arithmetic.

    Args:
        vectors: of all units; or, of replicated ranks, of this rank's, whole.
        units: that are there, in order and without gaps.
        sizes: of all units.
        geometry: P and η.
        sharding: who has the others.
        right: Y's channel.
    """
    prompts = [sum(sizes[third::THIRDS]) for third in range(THIRDS)]
    first = units[0] if units else 0
    sums, x_and_y = {}, slice(0, right + 1, right)
    for name in sorted(vectors.reached):
        values = vectors.of(name, units)
        sums[name] = uninitialised((THIRDS, 2, values.shape[-1]), vectors.arithmetic, values.device)
        for part in _chunks(values.shape[-1], max(1, CHUNK // (2 * max(1, len(units))))):
            for third in range(THIRDS):
                own = values[(third - first) % THIRDS :: THIRDS, x_and_y, part]
                torch.sum(own, 0, dtype=vectors.arithmetic, out=sums[name][third, :, part])
    if sharding.replicated:
        sharding.ranks.sum_vectors(list(sums.values()))
    x_directions, y_directions = ([dict[str, Tensor]() for _ in range(THIRDS)] for _ in range(2))
    for name, found in sums.items():
        for part in _chunks(found.shape[-1], CHUNK):
            p = geometry.learning_rate(name) * geometry.metric.chunk(name, part).to(found)
            for third in range(THIRDS):
                found[third, :, part] *= p / prompts[third]
        for third in range(THIRDS):
            y_directions[third][name], x_directions[third][name] = found[third]
    return Directions(x_directions, y_directions)


def cross_kernel(
    vectors: Shards,
    rows: Sequence[int],
    columns: Sequence[int],
    geometry: Geometry,
    ranks: Ranks = ALONE,
) -> Tensor:
    """V_u · η P V_w for units u of ``rows`` and w of ``columns``, from their first channels: float64 [rows, columns]."""
    device = next(iter(vectors.values.values())).device
    kernel = torch.zeros((len(rows), len(columns)), dtype=torch.float64, device=device)
    for name in vectors.values:
        left, right = vectors.of(name, rows)[:, 0], vectors.of(name, columns)[:, 0]
        for part in _chunks(left.shape[-1], max(1, CHUNK // (len(rows) + len(columns)))):
            p = geometry.metric.chunk(name, _moved(part, vectors.first(name)))
            kernel.addmm_(
                left[:, part].double() * (geometry.learning_rate(name) * p.to(kernel)), right[:, part].double().T
            )
    return torch.from_numpy(ranks.sum_numbers(kernel.cpu().numpy()))


def looked_along(
    vectors: Shards, units: Sequence[int], names: Collection[str], look: Look, channels: Sequence[int] = (1,)
) -> Tensor:
    """:meth:`Look.along` summed over the parameters ``names``, of the elements that are here: float64 [units, K].

    ``channels`` are Y's, then those of terms of the loss.
    """
    found = (
        look.along(name, _moved(part, vectors.first(name)), x, y, units, terms)
        for name in names
        for part, x, (y, *terms) in _wide_chunks(vectors, units, name, channels)
    )
    return _total(found, (len(units), look.count))


def looked_kernels(
    vectors: Shards, units: Sequence[int], names: Collection[str], look: Look, channels: Sequence[int] = (1,)
) -> Tensor:
    """XS_u · J YS_w, then XS_u · (J YᵏS_w + J' YS_w) of every term of the loss: float64 [1 + terms, units, units].

    Over the parameters ``names``, of the elements that are here; ``channels`` as of :func:`looked_along`.
    """

    def of_chunk(name: str, part: slice, x: Tensor, ys: Sequence[Tensor]) -> Tensor:
        y, *terms = ys
        found = [(x * look.response(name, part).to(x)) @ y.T]
        if terms:
            for of_term, (on_term, on_whole) in zip(terms, look.term_responses(name, part), strict=True):
                found.append((x * on_term.to(x)) @ of_term.T + (x * on_whole.to(x)) @ y.T)
        return torch.stack(found).double()

    found = (
        of_chunk(name, _moved(part, vectors.first(name)), x, ys)
        for name in names
        for part, x, ys in _wide_chunks(vectors, units, name, channels)
    )
    return _total(found, (len(channels), len(units), len(units)))


def _total(parts: Iterator[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Σ; zeros where there is none."""
    first = next(parts, None)
    if first is None:
        return torch.zeros(shape, dtype=torch.float64)
    total = first
    for part in parts:
        total = total + part
    return total


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _wide_chunks(
    vectors: Shards, units: Sequence[int], name: str, channels: Sequence[int]
) -> Iterator[tuple[slice, Tensor, list[Tensor]]]:
    """X_u and these channels of some elements at a time, in the arithmetic's type."""
    values = vectors.of(name, units)
    for part in _chunks(values.shape[-1], max(1, CHUNK // ((1 + len(channels)) * len(units)))):
        x, *ys = (values[:, channel, part].to(vectors.arithmetic) for channel in (0, *channels))
        yield part, x, ys


@dataclass
class StreamedSums:
    """ΣX, ΣY and the diagonal, from the vectors of some units at a time; then the directions of the second pass.

    Attributes:
        geometry: P and η.
        arithmetic: of the second pass.
        units: of all ranks, how many.
        sharding: replicated ranks add their own units' whole vectors, others all units' elements of their spans.
        channels: X's, or that of a further target's vectors, and Y's.
        y_sums: ΣY, which the sums of channel 0 have; those of further targets are given theirs.
    """

    geometry: Geometry
    arithmetic: torch.dtype
    units: int
    sharding: Sharding = WHOLE
    channels: tuple[int, int] = (0, 1)
    x_sums: dict[str, Tensor] = field(default_factory=dict)
    y_sums: dict[str, Tensor] = field(default_factory=dict)
    _diagonal: dict[DotGroup, FloatArray] = field(default_factory=dict)
    _zero_v: dict[DotGroup, float] = field(default_factory=dict)

    def add(self, vectors: Shards, units: Sequence[int]) -> None:
        """ΣX += X_u, ΣY += Y_u, and X_u · P · Y_u for these units."""
        left, right = self.channels
        for name in vectors.values:
            values = vectors.of(name, units)
            fresh = name not in self.x_sums
            if fresh:
                for sums in self._own_sums:
                    sums[name] = uninitialised((values.shape[-1],), torch.float64, values.device)
            diagonal = torch.zeros(len(units), dtype=torch.float64, device=values.device)
            for part in _chunks(values.shape[-1], max(1, CHUNK // (2 * max(1, len(units))))):
                x, y = values[:, left, part].double(), values[:, right, part].double()
                for sums, summed in zip(self._own_sums, (x, y), strict=False):
                    if fresh:
                        torch.sum(summed, 0, out=sums[name][part])
                    else:
                        sums[name][part] += summed.sum(0)
                p = self.geometry.metric.chunk(name, part).to(values.device, torch.float64)
                own = x.mul_(y)
                diagonal += own.mv(p)
                if name in self.geometry.metric.with_zeros:
                    self._add_zero_v(name, -float(torch.dot(own.sum(0), self._guides_zeros(name, part, own))))
            group = self.geometry.groups[name]
            self._diagonal.setdefault(group, np.zeros(self.units))[list(units)] += diagonal.cpu().numpy()

    def reduce(self, vectors: Shards) -> None:
        """Over ranks: ΣX and ΣY once each, and the diagonals."""
        if not self.x_sums:
            self.add(vectors, ())  # zeros of a rank without units
        ranks = self.sharding.ranks
        if self.sharding.replicated:
            ranks.sum_vectors([total for sums in self._own_sums for total in sums.values()])
        summed = ranks.sum_numbers(np.stack(list(self._diagonal.values())))
        self._diagonal = dict(zip(self._diagonal, summed, strict=True))

    @property
    def _own_sums(self) -> tuple[dict[str, Tensor], ...]:
        """ΣX, and ΣY where it is not given."""
        return (self.x_sums, self.y_sums) if self.channels[0] == 0 else (self.x_sums,)

    def directions(self, also: Sequence[StreamedSums] = ()) -> dict[str, Tensor]:
        """P ΣY, which X_u is contracted with, and P ΣX, which Y_u is; then P ΣX of ``also``.

        [2 + also, elements] by parameter, float32 or float64.
        """
        found = {}
        for name, y_sum in self.y_sums.items():
            sums = [y_sum, *(each.x_sums[name] for each in (self, *also))]
            directions = uninitialised((len(sums), len(y_sum)), self.arithmetic, y_sum.device)
            for part in _chunks(len(y_sum), CHUNK):
                p = self.geometry.metric.chunk(name, part).to(y_sum.device, torch.float64)
                for direction, total in zip(directions, sums, strict=True):
                    direction[part] = total[part] * p
            found[name] = directions
        return found

    def finish(
        self,
        contractions: Contractions,
        sizes: Sequence[int],
        reached: Collection[str],
        channels: tuple[int, int] = (0, 1),
    ) -> Dots:
        """After the second pass: X_u · P ΣY and Y_u · P ΣX by parameter are in these of its ``channels``."""
        ranks = self.sharding.ranks
        names = {
            group: [name for name in self.x_sums if self.geometry.groups[name] == group] for group in self._diagonal
        }
        totals = [torch.stack([contractions.values[name] for name in names[group]]).sum(0) for group in names]
        summed = ranks.sum_numbers(torch.stack(totals).cpu().numpy())
        of_sums = [sum(self._sum_dot(name) for name in names[group]) for group in names]
        of_zeros = [self._zero_v.get(group, 0.0) for group in names]
        sum_dots, zero_v = ranks.sum_numbers(np.array([of_sums, of_zeros]))
        dots = {}
        for group, total, sum_dot in zip(names, summed, sum_dots, strict=True):
            along_y, along_x = (total[:, channel].tolist() for channel in channels)
            dots[group] = UnitDots.streamed(sizes, along_y, along_x, self._diagonal[group].tolist(), float(sum_dot))
        x_sums, y_sums = (
            {name: total for name, total in sums.items() if name in reached} for sums in (self.x_sums, self.y_sums)
        )
        return Dots(dots, x_sums, y_sums, dict(zip(names, zero_v.tolist(), strict=True)))

    def _sum_dot(self, name: str) -> float:
        """ΣX · P ΣY, of this rank's span; what it is over elements with v = 0 is noted on the way."""
        x_sum, y_sum = self.x_sums[name], self.y_sums[name]
        span = self.sharding.own(name) if self.sharding.replicated else slice(0, len(x_sum))
        total = torch.zeros((), dtype=torch.float64, device=x_sum.device)
        for part in (_moved(part, span.start) for part in _chunks(span.stop - span.start, CHUNK)):
            p = self.geometry.metric.chunk(name, part).to(x_sum.device, torch.float64)
            total += torch.dot(x_sum[part] * p, y_sum[part])
            if name in self.geometry.metric.with_zeros:
                zeros = self._guides_zeros(name, part, x_sum)
                self._add_zero_v(name, float(torch.dot(x_sum[part] * zeros, y_sum[part])))
        return float(total)

    def _guides_zeros(self, name: str, part: slice, like: Tensor) -> Tensor:
        return self.geometry.metric.guides_zeros(name, part).to(like)

    def _add_zero_v(self, name: str, pairs: float) -> None:
        group = self.geometry.groups[name]
        self._zero_v[group] = self._zero_v.get(group, 0.0) + pairs


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
