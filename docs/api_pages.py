"""Write a page for every public name, from its signature and its docstring: `make docs`.

Pages lie in docs/api; nobody edits them. With --snapshot the list of names and signatures, to which tests/test_public_api.py
holds the package, is written too: only a change that is meant changes it.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import entropy_probe
from entropy_probe.integrations.trl import RolloutRecorder

PAGES = Path(__file__).parent / "api"
SNAPSHOT = Path(__file__).parents[1] / "tests" / "data" / "public_api.txt"
WIDTH = 100
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Example):")
ENTRY = re.compile(r"    (\*{0,2}\w+): (.*)")
ROLE = re.compile(r":(?:class|func|data|mod|meth):`~?([\w.]+)`")


def public() -> dict[str, tuple[str, Any]]:
    """Every public name with the module that it is imported from and the object."""
    names = {name: ("entropy_probe", getattr(entropy_probe, name)) for name in entropy_probe.__all__}
    return names | {"RolloutRecorder": ("entropy_probe.integrations.trl", RolloutRecorder)}


def default_text(value: object) -> str:
    """A default as one would type it."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, torch.dtype):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        assert value == type(value)(), f"{value!r} has no short form"
        return f"{type(value).__name__}()"
    return "…" if repr(value) == "<factory>" else repr(value)


def annotation_text(annotation: object) -> str:
    """A type as the source spells it, without quotes."""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def parameter_text(parameter: inspect.Parameter) -> str:
    """``name: type = default``."""
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = stars + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {annotation_text(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        text += f" = {default_text(parameter.default)}"
    return text


def signature(name: str, thing: Any, *, wrapped: bool) -> str:
    """``name(parameters) -> type``, a parameter a line where it is long and may be ``wrapped``."""
    found = inspect.signature(thing)
    parameters, keywords = [], False
    for parameter in found.parameters.values():
        if parameter.name in {"self", "cls"}:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            parameters.append("*")
        keywords = keywords or parameter.kind in {parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL}
        parameters.append(parameter_text(parameter))
    gives = found.return_annotation
    # A class gives itself, and says None.
    arrow = "" if gives is found.empty or isinstance(thing, type) else f" -> {annotation_text(gives)}"
    line = f"{name}({', '.join(parameters)}){arrow}"
    if not wrapped or len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {parameter}," for parameter in parameters), f"){arrow}"])


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class has from us, in the order of their definition."""
    ours = [cls for cls in kind.__mro__ if cls.__module__.startswith("entropy_probe")]
    for name, value in {name: value for cls in reversed(ours) for name, value in vars(cls).items()}.items():
        known = inspect.isfunction(value) or isinstance(value, property | cached_property | staticmethod | classmethod)
        if known and not name.startswith("_"):
            yield name, value


def member_signature(kind: type, name: str, value: Any, *, wrapped: bool) -> str:
    """Of a method; a property has its name and type."""
    if isinstance(value, property | cached_property):
        getter = value.fget if isinstance(value, property) else value.func
        return f"{name}: {annotation_text(inspect.signature(getter).return_annotation)}"
    return signature(name, getattr(kind, name), wrapped=wrapped)


def inline(text: str) -> str:
    """Roles and literals of a docstring as Markdown."""

    def link(found: re.Match[str]) -> str:
        name = found[1].rpartition(".")[2]
        return f"[`{name}`]({name}.md)" if name in public() else f"`{found[1]}`"

    text = ROLE.sub(link, text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    return re.sub(r"(?<![\w/`(\[])docs/(\w+)\.md", r"[docs/\1.md](../\1.md)", text)


def dedented(lines: list[str]) -> list[str]:
    """A section's lines, four spaces to the left."""
    return [line.removeprefix("    ") for line in lines]


def entries(lines: list[str]) -> list[str]:
    """``name: text`` with its continuation as list items."""
    items: list[str] = []
    for line in lines:
        found = ENTRY.fullmatch(line)
        if found:
            items.append(f"- `{found[1]}`: {inline(found[2])}")
        elif line.strip() and items:
            items[-1] += f" {inline(line.strip())}"
    return items


def example(lines: list[str]) -> list[str]:
    """Prose as it is, sessions as blocks."""
    out: list[str] = []
    inside = False
    for line in dedented(lines):
        if line.startswith(">>>") and not inside:
            out, inside = [*out, "```pycon"], True
        elif inside and not line.strip():
            out, inside = [*out, "```"], False
        out.append(line if inside else inline(line))
    while out and not out[-1].strip():
        out.pop()
    return [*out, "```"] if inside else out


def markdown(doc: str) -> str:
    """A docstring as Markdown: prose, indented formulas, lists of arguments, examples."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    for line in doc.splitlines():
        found = SECTION.fullmatch(line)
        if found:
            parts.append((found[1], []))
        else:
            parts[-1][1].append(line)
    out: list[str] = []
    for title, lines in parts:
        if title:
            out += ["", f"**{title}**", ""]
        if title == "Example":
            out += example(lines)
        elif title:
            out += entries(lines)
        else:
            out += [line if line.startswith("    ") else inline(line) for line in lines]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def page(name: str) -> str:
    """The page of one public name."""
    module, thing = public()[name]
    out = [f"# {name}", "", f"`from {module} import {name}`", ""]
    if isinstance(thing, type) and issubclass(thing, enum.Enum):
        out += ["Values: " + ", ".join(f"`{member.value}` (`{name}.{member.name}`)" for member in thing) + ".", ""]
    elif not (isinstance(thing, type) and issubclass(thing, Exception)):
        out += ["```python", signature(name, thing, wrapped=True), "```", ""]
    out += [markdown(inspect.getdoc(thing) or ""), ""]
    if isinstance(thing, type):
        for member, value in members(thing):
            out += [f"## {member}", "", "```python", member_signature(thing, member, value, wrapped=True), "```", ""]
            out += [markdown(inspect.getdoc(value) or ""), ""]
    return "\n".join(out)


def first_sentence(name: str) -> str:
    """What a docstring opens with."""
    opening = (inspect.getdoc(public()[name][1]) or "").split("\n\n")[0].replace("\n", " ")
    return inline(opening)


def index() -> str:
    """The list of pages."""
    rows = [f"| [{name}]({name}.md) | {first_sentence(name)} |" for name in sorted(public(), key=str.lower)]
    return "\n".join(
        [
            "# Public names",
            "",
            "Everything that code outside of this project may import. `python docs/api_pages.py` writes these pages from the",
            "docstrings, whose examples run as tests. All else in the package is private and may change.",
            "",
            "| name | what it is |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def pages() -> dict[str, str]:
    """File name to text."""
    return {"README.md": index()} | {f"{name}.md": page(name) for name in public()}


def snapshot() -> str:
    """Names, signatures, members: a line each."""
    lines = []
    for name, (module, thing) in sorted(public().items()):
        if isinstance(thing, type) and issubclass(thing, enum.Enum):
            lines.append(f"{module}.{name}: " + ", ".join(f"{member.name}={member.value}" for member in thing))
        elif isinstance(thing, type) and issubclass(thing, Exception):
            lines.append(f"{module}.{name}({thing.__base__.__name__})")
        else:
            lines.append(f"{module}.{signature(name, thing, wrapped=False)}")
        if isinstance(thing, type):
            lines += [f"    {member_signature(thing, m, value, wrapped=False)}" for m, value in members(thing)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the pages, and the snapshot where it is asked for."""
    parser = argparse.ArgumentParser(description="Write docs/api from the docstrings.")
    parser.add_argument("--snapshot", action="store_true", help=f"also write {SNAPSHOT.name}, which a test holds")
    arguments = parser.parse_args()
    PAGES.mkdir(exist_ok=True)
    written = pages()
    for old in PAGES.glob("*.md"):
        if old.name not in written:
            old.unlink()
    for name, text in written.items():
        (PAGES / name).write_text(text, encoding="utf-8")
    if arguments.snapshot:
        SNAPSHOT.write_text(snapshot(), encoding="utf-8")


if __name__ == "__main__":
    main()
