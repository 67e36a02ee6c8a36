"""The pages for those who carry on name files that are there, and the picture of the rooms is drawn from the imports."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import entropy_probe

ROOT = Path(__file__).parents[1]
PACKAGE = Path(entropy_probe.__file__).parent
PLACEHOLDERS = {"NAME", "length_squared", "influence/"}
"""What a recipe leaves to its reader, and a room that is not there yet."""


def test_the_picture_of_the_rooms_is_current() -> None:
    rooms = runpy.run_path(str(ROOT / "docs" / "rooms.py"))
    assert rooms["PICTURE"].read_text(encoding="utf-8") == rooms["draw"](), "run `make docs`, or python docs/rooms.py"


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md", "docs/method.md"])
def test_every_path_that_a_page_names_is_there(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    named = {name for name in re.findall(r"`([\w./]+)`", text) if re.search(r"/$|\.(py|md|txt|toml|json)$", name)}
    named = {name for name in named if not any(mark in name for mark in PLACEHOLDERS)}
    missing = sorted(name for name in named if not ((PACKAGE / name).exists() or (ROOT / name).exists()))
    assert not missing, f"{page} names files that are not there: {', '.join(missing)}"
