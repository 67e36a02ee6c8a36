"""What a dump tells of itself: whether a row is its own, and its rows in our columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from entropy_probe.common.evidence import Evidence
from entropy_probe.data.rollouts.containers.rows import Located


@dataclass(frozen=True)
class DumpOptions:
    """What a dump may leave open.

    Attributes:
        step: the trainer's step whose rows are taken, as the dump counts it; None where it holds one.
        reward_key: which of several rewards a response has is the trainer's.
    """

    step: int | None = None
    reward_key: str | None = None


@dataclass(frozen=True)
class DumpFile:
    """A file of a dump.

    Attributes:
        path: where it lies; some layouts say the step in its name.
        rows: its rows as they are stored.
    """

    path: Path
    rows: Sequence[Located]


@dataclass(frozen=True)
class Converted:
    """A dump in our columns.

    Attributes:
        rows: by place, what a row of our files holds; not yet checked.
        notes: what a reader of results must know of the dump.
    """

    rows: Sequence[Located]
    notes: Sequence[Evidence] = ()


class Dump(Protocol):
    """One layout that holds what was sampled token by token.

    A method raises InputError, in one line with the file's name, for what is damaged or what our columns cannot say.
    """

    @property
    def name(self) -> str:
        """The library's, as users call it."""

    @property
    def title(self) -> str:
        """What the dump is, in words."""

    @property
    def takes(self) -> frozenset[str]:
        """Which of the options it reads."""

    def recognises(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is of this layout for certain, by the names of its columns."""

    def convert(self, files: Sequence[DumpFile], options: DumpOptions) -> Converted:
        """Rows in our columns, of all files as one batch."""


@dataclass(frozen=True)
class Text:
    """A response of which a dump holds the text.

    Attributes:
        where: the place of the row.
        prompt: the prompt's text.
        response: the response's.
        columns: ours that the dump has beside them; ``prompt_id`` only where it names the prompt.
    """

    where: str
    prompt: str
    response: str
    columns: Mapping[str, Any] = field(default_factory=dict)


class TextDump(Protocol):
    """One layout that holds text and no token ids: not what was sampled."""

    @property
    def name(self) -> str:
        """The library's, as users call it."""

    @property
    def title(self) -> str:
        """What the dump is, in words."""

    @property
    def takes(self) -> frozenset[str]:
        """Which of the options it reads."""

    @property
    def special_tokens(self) -> bool:
        """Whether the text has its special tokens."""

    def recognises(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is of this layout for certain, by the names of its columns."""

    def texts(self, files: Sequence[DumpFile], options: DumpOptions) -> Iterator[Text]:
        """What the rows hold."""
