"""How long work tells that it moves: the caller hands in a :class:`Progress`, the command line draws it as a bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Progress(Protocol):
    """Wraps an iterable and reports each step of it."""

    def track(self, items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
        """Yield every item, saying after each that one of ``total`` is done."""
        ...


class Silent:
    """Reports nothing: the default for library use."""

    def track(self, items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
        """Yield every item."""
        yield from items
