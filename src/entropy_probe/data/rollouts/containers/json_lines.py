"""JSON Lines: one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entropy_probe.errors import InputError, one_line


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(where, row)`` for each line that is not blank; ``where`` names file and line.

    Raises:
        InputError: a line is no JSON object, or the file is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path} line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{where} is not JSON ({error.msg}); expected one JSON object a line") from error
                except (ValueError, RecursionError) as error:  # a number of thousands of digits, or endless nesting
                    raise InputError(
                        f"{where} cannot be read ({one_line(error)}); expected one JSON object a line"
                    ) from error
                if not isinstance(row, dict):
                    raise InputError(f"{where} is a JSON {type(row).__name__}; expected one JSON object a line")
                yield where, row
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text; expected JSON Lines") from error
