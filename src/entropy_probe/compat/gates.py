"""The gate before another library's private name: where it is gone, or of another kind, one line says so and nothing runs."""

from __future__ import annotations

import importlib
from typing import Any

from entropy_probe.errors import InputError

CHECKED = {
    "accelerate": "1.4 to 1.15",
    "torch": "2.6 to 2.13",
    "transformers": "4.56 to 5.23",
    "trl": "1.10 to 1.16",
}
"""Versions in whose sources the names were read. Others may run too: a gate asks for the name and not for the version."""


def version_of(library: str) -> str:
    """The version that an imported library tells of itself."""
    return str(getattr(importlib.import_module(library), "__version__", "of unknown version"))


def closed(library: str, name: str, problem: str = "is missing") -> InputError:
    """The error of a gate that stays closed.

    Args:
        library: whose name it is.
        name: in full, as in ``torch.utils.checkpoint._CachingTorchDispatchMode``.
        problem: what is wrong with it.
    """
    return InputError(
        f"{name} {problem} in {library} {version_of(library)}, and entropy-probe reads this private name of it; install "
        f"{library} {CHECKED[library]}"
    )


def module_name(module: str, name: str, kind: type | tuple[type, ...]) -> Any:
    """What ``module`` calls ``name``.

    Args:
        module: of a library; it is imported.
        name: in it.
        kind: what the value must be an instance of.

    Raises:
        InputError: the module or the name is missing, or the value is of another kind.
    """
    library = module.partition(".")[0]
    try:
        owner = importlib.import_module(module)
    except ImportError as error:
        raise closed(library, module) from error
    return attribute(library, owner, name, kind, f"{module}.{name}")


def attribute(library: str, owner: object, name: str, kind: type | tuple[type, ...], full_name: str = "") -> Any:
    """What ``owner`` has under ``name``.

    Args:
        library: whose object ``owner`` is.
        owner: the object.
        name: of the attribute.
        kind: what the value must be an instance of.
        full_name: for the error; the owner's class and the name where it is empty.

    Raises:
        InputError: there is no such attribute, or its value is of another kind.
    """
    full_name = full_name or f"{type(owner).__qualname__}.{name}"
    missing = object()
    value = getattr(owner, name, missing)
    if value is missing:
        raise closed(library, full_name)
    if not isinstance(value, kind):
        raise closed(library, full_name, f"is of type {type(value).__name__}")
    return value
