"""The schema: one row of a rollouts file to a record and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from entropy_probe.data.rollouts.records import Rollout
from entropy_probe.data.rollouts.values import OPTIONAL, REQUIRED
from entropy_probe.errors import InputError

REQUIRED_COLUMNS = f"{', '.join(REQUIRED)}, and reward or advantage"


def rollout_from_row(row: Mapping[str, Any], where: str) -> Rollout:
    """Check one row against the schema. ``where`` names it in messages.

    Raises:
        InputError: a required column is missing, or :class:`Rollout` refuses a value.
    """
    for name in REQUIRED:
        if row.get(name) is None:
            raise InputError(f"{where} has no {name}; required are {REQUIRED_COLUMNS}")
    known = {**REQUIRED, **OPTIONAL}
    columns: dict[str, Any] = {name: row.get(name) for name in known}
    try:
        return Rollout(**columns, extra={name: value for name, value in row.items() if name not in known})
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def as_rollouts(rows: Iterable[Rollout | Mapping[str, Any]]) -> Iterator[Rollout]:
    """Records as they are, and mappings with the columns of a file's row as records.

    Raises:
        InputError: these are no rows, or a row is neither or breaks the schema; it is named by its number, from 0.
    """
    if not isinstance(rows, Iterable):
        raise InputError(f"the rollouts are a {type(rows).__name__}; expected rows, each a Rollout or a mapping")
    for index, row in enumerate(rows):
        if isinstance(row, Rollout):
            yield row
        elif isinstance(row, Mapping):
            yield rollout_from_row(row, f"row {index}")
        else:
            raise InputError(
                f"row {index} is a {type(row).__name__}; expected a Rollout, or a mapping with {REQUIRED_COLUMNS} (a file "
                "is read by read_rollouts)"
            )


def row_from_rollout(rollout: Rollout) -> dict[str, Any]:
    """The row of the file: declared columns that have a value, then the kept unknown ones.

    Raises:
        InputError: ``extra`` uses the name of a declared column.
    """
    declared = {f.name: getattr(rollout, f.name) for f in fields(rollout) if f.name != "extra"}
    clash = sorted(declared.keys() & rollout.extra.keys())
    if clash:
        raise InputError(
            f"prompt_id {rollout.prompt_id!r}: extra holds {', '.join(clash)}, a column of the schema itself"
        )
    row = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in declared.items()
        if value is not None
    }
    return row | dict(rollout.extra)
