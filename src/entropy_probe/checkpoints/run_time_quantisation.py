"""A base that was quantised as it was loaded for training: its linear weights rounded here as bitsandbytes rounds them.

NF4: the flattened weight is cut into blocks of 64; an element is the nearest of 16 numbers times the block's largest absolute
value, which stays in float32. All linear layers but the output head are quantised, as transformers does by default. The number
that the forward multiplies with is rounded to the type that the weight was stored in. Double quantisation, which rounds the
blocks' scales too, is not done here. Sources: Dettmers et al. (2023), QLoRA; bitsandbytes 0.50, ``quantize_4bit``.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entropy_probe.checkpoints.files.stored import StoredTensor
from entropy_probe.common.evidence import Evidence
from entropy_probe.errors import InputError


class BaseQuantization(StrEnum):
    """How the base under an adapter was quantised as it was loaded for training.

    ``nf4``: bitsandbytes' 4-bit NormalFloat in blocks of 64, without double quantisation.

    Example:
        >>> from entropy_probe import BaseQuantization
        >>> BaseQuantization("nf4")
        <BaseQuantization.NF4: 'nf4'>
    """

    NF4 = "nf4"


BLOCK = 64

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def nf4_codes(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The number of the nearest value for every element, flat, and the largest absolute value of every block."""
    flat = weights.detach().float().reshape(-1)
    blocks = nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).reshape(-1, BLOCK)
    largest = blocks.abs().amax(1)
    # As bitsandbytes: by the reciprocal; a block of zeros stays zero.
    scaled = blocks * torch.where(largest > 0, largest.reciprocal(), 0.0)[:, None]
    values = torch.tensor(NF4_VALUES)
    codes = torch.bucketize(scaled, (values[1:] + values[:-1]) / 2)
    return codes.reshape(-1)[: flat.numel()], largest


def nf4_rounded(weights: Tensor, stored: torch.dtype) -> Tensor:
    """The weights as they are after quantising, in their own type, rounded to ``stored`` on the way."""
    codes, largest = nf4_codes(weights)
    values = torch.tensor(NF4_VALUES)[codes] * largest.repeat_interleave(BLOCK)[: codes.numel()]
    return values.reshape(weights.shape).to(stored).to(weights)


@torch.no_grad()
def quantise_base(path: Path, model: Any, how: BaseQuantization, stored: Mapping[str, StoredTensor]) -> Evidence:
    """Round a model's linear weights in place, all but the output head's, and say so.

    Args:
        path: of the checkpoint, for the refusal.
        model: the base, whole, on the CPU.
        how: it was quantised.
        stored: its tensors, for the types that they are stored in.

    Raises:
        InputError: a layer of a kind that is quantised in another layout.
    """
    head = model.get_output_embeddings()
    rounded = 0
    for name, module in model.named_modules():
        if type(module).__name__ == "Conv1D":
            raise InputError(
                f"{path}: the base has {name}, a Conv1D, whose transposed weight is not rounded to {how} here; save the "
                "quantised base (save_pretrained) and give its folder as base"
            )
        if isinstance(module, nn.Linear) and module is not head:
            held = stored.get(f"{name}.weight")
            module.weight.copy_(nf4_rounded(module.weight, torch.float32 if held is None else held.dtype))
            rounded += 1
    return Evidence(
        "base_quantised_here",
        f"the weights of the base's {rounded} linear layers were rounded to {how} here, in blocks of {BLOCK} without double "
        "quantisation, as bitsandbytes rounds them where it loads a model in 4 bits",
        "If training quantised twice (bnb_4bit_use_double_quant), or skipped other layers than the head, save the quantised "
        "base with save_pretrained and give its folder as base: that is read",
    )
