"""Rows of files, ours or a trainer's dump, several files as one batch."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from entropy_probe.common.choices import path_of
from entropy_probe.common.evidence import Evidence
from entropy_probe.data.rollouts.containers.rows import Located, read_dumped
from entropy_probe.data.rollouts.formats.base import Converted, DumpFile, DumpOptions
from entropy_probe.data.rollouts.formats.registry import EXACT, TEXT, check_name, layout_of
from entropy_probe.data.rollouts.formats.retokenized import MARK, retokenize
from entropy_probe.data.rollouts.records import Rollout
from entropy_probe.data.rollouts.rows import rollout_from_row
from entropy_probe.errors import InputError

Paths = str | Path | Sequence[str | Path]
"""A file, a pattern of names, or several of them."""

PATTERN = frozenset("*?[")
DEFAULTS = DumpOptions()


@dataclass(frozen=True)
class ReadRollouts:
    """What files hold.

    Attributes:
        rollouts: the rows, file by file.
        files: where they were read.
        layout: the trainer's dump that they are; None for our own files.
        notes: what a reader of results must know of them.
    """

    rollouts: list[Rollout]
    files: tuple[Path, ...]
    layout: str | None
    notes: tuple[Evidence, ...] = ()

    @property
    def told(self) -> str:
        """The files, and the layout where it is not ours."""
        names = ", ".join(map(str, self.files))
        return names if self.layout is None else f"{names} ({self.layout})"


def read_files(
    paths: Paths, layout: str | None = None, options: DumpOptions = DEFAULTS, *, tokenizer: Any = None
) -> ReadRollouts:
    """Read one batch from files, of ours or of a trainer.

    Args:
        paths: the files; a pattern such as ``step-00051-rank*.jsonl`` stands for all that it fits, in the order of their names.
        layout: the trainer's dump that they are, of ``formats.registry.NAMES``; None looks at the first row of each.
        options: what a dump leaves open.
        tokenizer: makes ids of a dump that holds text alone; None refuses one.

    Raises:
        InputError: a file is missing, empty, not of a known kind, of another layout than the others, damaged, or of text; or a
            row breaks the schema.
    """
    files = files_of("rollouts", paths)
    opened = [_opened(path) for path in files]
    found: set[str | None] = (
        {check_name(layout)}
        if layout is not None
        else {None if first is None else layout_of(first[1]) for first, _ in opened}
    )
    if len(found) > 1:
        named = ", ".join(sorted("our own rows" if name is None else name for name in found))
        raise InputError(f"{_list(files)} hold {named}; one batch is of one layout: give the files of one")
    (layout,) = found
    if layout is None:
        rows = [rollout_from_row(row, where) for _, located in opened for where, row in located]
        _refuse_empty(rows, files)
        return ReadRollouts(rows, files, None, _marked(rows))
    dump = [DumpFile(path, list(rows)) for path, (_, rows) in zip(files, opened, strict=True)]
    _refuse_empty([located for file in dump for located in file.rows], files)
    _refuse_unread(layout, options)
    converted = _converted(dump, layout, options, tokenizer)
    rows = [rollout_from_row(row, where) for where, row in converted.rows]
    title = (EXACT.get(layout) or TEXT[layout]).title
    return ReadRollouts(rows, files, title, tuple(converted.notes))


def files_of(what: str, given: Paths) -> tuple[Path, ...]:
    """The files that paths and patterns name.

    Raises:
        InputError: none, one twice, a pattern that fits no file, or something that is no path.
    """
    listed: Sequence[object] = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    found: list[Path] = []
    for one in listed:
        path = path_of(what, one)
        if path.is_file() or not PATTERN & set(str(path)):
            found.append(path)
            continue
        matching = sorted(glob.glob(str(path)))
        if not matching:
            raise InputError(f"{path} fits no file; expected the path of a file, or a pattern of the names of several")
        found.extend(map(Path, matching))
    if not found:
        raise InputError(f"{what} is an empty list; expected the path of a file, or of several")
    known = [os.path.realpath(path) for path in found]
    again = next((path for number, path in enumerate(found) if known[number] in known[:number]), None)
    if again is not None:
        raise InputError(f"{again} is given twice; its rows would count twice")
    return tuple(found)


def _opened(path: Path) -> tuple[Located | None, Iterator[Located]]:
    """The first row of a file, and all of them."""
    rows = read_dumped(path)
    first = next(rows, None)
    return first, rows if first is None else itertools.chain([first], rows)


def _converted(files: Sequence[DumpFile], layout: str, options: DumpOptions, tokenizer: Any) -> Converted:
    if layout in EXACT:
        return EXACT[layout].convert(files, options)
    dump = TEXT[layout]
    if tokenizer is None:
        stripped = "" if dump.special_tokens else " without special tokens"
        raise InputError(
            f"{files[0].path} is {dump.title}, which holds text{stripped} and no token ids: what was sampled cannot be told "
            "from it; draw exact rows from the checkpoint itself (`entropy-probe sample`), or record them at the step "
            "(entropy_probe.integrations.rows)"
        )
    return retokenize(dump.texts(files, options), tokenizer, special_tokens=dump.special_tokens)


def _refuse_empty(rows: Sequence[object], files: Sequence[Path]) -> None:
    if not rows:
        raise InputError(f"{_list(files)} holds no rollouts; expected one row a response")


def _marked(rows: Sequence[Rollout]) -> tuple[Evidence, ...]:
    marked = sum(row.extra.get(MARK) is True for row in rows)
    if not marked:
        return ()
    return (
        Evidence(
            MARK,
            f"the ids of {marked} of {len(rows)} rows were made of text, and need not be those that were sampled",
            "Take exact rows (`entropy-probe sample`, or entropy_probe.integrations.rows at the step)",
        ),
    )


def _refuse_unread(layout: str, options: DumpOptions) -> None:
    dump = EXACT.get(layout) or TEXT[layout]
    for option in fields(options):
        if getattr(options, option.name) is not None and option.name not in dump.takes:
            raise InputError(f"{dump.title} has no {option.name} to choose; leave {option.name} out")


def _list(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files))
