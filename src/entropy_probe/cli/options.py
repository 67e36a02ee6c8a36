"""Choices of the command line and the torch objects that they name."""

from __future__ import annotations

from enum import StrEnum

import torch

from entropy_probe.common.devices import choose_device

TORCH_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class ExactDType(StrEnum):
    """Type of weights and arithmetic where rounding must not hide what is compared."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch type."""
        return TORCH_DTYPES[self.value]


class DType(StrEnum):
    """Type of weights and arithmetic, or of vectors."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    BFLOAT16 = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch type."""
        return TORCH_DTYPES[self.value]


class Autocast(StrEnum):
    """Type of mixed-precision arithmetic, or none whatever the rows say."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    OFF = "off"


class Device(StrEnum):
    """Where to compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"

    @property
    def torch_device(self) -> torch.device:
        """The torch device.

        Raises:
            InputError: cuda was asked for and is not there.
        """
        return choose_device(self.value)
