"""Make the pictures that README shows, from the bundled checkpoint (`python docs/pictures.py`)."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from rich.console import Console

from entropy_probe import Settings, probe_checkpoint
from entropy_probe.data.bundled_run import demo_files
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.report.plots import plot_predicted_and_realized, plot_row_means
from entropy_probe.report.text import print_report

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    """Probe, and write the terminal's picture and both plots."""
    torch.set_num_threads(1)
    files = demo_files()
    settings = Settings(length_weight=LengthWeight.DR_GRPO, max_completion_length=files.max_completion_length)
    report = probe_checkpoint(files.checkpoint, files.rollouts, settings).report
    console = Console(record=True, width=96, file=io.StringIO(), force_terminal=True)
    print_report(report, console)
    console.save_svg(str(IMAGES / "demo.svg"), title="make demo")
    plot_predicted_and_realized(report, IMAGES / "predicted_and_realized.png")
    plot_row_means(report, IMAGES / "row_means.png")


if __name__ == "__main__":
    main()
