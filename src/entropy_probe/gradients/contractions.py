"""Dots of sequences' gradients with given directions: g_i · V_k, without keeping a g_i or anything of its size.

A sequence's gradient is formed a chunk at a time, as for :mod:`~entropy_probe.gradients.unit_vectors`, and contracted while it
is in cache. With V = Δθ these are the first-order changes of the scores, dS_i = g_i · Δθ.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from entropy_probe.gradients.outer_products import MOST_ROWS, SHORT, OuterProducts
from entropy_probe.gradients.sequences import Strip, row_chunks


class Contractions:
    """D_uc = Σ_{i∈u} w_ci g_i · V_k by parameter, with w the strips' mixing weights; channel c is for direction c mod K.

    Args:
        directions: V by parameter name, [K, elements].
        units: u.
        combinations: as many times K channels there are.
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
        combinations: int = 1,
    ) -> None:
        """See the class."""
        self.arithmetic = torch.promote_types(dtype, torch.float32)
        self.reached: set[str] = set()
        self._directions = {name: v.to(device, self.arithmetic) for name, v in directions.items()}
        self.values = {
            name: torch.zeros((units, combinations * len(v)), dtype=torch.float64, device=device)
            for name, v in self._directions.items()
        }
        self._outer = OuterProducts(self.arithmetic, device)

    @property
    def total(self) -> Tensor:
        """D over all parameters, [units, channels]."""
        return torch.stack([*self.values.values()]).sum(0)

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
        directions = self._directions[name]
        first = mixing.channels.start % len(directions)
        return directions[first : first + mixing.channels.stop - mixing.channels.start]

    def _into(self, name: str, dots: Tensor, strip: Strip) -> None:
        """Add [n, channels] to the units' sums."""
        (mixing,) = strip.mixing
        units = torch.tensor(strip.units, device=dots.device)
        self.values[name][:, mixing.channels].index_add_(0, units, mixing.weights.T.double() * dots.double())
