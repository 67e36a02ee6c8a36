"""Float64 throughout: lift the casts to float32 that model code makes whatever the weights' type.

Norms, softmax and rotary tables are written ``x.float()`` or ``x.to(torch.float32)``. On float64 weights these casts put
noise of 1e-8 to 1e-7 into log-probs, noise that differs between attention kernels. Under :class:`Float64Mode` every request
for float32 is answered in float64. (Integers too: a rotary table multiplies ``position_ids.float()`` with a float64 buffer.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Float64Mode(TorchFunctionMode):
    """While active, ``.float()``, ``.to(torch.float32)`` and any ``dtype=torch.float32`` argument give float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` with float64 in float32's place."""
        if func is Tensor.float:
            return args[0].double()
        widened = {name: _widen(value) for name, value in (kwargs or {}).items()}
        return func(*(_widen(value) for value in args), **widened)


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
