"""What a section is, and what is done with all sections of a report alike.

A report is a frozen dataclass whose fields are sections, lists of entries, or plain values. To add a section: write its record
in a file of this folder, as a :class:`Section` (or an :class:`Entry` where the report has a list of them), and give the report
a field of it. The JSON, the text and the metrics follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Protocol, Self

from entropy_probe.report.rows import Block


@dataclass(frozen=True)
class Context:
    """What a section's rows say that other parts of the report know.

    Attributes:
        nats: the unit of entropy changes, such as ``nats per response``.
        prompts: of the update's rollouts.
        parameters: that train.
        dtype: of weights and arithmetic.
    """

    nats: str
    prompts: int
    parameters: int
    dtype: str


class Section:
    """A record of the report. A field of the report holds one of them, or None.

    Fields are numbers, text, lists, mappings and further records; a None is explained in ``null_reasons`` where the record has
    such a field.
    """

    def shown(self, context: Context) -> Sequence[Block]:
        """What is shown of it; by default nothing."""
        return ()

    def metrics(self) -> Mapping[str, float | None]:
        """Its figures for a tracker by name, None where there is none; by default no figures."""
        return {}


class Entry:
    """A record of which the report holds a list. All of a list are told together; an empty list is not told."""

    @classmethod
    def shown_of(cls, entries: Sequence[Self], context: Context) -> Sequence[Block]:
        """What is shown of them; by default nothing."""
        return ()

    @classmethod
    def metrics_of(cls, entries: Sequence[Self]) -> Mapping[str, float | None]:
        """Their figures for a tracker by name, None where there is none; by default no figures."""
        return {}


class Sectioned(Protocol):
    """A report: a dataclass with its seconds."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def timing(self) -> Mapping[str, float]:
        """Seconds by stage, and in ``total``."""


def all_blocks(report: Sectioned, context: Context) -> list[Block]:
    """What all sections show, in the order of the report's fields."""
    found: list[Block] = []
    for value in _values(report):
        if isinstance(value, Section):
            found += value.shown(context)
        elif entries := _entries(value):
            found += type(entries[0]).shown_of(entries, context)
    return found


def figures(report: Sectioned) -> Iterator[tuple[str, float | None]]:
    """Name and value of every figure that a section gives, in the order of the report's fields."""
    for value in _values(report):
        if isinstance(value, Section):
            yield from value.metrics().items()
        elif entries := _entries(value):
            yield from type(entries[0]).metrics_of(entries).items()


def ends(name: str, interval: Sequence[float] | None) -> dict[str, float | None]:
    """An interval's ends as figures, ``name_low`` and ``name_high``."""
    low, high = (None, None) if interval is None else interval
    return {f"{name}_low": low, f"{name}_high": high}


def records(value: object) -> Iterator[Any]:
    """Every record that stands somewhere in a value, itself included."""
    if is_dataclass(value):
        yield value
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from records(item)


def _values(report: Sectioned) -> list[object]:
    return [getattr(report, field.name) for field in fields(report)]


def _entries(value: object) -> list[Entry]:
    """The list as entries, where it is one of them."""
    return [item for item in value if isinstance(item, Entry)] if isinstance(value, list) else []
