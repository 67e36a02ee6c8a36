"""How long work tells that it moves: the caller hands in a :class:`Progress`, the command line draws it as a bar. And how long
it took."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Clock:
    """Seconds by stage."""

    started: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        yield
        self.stages[name] = time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Every stage so far, and the total since the clock was made."""
        return {**self.stages, "total": time.perf_counter() - self.started}
