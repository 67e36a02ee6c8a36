"""A report for people: its first sentences, the chapters with their numbers, then warnings with evidence and advice.

It sets out the blocks of :mod:`entropy_probe.report.rows` and knows no section.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from entropy_probe.report.rows import Block, Grid, Row, SetOut, in_chapters, leads
from entropy_probe.report.schema import Report


def print_report(report: Report, console: Console) -> None:
    """Print the whole report."""
    blocks = report.blocks()
    # In a pipe or a log a sentence is one line.
    wrap = not console.is_terminal
    console.print(Text(report.headline, style="bold"), soft_wrap=wrap)
    for sentence in leads(blocks):
        console.print(Text(sentence), soft_wrap=wrap)
    print_chapters(blocks, console)
    for warning in report.warnings:
        print_evidence("warning", "bold yellow", warning.seen, warning.advice, console)
    if not report.warnings:
        console.print("no warnings")


def print_chapters(blocks: Iterable[Block], console: Console) -> None:
    """Print the chapters after a blank line."""
    console.print()
    for chapter in in_chapters(blocks):
        body = Padding(_body(chapter), (0, 0, 1, 2))
        console.print(Group(Text(chapter.chapter.title, style="underline"), body))


def print_evidence(kind: str, style: str, seen: str, advice: str, console: Console) -> None:
    """Print what was seen, and what to do about it."""
    console.print(Text.assemble((f"{kind}: ", style), f"{seen}. ", (advice + ".", "italic")))


def _body(chapter: SetOut) -> RenderableType:
    parts: list[RenderableType] = [Text(sentence) for sentence in chapter.sentences]
    if chapter.rows:
        parts.append(_rows(chapter.rows))
    for grid in chapter.grids:
        parts += [_grid(grid), *(Text(note, style="dim") for note in grid.notes)]
    return Group(*parts)


def _rows(rows: Sequence[Row]) -> Table:
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(Text(row.label), Text(row.value), Text(row.note, style="dim"))
    return table


def _grid(grid: Grid) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    first, *others = grid.columns
    table.add_column(first)
    for column in others:
        table.add_column(column, justify="right", no_wrap=True)
    for line in grid.lines:
        table.add_row(*line)
    return table
