"""Options that several commands have, their choices, and the panels that a command's help lists options in."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from entropy_probe.checkpoints import BaseQuantization, Beside
from entropy_probe.common.devices import choose_device
from entropy_probe.pipeline.settings import Compute, ShardingChoice

FILES, OUTPUT, COMPUTE = "Files", "Output", Compute.__name__
"""Panels; those of settings have the names of their parts."""


def beside(base: Path | None, names: Path | None, quantization: BaseQuantization | None) -> Path | Beside | None:
    """What was given beside a checkpoint: a base alone, or more."""
    return base if names is None and quantization is None else Beside(base, names, quantization)


class ExactDType(StrEnum):
    """Type of weights and arithmetic where rounding must not hide what is compared."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"


class DType(StrEnum):
    """Type of weights and arithmetic, or of vectors."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    BFLOAT16 = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch type."""
        return {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}[self.value]


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


CheckpointArgument = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a Trainer or TRL checkpoint.")
]
BaseOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the base model, for an adapter checkpoint; for full weights without a config.json, as accelerate's "
        "shards are, the model that training started from: of that the configuration alone is read.",
        rich_help_panel=FILES,
    ),
]
NamesOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="JSON object of the checkpoint's parameter names to Hugging Face's, where a trainer has names of its own.",
        rich_help_panel=FILES,
    ),
]
QuantizationOption = Annotated[
    BaseQuantization | None,
    typer.Option(
        "--base-quantization",
        help="How an adapter's base was quantised as training loaded it (4 bits of bitsandbytes); done here alike.",
        rich_help_panel=FILES,
    ),
]
FreezeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--freeze",
        metavar="PATTERN",
        help="Parameters that training left alone: a regular expression searched in their names; repeatable.",
        rich_help_panel=FILES,
    ),
]
TemperatureOption = Annotated[
    float | None, typer.Option(help="Of rows that declare none; else 1.", rich_help_panel=FILES)
]
DTypeOption = Annotated[DType, typer.Option(help="Type of weights and arithmetic.", rich_help_panel=COMPUTE)]
DeviceOption = Annotated[Device, typer.Option(help="auto takes a GPU where there is one.", rich_help_panel=COMPUTE)]
ShardingOption = Annotated[
    ShardingChoice,
    typer.Option(help="What torchrun's ranks hold: all parameters each, or FSDP2's shards.", rich_help_panel=COMPUTE),
]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the report as JSON.", rich_help_panel=OUTPUT),
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Write report.json, kernel.npy and plots there.", rich_help_panel=OUTPUT),
]


def one_or_all(files: list[Path]) -> Path | list[Path]:
    """What a repeatable option was given: the one file, or all."""
    return files[0] if len(files) == 1 else files
