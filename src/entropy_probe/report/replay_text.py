"""A replay for people: one sentence, the figures, then suspicions and warnings with evidence and advice."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from entropy_probe.report.replay_schema import ReplayReport
from entropy_probe.report.text import print_chapters, print_evidence


def print_replay(report: ReplayReport, console: Console) -> None:
    """Print the whole report."""
    console.print(Text(report.headline, style="bold"))
    print_chapters(report.blocks(), console)
    for suspicion in report.suspicions:
        print_evidence("suspicion", "bold red", report.seen(suspicion), suspicion.advice, console)
    for warning in report.warnings:
        print_evidence("warning", "bold yellow", warning.seen, warning.advice, console)
