"""Where a command's output goes: the terminal, and files that are known to be writable before the work begins."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from entropy_probe.common.files import check_writable
from entropy_probe.pipeline.run import ProbeResult
from entropy_probe.report.files import check_report_folder, write_json, write_report_folder
from entropy_probe.report.text import print_report


def make_console() -> Console:
    """Standard output. Where no terminal sets a width (a pipe, a log), names and numbers are not broken over lines."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 160))


def check_outputs(json_file: Path | None, out: Path | None) -> None:
    """Refuse, before the work, what could not be written after it.

    Raises:
        InputError: the file or the folder cannot be written.
    """
    if json_file is not None:
        check_writable(json_file)
    if out is not None:
        check_report_folder(out)


def show(result: ProbeResult, console: Console, json_file: Path | None, out: Path | None) -> None:
    """Print a probe's report, and write it where that was asked for."""
    print_report(result.report, console)
    if json_file is not None:
        write_json(result.report, json_file)
        console.print(f"report written to {json_file}")
    if out is not None:
        write_report_folder(result.report, result.kernel, out)
        console.print(f"report, kernel and plots written to {out}")
