"""Draw the rooms of the package from what their files import: `make docs` writes docs/images/rooms.svg.

Floors are those of ORDER in tests/test_layout.py. An arrow leads from a room to one that it imports; arrows that follow
from others are left out. What a room is for is the first sentence of its `__init__.py`.
"""

from __future__ import annotations

import ast
import runpy
import textwrap
from html import escape
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
PICTURE = Path(__file__).parent / "images" / "rooms.svg"
WIDTH, BOX, GAP, MARGIN = 1000, 84, 30, 16
LINE = 17
COLOURS = ("#eef3fb", "#44608c")


def load_layout() -> SimpleNamespace:
    """What the test of the order knows: ORDER, FILES, and how a file's imports are read."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "tests" / "test_layout.py")))


def imports(layout: SimpleNamespace) -> dict[str, set[str]]:
    """The rooms that each room imports."""
    found: dict[str, set[str]] = {name: set() for floor in layout.ORDER for name in floor}
    for path in layout.FILES.values():
        here = layout.room(path)
        there = {layout.room(layout.FILES[name]) for name in layout.imported(path) & layout.FILES.keys()}
        found[here] |= there - {here}
    return found


def reduced(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports that do not follow from others."""

    def below(name: str) -> set[str]:
        return found[name].union(*(below(other) for other in found[name]))

    return {name: {o for o in direct if not any(o in below(p) for p in direct)} for name, direct in found.items()}


def purpose(name: str) -> str:
    """The first sentence of a room's docstring."""
    path = ROOT / "src" / "entropy_probe" / name / "__init__.py"
    path = path if path.is_file() else path.parent.with_suffix(".py")
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return doc.split("\n\n")[0].split(". ")[0].replace("\n", " ").rstrip(".")


def draw() -> str:
    """The picture."""
    layout = load_layout()
    floors = [sorted(floor) for floor in layout.ORDER[:-1]]  # the last is the package's own face
    boxes: dict[str, tuple[float, float, float]] = {}
    for number, floor in enumerate(floors):
        width = min((WIDTH - 2 * MARGIN - GAP * (len(floor) - 1)) / len(floor), 430)
        left = (WIDTH - width * len(floor) - GAP * (len(floor) - 1)) / 2
        if len(floor) == 1:  # to one side and the other, so that an arrow that skips a floor is seen to pass
            left += 235 if number % 2 else -235
        for place, name in enumerate(floor):
            boxes[name] = (left + place * (width + GAP), MARGIN + number * (BOX + GAP), width)
    height = 2 * MARGIN + len(floors) * (BOX + GAP) - GAP
    arrows, rooms = [], []
    for name, others in sorted(reduced(imports(layout)).items()):
        for other in sorted(others) if name in boxes else ():
            (x, y, width), (left, top, wide) = boxes[name], boxes[other]
            start, end = x + width / 2, left + wide / 2
            # Ends are spread over a box's edge, so that arrows from the left come in on the left.
            start, end = start + (end - start) * 0.12, end + (start - end) * 0.18
            bend = (y - top - BOX) / 2
            arrows.append(
                f'<path d="M{start:.0f} {y:.0f} C{start:.0f} {y - bend:.0f} {end:.0f} {top + BOX + bend:.0f} {end:.0f} '
                f'{top + BOX + 5:.0f}"><title>{name} imports {other}</title></path>'
            )
    for name, (x, y, width) in boxes.items():
        lines = textwrap.wrap(purpose(name), int(width / 7.4))
        lines = lines[:3] if len(lines) <= 3 else [*lines[:2], lines[2].rstrip(",;:") + " …"]
        rooms.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{BOX}" rx="6"/>')
        rooms.append(f'<text class="name" x="{x + 12:.0f}" y="{y + 22:.0f}">{name}</text>')
        for row, line in enumerate(lines):
            rooms.append(f'<text x="{x + 12:.0f}" y="{y + 40 + row * LINE:.0f}">{escape(line)}</text>')
    fill, stroke = COLOURS
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
            "<style>",
            f"rect {{ fill: {fill}; stroke: {stroke}; }} text {{ fill: #222; }}",
            ".name { font-weight: bold; font-size: 15px; }",
            f"path {{ fill: none; stroke: {stroke}; stroke-width: 1.3; opacity: 0.75; marker-end: url(#tip); }}",
            "</style>",
            f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" style="fill:{stroke};stroke:none;marker-end:none"/></marker></defs>',
            f'<rect x="0" y="0" width="{WIDTH}" height="{height}" style="fill:#fff;stroke:none"/>',
            *arrows,
            *rooms,
            "</svg>",
            "",
        ]
    )


def main() -> None:
    """Write it."""
    PICTURE.write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
