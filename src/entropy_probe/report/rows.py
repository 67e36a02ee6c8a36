"""What a section shows, without a renderer: rows of a label, a value and a note, tables, and the chapters that they stand in.

A section gives blocks. A renderer (:mod:`~entropy_probe.report.text`) sets out what :func:`in_chapters` makes of them, and
knows of no section. A value is text, since how many digits it bears is the section's to say. Numbers for machines are in the
JSON and in the metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chapter:
    """A heading, under which several sections may stand. Chapters stand in the order of ``place``."""

    place: int
    title: str


OWN_STEP = Chapter(10, "The optimizer's own step, to first order")
PRECONDITIONED = Chapter(20, "The preconditioned step, to first order: δH₁")
FACTS = Chapter(90, "Batch and checkpoint")


@dataclass(frozen=True)
class Row:
    """A named value, and what is said of it: its unit, what it is given, or why there is none."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Lead:
    """A sentence that follows the headline."""

    sentence: str


@dataclass(frozen=True)
class Rows:
    """Rows of a chapter, after a ``sentence`` where there is one. Rows of ``detail`` follow all others of the chapter."""

    chapter: Chapter
    rows: Sequence[Row]
    sentence: str = ""
    detail: bool = False


@dataclass(frozen=True)
class Grid:
    """A table of a chapter: a line has a cell a column, of which the first names the line. ``notes`` stand below."""

    chapter: Chapter
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


Block = Lead | Rows | Grid


@dataclass(frozen=True)
class SetOut:
    """A chapter with all that its blocks say, in the order in which it is read."""

    chapter: Chapter
    sentences: list[str]
    rows: list[Row]
    grids: list[Grid]


def leads(blocks: Iterable[Block]) -> list[str]:
    """The sentences that follow the headline."""
    return [block.sentence for block in blocks if isinstance(block, Lead)]


def in_chapters(blocks: Iterable[Block]) -> list[SetOut]:
    """The chapters of these blocks; a chapter without a row, a sentence or a line is left out."""
    told = [block for block in blocks if not isinstance(block, Lead)]
    chapters = sorted(dict.fromkeys(block.chapter for block in told), key=lambda chapter: chapter.place)
    found = []
    for chapter in chapters:
        lists = [block for block in told if isinstance(block, Rows) and block.chapter == chapter]
        lists.sort(key=lambda block: block.detail)
        one = SetOut(
            chapter,
            [block.sentence for block in lists if block.sentence],
            [row for block in lists for row in block.rows],
            [block for block in told if isinstance(block, Grid) and block.chapter == chapter and block.lines],
        )
        if one.sentences or one.rows or one.grids:
            found.append(one)
    return found
