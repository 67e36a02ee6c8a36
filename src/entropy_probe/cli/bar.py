"""A progress bar on a terminal; nothing where stderr is not one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")


class TerminalProgress:
    """Draws one bar a stage on stderr and removes it when the stage is done."""

    def __init__(self) -> None:
        """Bind to stderr."""
        self._console = Console(stderr=True)

    def track(self, items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
        """Yield every item under a bar."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        ) as progress:
            yield from progress.track(items, total=total, description=description)
