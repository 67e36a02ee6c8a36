"""Options that are the fields of settings: one option a field, with its help, in the panel of its part."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from typing import Annotated, Any, TypeVar, get_type_hints

import torch
import typer

from entropy_probe.cli.options import Autocast, DType
from entropy_probe.common.fields import About, Part, about
from entropy_probe.pipeline import torch_types
from entropy_probe.pipeline.settings import COUNT, PARTS
from entropy_probe.statistics.linearity import SweepRange

P = TypeVar("P", bound=Part)
Command = Callable[..., None]


@dataclass(frozen=True)
class Spelling:
    """How the command line spells a field whose name it does not take.

    Attributes:
        name: of the option, without its dashes.
        metavar: what its value is called there; None takes the field's.
        unit: how many of the field's units the option counts in; None takes the value as it is.
    """

    name: str
    metavar: str | None = None
    unit: float | None = None


SPELLINGS: Mapping[str, Spelling] = {
    "loss_type": Spelling("loss"),
    "weighting": Spelling("importance-weights"),
    "microbatch_size": Spelling("microbatch"),
    "memory_bytes": Spelling("memory", "GB", 1e9),
    "vector_dtype": Spelling("vectors"),
}
"""All other options have the name of their field, with dashes."""

TYPES: Mapping[Any, Any] = {
    torch.dtype: DType,
    torch.dtype | None: DType | None,
    torch_types.Autocast: Autocast | None,
    SweepRange | None: str | None,
}
"""What the command line reads for a field's type; the field's check reads the text of it. Other types are their own."""

PANELS: Mapping[str, str] = {field.name: part.__name__ for part in PARTS for field in fields(part)}


def spelling_of(name: str) -> Spelling:
    """The option of a field."""
    return SPELLINGS.get(name) or Spelling(name.replace("_", "-"))


def with_settings(kind: type[P], **types: type) -> Callable[[Command], Command]:
    """A decorator that gives a command one option for every field of its settings, in place of its parameter ``settings``.

    Args:
        kind: of the settings, which the command is then given.
        types: what the command line reads for a field, where it is not as in :data:`TYPES`.

    Raises:
        InputError: by the command, where an option holds what its field may not.
    """

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True)
        parameters = list[inspect.Parameter]()
        for parameter in own.parameters.values():
            parameters += _options(kind, types) if parameter.name == "settings" else [_by_name(parameter)]

        @wraps(command)
        def with_fields(**given: Any) -> None:
            chosen = {field.name: _in_units(field.name, given.pop(field.name)) for field in fields(kind)}
            command(settings=kind(**chosen), **given)

        # typer reads both.
        with_fields.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_fields.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_fields

    return decorate


def _options(kind: type[Part], types: Mapping[str, type]) -> list[inspect.Parameter]:
    """Of all fields, part by part."""
    hints = get_type_hints(kind)
    own = {field.name: field for field in fields(kind)}
    assert own.keys() <= PANELS.keys(), f"no part has {own.keys() - PANELS.keys()}"
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(own[name].default),
            annotation=Annotated[
                types.get(name) or TYPES.get(hints[name], hints[name]),
                _option(name, about(own[name]), switch=hints[name] is bool, on=own[name].default is True),
            ],
        )
        for name in PANELS
        if name in own
    ]


def _option(name: str, of: About, *, switch: bool, on: bool) -> Any:
    spelling = spelling_of(name)
    declared = f"--{spelling.name}"
    if on:
        declared += f"/--no-{spelling.name}"
    return typer.Option(
        declared,
        help=of.help,
        metavar=None if switch else spelling.metavar or of.metavar,
        min=1 if of.check is COUNT else None,
        rich_help_panel=PANELS[name],
    )


def _default(value: Any) -> Any:
    return torch_types.dtype_name(value) if isinstance(value, torch.dtype) else value


def _in_units(name: str, value: Any) -> Any:
    unit = spelling_of(name).unit
    return value if unit is None or value is None else value * unit


def _by_name(parameter: inspect.Parameter) -> inspect.Parameter:
    """A command's own parameter: typer gives all by name, so that one without a default may follow one with."""
    return parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
