"""``entropy-probe replay``: is the step that the probe computes the trainer's?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from entropy_probe import replay_check
from entropy_probe.cli.bar import TerminalProgress
from entropy_probe.cli.fields import with_settings
from entropy_probe.cli.options import (
    FILES,
    BaseOption,
    Device,
    DeviceOption,
    ExactDType,
    FreezeOption,
    JsonOption,
    NamesOption,
    QuantizationOption,
    TemperatureOption,
    beside,
    one_or_all,
)
from entropy_probe.cli.output import check_outputs, make_console
from entropy_probe.replay_check import ReplaySettings
from entropy_probe.report.files import write_json
from entropy_probe.report.replay_text import print_replay


@with_settings(ReplaySettings, dtype=ExactDType)
def replay(
    before: Annotated[Path, typer.Argument(metavar="CHECKPOINT_N", help="Folder of the checkpoint before the step.")],
    after: Annotated[Path, typer.Argument(metavar="CHECKPOINT_N+1", help="Folder of the one after it.")],
    *,
    rollouts: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            help="What that step consumed, as RolloutRecorder wrote it, or a trainer's dump with token ids; repeatable, or a "
            "quoted pattern of names: one batch.",
            rich_help_panel=FILES,
        ),
    ],
    temperature: TemperatureOption = None,
    base: BaseOption = None,
    names: NamesOption = None,
    base_quantization: QuantizationOption = None,
    freeze: FreezeOption = None,
    settings: ReplaySettings,
    device: DeviceOption = Device.AUTO,
    json_file: JsonOption = None,
) -> None:
    """Compute the step between two consecutive checkpoints from its rollouts, and compare it with the real one."""
    check_outputs(json_file, None)
    report = replay_check.replay(
        before,
        after,
        one_or_all(rollouts),
        settings,
        base=beside(base, names, base_quantization),
        freeze=tuple(freeze or ()),
        temperature=temperature,
        device=device.torch_device,
        progress=TerminalProgress(),
    )
    console = make_console()
    print_replay(report, console)
    if json_file is not None:
        write_json(report, json_file)
        console.print(f"report written to {json_file}")
