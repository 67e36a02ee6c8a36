"""What a field of settings may hold: a check returns the value in the field's own type, or refuses it in one line.

Text is taken for what it names, so that settings may come from a file: ``"dapo"`` for an enum's member. A
number is never read from text, nor from a truth value.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from enum import Enum, StrEnum
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from entropy_probe.errors import InputError

Check = Callable[[str, object], Any]
"""(name of the field, what it was given) to what it holds; raises InputError."""

E = TypeVar("E", bound=StrEnum)
T = TypeVar("T")

LONGEST = 40


def shown(value: object) -> str:
    """A value in a message of one line, cut where it is long."""
    # An int of thousands of digits has no repr.
    text = (
        "a very large number" if isinstance(value, int) and abs(value) > 10**LONGEST else " ".join(repr(value).split())
    )
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def member(what: str, value: object, kind: type[E]) -> E:
    """A member of ``kind``, from itself or from its name.

    Raises:
        InputError: no such name, or another type; the known ones are listed.
    """
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and not isinstance(value, Enum):
        for known in kind:
            if value == known.value:
                return known
    raise InputError(f"{what} is {shown(value)}; known are {', '.join(kind)}")


def number(what: str, value: object, *, above: bool = False) -> float:
    """A finite number, 0 or above; above 0 with ``above``.

    Raises:
        InputError: none such.
    """
    found = float_of(value)
    if found is None or not math.isfinite(found) or found < 0 or (above and found == 0):
        raise InputError(f"{what} is {shown(value)}; expected a finite number{' above 0' if above else ', 0 or above'}")
    return found


def float_of(value: object) -> float | None:
    """A real number of any library as a float; None for what is none, for truth values and for what float64 cannot hold."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def whole_number(what: str, value: object, *, least: int | None = None) -> int:
    """A whole number, ``least`` or above. A float is none, integral or not.

    Raises:
        InputError: none such.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or (least is not None and int(value) < least):  # type: ignore[call-overload]
        limit = "" if least is None else f", {least} or above"
        raise InputError(f"{what} is {shown(value)}; expected a whole number{limit}")
    return int(value)  # type: ignore[call-overload, no-any-return]


def truth(what: str, value: object) -> bool:
    """True or false, and nothing that only counts as such.

    Raises:
        InputError: another value.
    """
    if not isinstance(value, bool):
        raise InputError(f"{what} is {shown(value)}; expected True or False")
    return value


def path_of(what: str, value: object) -> Path:
    """A path, from text or from any other library's path.

    Raises:
        InputError: neither, or empty text.
    """
    found = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(found, str) or not found:
        raise InputError(f"{what} is {shown(value)}; expected a path, as text or as a pathlib.Path")
    return Path(found)


def settings_of(value: object, default: T) -> T:
    """Settings of the default's own type; None takes the default.

    Raises:
        InputError: another type.
    """
    if value is None:
        return default
    kind = type(default)
    if not isinstance(value, kind):
        raise InputError(
            f"settings is {shown(value)}; expected {kind.__name__}(...) with what differs from the defaults, or None"
        )
    return value


def optional(check: Check) -> Check:
    """The same check, where None is a value too."""
    return lambda what, value: None if value is None else check(what, value)
