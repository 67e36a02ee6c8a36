"""Reading and writing rollouts files, JSON Lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from entropy_probe.common.choices import path_of
from entropy_probe.common.files import replacing
from entropy_probe.data.rollouts.containers.parquet import write_parquet
from entropy_probe.data.rollouts.grouping import group_rollouts
from entropy_probe.data.rollouts.reading import read_files
from entropy_probe.data.rollouts.records import Rollout, RolloutBatch
from entropy_probe.data.rollouts.rows import as_rollouts, row_from_rollout
from entropy_probe.errors import InputError, one_line


def read_batch(
    path: str | Path | Sequence[str | Path], temperature: float | None = None, *, least_responses: int = 2
) -> RolloutBatch:
    """Read, check and group a rollouts file: :func:`read_rollouts`, then :func:`group_rollouts`.

    Args:
        path: a ``.jsonl`` or ``.parquet`` file, a trainer's dump with exact token ids, or several as one batch.
        temperature: sampling temperature of rows that declare none; 1 if neither says.
        least_responses: that a prompt must have; 1 will do for an evaluation batch under Rao-Blackwell.

    Raises:
        InputError: see :func:`read_rollouts` and :func:`group_rollouts`.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from entropy_probe import read_batch, write_rollouts
        >>> row = {"prompt_ids": [5], "response_ids": [7, 1], "reward": 1.0}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "rollouts.jsonl"
        ...     write_rollouts([{"prompt_id": name} | row for name in "aabb"], path)
        ...     batch = read_batch(path)
        >>> len(batch.groups), batch.group_sizes
        (2, (2, 2))
    """
    return group_rollouts(read_rollouts(path), temperature, least_responses=least_responses)


def read_rollouts(path: str | Path | Sequence[str | Path]) -> list[Rollout]:
    """Read rows from ``.jsonl``/``.json``/``.ndjson`` (JSON Lines) or ``.parquet``, or a trainer's dump with exact token ids.

    Several files, by their paths or by a pattern such as ``step-00051-rank*.jsonl``, are read one after the other.

    Args:
        path: the file, or several.

    Raises:
        InputError: a file is missing, empty, not of a known kind, a dump of text, or a row breaks the schema (its number is
            named).

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from entropy_probe import read_rollouts
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "rollouts.jsonl"
        ...     _ = path.write_text('{"prompt_id": "a", "prompt_ids": [5], "response_ids": [7, 1], "reward": 1}\\n')
        ...     rows = read_rollouts(path)
        >>> rows[0].prompt_id, rows[0].response_ids, rows[0].reward
        ('a', (7, 1), 1.0)
    """
    return read_files(path).rollouts


def write_rollouts(rollouts: RolloutBatch | Iterable[Rollout | Mapping[str, Any]], path: str | Path) -> None:
    """Write rows, records or mappings, as JSON Lines or Parquet, by the file's name; an interrupted write leaves no file.

    Of a batch these are its responses. Where they declare no temperature and the batch's is not 1, which a reader would
    take, each is written with the batch's.

    Raises:
        InputError: a row breaks the schema, the name ends in neither ``.jsonl`` nor ``.parquet``, the folder cannot be written,
            or the format cannot hold a value.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from entropy_probe import Rollout, write_rollouts
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "rollouts.jsonl"
        ...     write_rollouts([Rollout("a", (5,), (7, 1), 1.0)], path)
        ...     print(path.read_text().strip())
        {"prompt_id": "a", "prompt_ids": [5], "response_ids": [7, 1], "reward": 1.0}
    """
    path = path_of("the path of the rollouts file", path)
    if isinstance(rollouts, RolloutBatch):
        rollouts = _with_temperature(rollouts)
    rows = [row_from_rollout(rollout) for rollout in as_rollouts(rollouts)]
    if path.suffix not in {".jsonl", ".parquet"}:
        raise InputError(f"{path} ends in {path.suffix!r}; rollouts are written as .jsonl or .parquet")
    if path.suffix == ".parquet":
        write_parquet(rows, path)
        return
    try:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: a value cannot be written as JSON: {one_line(error)}") from error
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _with_temperature(batch: RolloutBatch) -> Sequence[Rollout]:
    if batch.temperature == 1 or any(row.temperature is not None for row in batch.responses):
        return batch.responses
    return [replace(row, temperature=batch.temperature) for row in batch.responses]
