"""The rows of a file by what its name ends in: the one place that decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from entropy_probe.common.choices import path_of
from entropy_probe.data.rollouts.containers.json_lines import read_json_lines
from entropy_probe.data.rollouts.containers.parquet import read_parquet
from entropy_probe.data.rollouts.containers.torch_file import read_samples
from entropy_probe.errors import InputError

Located = tuple[str, dict[str, Any]]
"""A row, after the place that names it in messages."""


def read_rows(path: str | Path) -> Iterator[Located]:
    """Yield ``(where, row)`` for each row of a JSON Lines or Parquet file; ``where`` names the place for messages.

    Raises:
        InputError: the file is missing or not what its name says.
    """
    return _read(path, {})


def read_dumped(path: str | Path) -> Iterator[Located]:
    """The same, of a file that a trainer wrote: also what ``torch.save`` wrote (``.pt``).

    Raises:
        InputError: the file is missing, not what its name says, or a container that is not read.
    """
    return _read(path, {".pt": read_samples})


def _read(given: str | Path, more: dict[str, Callable[[Path], Iterator[Located]]]) -> Iterator[Located]:
    path = path_of("the rollouts file", given)
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file; expected a .jsonl or .parquet file")
    if path.suffix == ".parquet":
        return ((f"{path} row {number}", row) for number, row in enumerate(read_parquet(path)))
    if path.suffix in {".jsonl", ".json", ".ndjson"}:
        return read_json_lines(path)
    if path.suffix in more:
        return more[path.suffix](path)
    raise InputError(f"{path} ends in {path.suffix!r}; {UNREAD.get(path.suffix, EXPECTED)}")


EXPECTED = "expected .jsonl (JSON Lines) or .parquet"
UNREAD = {
    ".pkl": "a pickle runs code when it is read, and is not (SkyRL writes training_input.pkl so): load it where it was "
    "written, and write its tokens as .jsonl (docs/usage.md, rollouts of other trainers)",
    ".pickle": "a pickle runs code when it is read, and is not: load it where it was written, and write its tokens as .jsonl",
    ".bin": "msgpack micro-batches, as prime-rl's transport writes them, are not read: have it write token exports "
    "(enable_token_export), which are .jsonl",
    ".msgpack": "msgpack is not read: have the trainer write .jsonl (prime-rl: enable_token_export)",
}
"""Containers that trainers write and that are not read, and what to do."""
