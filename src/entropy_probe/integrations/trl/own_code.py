"""Whether a method is the one that a library ships, or one that somebody put in its place."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any


def replacement(owner: object, name: str, of: type, libraries: tuple[ModuleType, ...]) -> str | None:
    """Where ``owner``'s attribute comes from if it is not what ``of`` ships under that name; None if it is.

    Three ways of replacing are seen: an attribute of the object itself, an override in its class, and a patch of ``of``
    (a function whose code lies outside ``libraries``, also under a decorator that copies the name).
    """
    if name in getattr(owner, "__dict__", {}):
        return "an attribute of the object itself"
    found, shipped = (inspect.getattr_static(cls, name, None) for cls in (type(owner), of))
    if found is None or shipped is None:
        return "missing"
    if found is not shipped:
        holder = next(cls for cls in type(owner).__mro__ if name in vars(cls))
        return f"{holder.__module__}.{holder.__qualname__}"
    roots = [_root(library) for library in libraries]
    for file in _files(found):
        if not any(file.is_relative_to(root) for root in roots):
            return f"a patch in {file}"
    return None


def _root(library: ModuleType) -> Path:
    file = Path(str(library.__file__)).resolve()
    return file.parent if file.name == "__init__.py" else file


def _files(attribute: Any) -> Iterator[Path]:
    """The source files of a function and of all that it decorates; nothing for what is no function."""
    function = getattr(attribute, "__func__", attribute)
    if not callable(function):
        return
    while function is not None:
        code = getattr(function, "__code__", None)
        yield Path("<no Python source>") if code is None else Path(code.co_filename).resolve()
        function = getattr(function, "__wrapped__", None)
