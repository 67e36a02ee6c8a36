"""Messages of the library speak of settings: who calls it from Python has no command line."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import entropy_probe

ROOT = Path(entropy_probe.__file__).parent
OPTION = re.compile(r"(?<![\w-])--[a-z]")


def texts(tree: ast.Module) -> list[tuple[int, str]]:
    """Every text of a file, by line, except docstrings."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]


def test_no_text_of_the_library_names_an_option_of_the_command_line() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in sorted(ROOT.rglob("*.py"))
        if path.relative_to(ROOT).parts[0] != "cli"
        for line, text in texts(ast.parse(path.read_text(encoding="utf-8")))
        if OPTION.search(text)
    ]
    assert not found, "\n".join(found)


def test_the_search_sees_an_option_in_a_message_and_not_in_a_docstring() -> None:
    tree = ast.parse('def f():\n    """Use --loud."""\n    raise ValueError(f"give --loud {1}")\n')
    assert [line for line, text in texts(tree) if OPTION.search(text)] == [3]
