"""Phrasings that a reader has to read twice are not used in the package, its docs and its scripts."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
AVOIDED = re.compile(
    r"\banew\b|\bwere they like\b|\bgoes as\b|\bin a look\b|\bhands on\b|\bwho\b[^.\n]{0,60}\bhands? on\b"
)
HISTORY = {"CHANGELOG.md", "log.md"}
"""What was written down at its time."""


def test_phrasings_that_read_twice_are_avoided() -> None:
    folders = [path for name in ("src", "docs", "benchmarks", "examples") for path in (ROOT / name).rglob("*")]
    found = []
    for path in [*folders, *ROOT.glob("*.md")]:
        if path.suffix not in {".py", ".md"} or path.name in HISTORY:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if AVOIDED.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)
