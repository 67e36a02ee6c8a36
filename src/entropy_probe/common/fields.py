"""Settings whose fields say all of themselves in one place: type, default, check, help, and what their value is called."""

from __future__ import annotations

import inspect
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

from entropy_probe.common.choices import Check

KEY = "about"

T = TypeVar("T")
P = TypeVar("P", bound="Part")


@dataclass(frozen=True)
class About:
    """What a field says of itself besides its type and its default.

    Attributes:
        check: puts a value into the field's own type, or refuses it.
        help: what the field is, in one line. It serves Python and the command line, so that it names no option.
        metavar: what the value is called, such as NATS; None where its type says it.
    """

    check: Check
    help: str
    metavar: str | None = None


def setting(default: T, check: Check, help: str, metavar: str | None = None) -> T:
    """A field of a :class:`Part`, with what :class:`About` says of it."""
    return field(default=default, metadata={KEY: About(check, help, metavar)})


def about(of: Field[Any]) -> About:
    """What a field made by :func:`setting` says of itself."""
    found: About = of.metadata[KEY]
    return found


@dataclass(frozen=True)
class Part:
    """Settings, or a part of them: every field is made by :func:`setting`."""

    def __post_init__(self) -> None:
        """Put text into the fields' own types.

        Raises:
            InputError: a field holds what it may not.
        """
        for each in fields(self):
            object.__setattr__(self, each.name, about(each).check(each.name, getattr(self, each.name)))

    def part(self, kind: type[P]) -> P:
        """The fields of one part, as a record of their own."""
        return kind(**{each.name: getattr(self, each.name) for each in fields(kind)})


def described(kind: type[P]) -> type[P]:
    """A decorator that adds every field's help to the class's docstring."""
    lines = (f"    {each.name}: {about(each).help}" for each in fields(kind))
    kind.__doc__ = "\n".join([inspect.cleandoc(kind.__doc__ or ""), "", "Attributes:", *lines])
    return kind
