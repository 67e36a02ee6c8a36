"""The public names: their signatures are those that were agreed on, each has a page and an example, and examples run."""

from __future__ import annotations

import doctest
import inspect
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

import entropy_probe

ROOT = Path(__file__).parents[1]


api_pages = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "api_pages.py")))
PUBLIC = api_pages.public()
EXAMPLES = {
    name: tests
    for name, (_, thing) in PUBLIC.items()
    if (tests := [test for test in doctest.DocTestFinder(recurse=False).find(thing, name) if test.examples])
}


def test_names_and_signatures_are_those_of_the_snapshot() -> None:
    told = "a public name or signature changed; if that is meant: python docs/api_pages.py --snapshot"
    assert api_pages.snapshot() == api_pages.SNAPSHOT.read_text(encoding="utf-8"), told


def test_every_public_name_has_a_page_and_the_pages_are_current() -> None:
    assert set(entropy_probe.__all__) <= set(PUBLIC)
    written = {path.name: path.read_text(encoding="utf-8") for path in api_pages.PAGES.glob("*.md")}
    assert written == api_pages.pages(), "docs/api is not what the docstrings say: run `make docs`"


def test_every_public_name_has_an_example() -> None:
    assert set(PUBLIC) - set(EXAMPLES) == {
        "RolloutRecorder"
    }  # its example is examples/live_in_trl.py, a whole training run


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_examples_of_a_public_name_run(name: str) -> None:
    for test in EXAMPLES[name]:
        test.globs.clear()  # an example says itself what it imports
        said: list[str] = []
        result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
        assert result.failed == 0, "".join(said)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_function_says_what_its_arguments_are_and_what_it_raises(name: str) -> None:
    thing = PUBLIC[name][1]
    doc = inspect.getdoc(thing) or ""
    if inspect.isfunction(thing):
        assert "Raises:" in doc
        for argument in inspect.signature(thing).parameters:
            assert argument in doc, argument
