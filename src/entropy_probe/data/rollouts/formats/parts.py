"""What several layouts need: a sequence cut into prompt and response, masks in our columns, prompts told apart, one step."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entropy_probe.data.rollouts.containers.rows import Located
from entropy_probe.data.rollouts.formats.base import DumpFile, DumpOptions
from entropy_probe.errors import InputError, some_of


@dataclass(frozen=True)
class Span:
    """Where a response stands in a sequence of prompt and response."""

    first: int
    last: int

    def of(self, values: Sequence[Any]) -> list[Any]:
        """The response's part."""
        return list(values[self.first : self.last])


def drawn_of(mask: Sequence[Any], log_probs: Sequence[Any] | None) -> list[bool]:
    """Which tokens the policy drew, from the trainer's one mask of its loss and its sampler's log-probs.

    A trainer has 0 in that mask at what the policy did not draw (a prompt, a tool's output), of which its sampler has no
    log-prob and stores 0, and at drawn tokens that its loss leaves out. The sampler's log-probs tell the two apart; without
    them all are taken for not drawn.
    """
    if log_probs is None:
        return [bool(kept) for kept in mask]
    return [bool(kept) or value not in (None, 0) for kept, value in zip(mask, log_probs, strict=True)]


def span_of(drawn: Sequence[bool], where: str) -> Span:
    """From the first token that was drawn to the last one: nothing that was drawn is conditioned on what follows.

    Raises:
        InputError: none was drawn, or the first token of all.
    """
    places = [place for place, here in enumerate(drawn) if here]
    if not places:
        raise InputError(f"{where}: no token is in the loss and none has a sampler's log-prob; leave the row out")
    if places[0] == 0:
        raise InputError(
            f"{where}: the mask of the loss begins with the first token, so that there is no prompt before it"
        )
    return Span(places[0], places[-1] + 1)


def masks_of(mask: Sequence[Any], drawn: Sequence[bool]) -> dict[str, Any]:
    """``sampled`` and ``loss_mask`` of a response, where they say anything.

    A response of which nothing was drawn for all that is known, and that has a place in the batch, was drawn and left out.
    """
    if not any(drawn):
        return {"loss_mask": [0] * len(mask)}
    found: dict[str, Any] = {}
    if not all(drawn):
        found["sampled"] = list(drawn)
    if any(here and not kept for here, kept in zip(drawn, mask, strict=True)):
        found["loss_mask"] = [int(bool(kept)) for kept in mask]
    return found


def log_probs_at(values: Sequence[Any], drawn: Sequence[bool]) -> list[Any]:
    """Log-probs, with 0 where nothing was drawn: what a file holds there is anything."""
    return [value if here else 0.0 for value, here in zip(values, drawn, strict=True)]


def one_if_equal(values: Sequence[Any], mask: Sequence[Any]) -> Any:
    """The one value that all tokens in the loss have, or all values where they differ."""
    inside = [value for value, kept in zip(values, mask, strict=True) if kept] or list(values)
    return inside[0] if len(set(inside)) == 1 else list(values)


class Numbers:
    """Numbers things by their first appearance: equal ones have one number."""

    def __init__(self) -> None:
        """None has a number yet."""
        self._known: dict[Hashable, int] = {}

    def of(self, thing: Hashable) -> int:
        """Its number, from 0."""
        return self._known.setdefault(thing, len(self._known))


def column(row: Mapping[str, Any], name: str, where: str) -> Any:
    """A column that a row of this layout has.

    Raises:
        InputError: it has not.
    """
    if row.get(name) is None:
        raise InputError(f"{where} has no {name}, which other rows of this layout have; is the file whole?")
    return row[name]


def column_of(row: Mapping[str, Any], name: str, count: int, where: str) -> list[Any]:
    """A column with a value for each of ``count`` tokens.

    Raises:
        InputError: there is none, it is no list, or it has another length.
    """
    found = column(row, name, where)
    if not isinstance(found, list):
        raise InputError(f"{where}: {name} is a {type(found).__name__}; expected a list with a value a token")
    if len(found) != count:
        raise InputError(f"{where}: {name} has {len(found)} values for {count} tokens; is the file whole?")
    return found


def of_one_step(files: Iterable[DumpFile], name: str, options: DumpOptions) -> list[Located]:
    """Rows of the one step that is asked for, or that there is; a file of a dump is not a step.

    Raises:
        InputError: there are several and none is asked for, or the one asked for is not there; the steps are listed.
    """
    files = list(files)
    rows = [located for file in files for located in file.rows]
    steps = sorted({_integer(row, name, where) for where, row in rows})
    where = some_of([str(file.path) for file in files])
    listed = some_of([str(step) for step in steps], 12)
    if options.step is None and len(steps) > 1:
        raise InputError(
            f"{where} holds {len(steps)} steps ({listed}); one batch is what one step consumed: convert the dump with "
            "the step to take"
        )
    if options.step is not None and options.step not in steps:
        raise InputError(f"{where} holds no rows of step {options.step}, but of {listed}")
    return [(where, row) for where, row in rows if options.step is None or row[name] == options.step]


def _integer(row: Mapping[str, Any], name: str, where: str) -> int:
    found = column(row, name, where)
    if isinstance(found, bool) or not isinstance(found, int):
        raise InputError(f"{where}: {name} is a {type(found).__name__}; expected an integer")
    return found
