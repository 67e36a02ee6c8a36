"""Parquet files of rows. pyarrow is loaded only when one is read or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entropy_probe.common.files import replacing
from entropy_probe.errors import InputError, one_line, out_of_memory


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file.

    Raises:
        InputError: it cannot be read, or pyarrow is not there.
    """
    pyarrow = _pyarrow(path)
    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{path} cannot be read as Parquet: {one_line(error)}") from error
    return rows


def write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows to a Parquet file; an interrupted write leaves no file. A column that a row lacks is null there.

    Raises:
        InputError: a column has values of several types, the folder cannot be written, or pyarrow is not there.
    """
    pyarrow = _pyarrow(path)
    # Table.from_pylist takes its columns from the first row alone.
    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
        if out_of_memory(error):
            raise
        raise InputError(
            f"{path}: a value cannot be written as Parquet, which has one type a column: {one_line(error)}"
        ) from error
    with replacing(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"{path} is a Parquet file, which needs pyarrow, and pyarrow cannot be imported ({one_line(error)}); install "
            "pyarrow, or use JSON Lines (.jsonl)"
        ) from error
    return pyarrow
