"""Where a value comes from."""

from __future__ import annotations

from enum import StrEnum


class Source(StrEnum):
    """Where a value comes from: a caller, the rows, or neither."""

    GIVEN = "given"
    RECORDED = "recorded"
    UNKNOWN = "unknown"
