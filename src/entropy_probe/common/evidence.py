"""A warning of a report, wherever in the package it is found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Evidence:
    """A warning: a short code, what was seen with its figures, and what to do."""

    code: str
    seen: str
    advice: str
