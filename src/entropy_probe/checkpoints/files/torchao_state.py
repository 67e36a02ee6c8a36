"""torchao's AdamW and Adam with moments in 8 bits, 4 bits or float8: tensor subclasses, read as the records that they hold.

A file names the classes of :data:`CLASSES`. Each is read as a :class:`Coded`, which holds ``codes``, ``scale`` and ``qmap`` and
computes nothing; torchao need not be installed. Tensors of fewer than 4096 elements, or that blocks do not divide, are plain.
The step is torch's, in float32 from the dequantised moments; they are quantised again after it. The file does not say whether
weight decay is decoupled: it is taken for AdamW's. Source: torchao 0.18, ``torchao/optim``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from entropy_probe.checkpoints.files.coded import CodedTensor
from entropy_probe.checkpoints.files.quantised_note import quantised_note
from entropy_probe.checkpoints.files.stored import StoredOptimizer
from entropy_probe.errors import InputError
from entropy_probe.optimizers.state import Library

CLASSES = tuple(
    f"{package}.subclass_{kind}.OptimState{name}"
    for package in ("torchao.optim", "torchao.prototype.low_bit_optim")
    for kind, name in (("8bit", "8bit"), ("4bit", "4bit"), ("fp8", "Fp8"))
)
"""The classes of moments, by the names of torchao 0.4 to 0.18."""


class Coded(torch.Tensor):
    """A tensor subclass that holds what the file says, and on which nothing can be computed."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:  # type: ignore[override]
        """Refuse: there are no values before they are dequantised."""
        raise TypeError(f"{func} of a tensor in codes")


def coded(value: Coded) -> CodedTensor:
    """The stored tensor of what was read under one of the names.

    Raises:
        ValueError: it holds something else than torchao writes.
    """
    held: Mapping[str, Any] = vars(value)
    codes, scale, qmap = held.get("codes"), held.get("scale"), held.get("qmap")
    if not isinstance(codes, Tensor) or not isinstance(scale, Tensor) or not isinstance(qmap, Tensor | None):
        raise ValueError(f"a record of torchao's with {', '.join(sorted(held)) or 'nothing'}; expected codes and scale")
    packed = "_shape" in held
    count = codes.numel() * (2 if packed else 1)
    return CodedTensor.of(tuple(value.shape), codes, scale, qmap, [count // max(1, scale.numel())], packed)


def adam_of_torchao(stored: StoredOptimizer) -> StoredOptimizer:
    """The state as Adam's, where some of it is in torchao's codes; else as it is.

    Raises:
        InputError: the groups are not of torchao's Adam.
    """
    held = [value for entry in stored.state.values() for value in entry.values() if isinstance(value, CodedTensor)]
    if not held:
        return stored
    if any("amsgrad" not in group for group in stored.groups):
        raise InputError(
            f"{stored.path} holds moments in torchao's codes and groups without amsgrad, which torchao's Adam always writes; "
            "the file is damaged"
        )
    groups = [{**group, "library": Library.TORCHAO, "decoupled_weight_decay": True} for group in stored.groups]
    note = quantised_note(
        "torchao",
        stored.state.values(),
        "exp_avg_sq",
        "The file does not say whether weight decay is decoupled: it is taken for AdamW's",
    )
    return replace(stored, groups=groups, notes=(*stored.notes, note))
