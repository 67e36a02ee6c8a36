"""``entropy-probe run``: a probe of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from entropy_probe.cli.bar import TerminalProgress
from entropy_probe.cli.fields import with_settings
from entropy_probe.cli.options import (
    FILES,
    BaseOption,
    CheckpointArgument,
    Device,
    DeviceOption,
    FreezeOption,
    JsonOption,
    NamesOption,
    OutOption,
    QuantizationOption,
    ShardingOption,
    TemperatureOption,
    beside,
    one_or_all,
)
from entropy_probe.cli.output import check_outputs, make_console, show
from entropy_probe.common.progress import Progress, Silent
from entropy_probe.pipeline.run import probe_checkpoint
from entropy_probe.pipeline.settings import Settings, ShardingChoice
from entropy_probe.ranks.launch import Job


@with_settings(Settings)
def run(
    context: typer.Context,
    checkpoint: CheckpointArgument,
    *,
    rollouts: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            help="Rollouts, .jsonl or .parquet, one row a response, or a trainer's dump with token ids; repeatable, or a "
            "quoted pattern of names: one batch.",
            rich_help_panel=FILES,
        ),
    ],
    evaluation_rollouts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Other rollouts of this policy: X from them, against the update of --rollouts.",
            rich_help_panel=FILES,
        ),
    ] = None,
    temperature: TemperatureOption = None,
    base: BaseOption = None,
    names: NamesOption = None,
    base_quantization: QuantizationOption = None,
    freeze: FreezeOption = None,
    settings: Settings,
    device: DeviceOption = Device.AUTO,
    sharding: ShardingOption = ShardingChoice.REPLICATED,
    json_file: JsonOption = None,
    out: OutOption = None,
) -> None:
    """Predict the entropy change of the next step from a checkpoint and rollouts, and realise it.

    On N ranks: torchrun --nproc-per-node N -m entropy_probe run ...
    """
    job: Job = context.obj
    own_device = job.device(device.torch_device)
    with job.ranks(own_device) as ranks:
        first = ranks.rank == 0
        if first:
            check_outputs(json_file, out)
        progress: Progress = TerminalProgress() if first else Silent()
        result = probe_checkpoint(
            checkpoint,
            one_or_all(rollouts),
            settings,
            evaluation_rollouts=one_or_all(evaluation_rollouts) if evaluation_rollouts else None,
            base=beside(base, names, base_quantization),
            freeze=tuple(freeze or ()),
            temperature=temperature,
            device=own_device,
            progress=progress,
            ranks=ranks,
            sharding=sharding,
        )
        if first:
            show(result, make_console(), json_file, out)
