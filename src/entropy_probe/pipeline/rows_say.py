"""What every row of a batch says in a column that is not of the schema."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from entropy_probe.common.choices import shown
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.errors import InputError

T = TypeVar("T", bound=Hashable)


def recorded_value(batch: RolloutBatch, name: str, parse: Callable[[object], T]) -> T | None:
    """What every row says under a name; None where none has it.

    Raises:
        InputError: the rows disagree, or ``parse`` refuses the value; the prompt of the row is named.
    """
    first = batch.responses[0].extra.get(name)
    found: T | None = None
    for place, row in enumerate(batch.responses):
        value = row.extra.get(name)
        try:
            parsed = None if value is None else parse(value)
        except InputError as error:
            raise InputError(f"prompt_id {row.prompt_id!r}: {error}") from error
        if place == 0:
            found = parsed
        elif parsed != found:
            raise InputError(
                f"prompt_id {row.prompt_id!r}: the rows disagree about {name} ({shown(first)} and {shown(value)}); give the "
                "rows of one step"
            )
    return found


def said(name: str) -> str:
    """How a message calls a recorded value."""
    return f"the rows say {name}"
