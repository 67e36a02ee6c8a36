"""Every layout of a dump that is known, and which one a file has: the one place that decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entropy_probe.data.rollouts.formats.areal import Areal
from entropy_probe.data.rollouts.formats.base import Dump, TextDump
from entropy_probe.data.rollouts.formats.nemo_rl import NemoRL
from entropy_probe.data.rollouts.formats.open_instruct import OpenInstruct
from entropy_probe.data.rollouts.formats.prime_rl import PrimeRL
from entropy_probe.data.rollouts.formats.slime import Slime
from entropy_probe.data.rollouts.formats.trl import Trl
from entropy_probe.data.rollouts.formats.verl import Verl
from entropy_probe.errors import InputError

EXACT: dict[str, Dump] = {dump.name: dump for dump in (OpenInstruct(), NemoRL(), Slime(), PrimeRL())}
"""Those that hold what was sampled, by name."""

TEXT: dict[str, TextDump] = {dump.name: dump for dump in (Verl(), Trl(), Areal())}
"""Those that hold text, by name: rows are made of them only where the user insists."""

NAMES = (*EXACT, *TEXT)
"""Of all, as users call them."""

OURS = {"prompt_ids", "response_ids"}
"""Columns that make a row one of our own files."""


def layout_of(row: Mapping[str, Any]) -> str | None:
    """The name of a row's layout; None where it is ours, or of none that is known for certain."""
    if row.keys() >= OURS:
        return None
    found = [name for name in NAMES if (EXACT.get(name) or TEXT[name]).recognises(row)]
    return found[0] if len(found) == 1 else None


def check_name(name: str) -> str:
    """The name of a layout.

    Raises:
        InputError: it is none.
    """
    if name not in NAMES:
        raise InputError(f"{name!r} names no dump of rollouts that is known; expected one of {', '.join(NAMES)}")
    return name
