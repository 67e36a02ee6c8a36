"""``entropy-probe demo``: a probe of the bundled run."""

from __future__ import annotations

import torch

from entropy_probe.cli.bar import TerminalProgress
from entropy_probe.cli.options import DType, DTypeOption, JsonOption, OutOption
from entropy_probe.cli.output import check_outputs, make_console, show
from entropy_probe.data.bundled_run import demo_files
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.pipeline.run import probe_checkpoint
from entropy_probe.pipeline.settings import Settings


def demo(dtype: DTypeOption = DType.FLOAT32, json_file: JsonOption = None, out: OutOption = None) -> None:
    """Probe the bundled checkpoint of a real GRPO run, end to end."""
    check_outputs(json_file, out)
    # So small a model gains nothing from threads, and loses much where other work has the cores.
    torch.set_num_threads(1)
    files = demo_files()
    console = make_console()
    console.print(f"A real GRPO checkpoint of a small Llama that adds two-digit numbers: {files.checkpoint.name}\n")
    result = probe_checkpoint(
        files.checkpoint,
        files.rollouts,
        Settings(
            dtype=dtype.torch_dtype,
            length_weight=LengthWeight.DR_GRPO,
            max_completion_length=files.max_completion_length,
        ),
        device="cpu",
        progress=TerminalProgress(),
    )
    show(result, console, json_file, out)
