"""The house, read from the code: rooms, their imports, and the picture of both in docs/design.md.

    python docs/draw_house.py           writes docs/pictures/house.svg

tests/test_house.py holds the picture, and the table of rooms in docs/design.md, against the code.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from compressor.report import svg

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "compressor"
PICTURE = DOCS / "pictures" / "house.svg"


@dataclass(frozen=True)
class Import:
    """One import of ours in a module: `from target import name`, or `import target`."""

    target: str
    name: str
    in_function: bool


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name below `compressor`; a package by its own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    """Return the room of a module: the first part of its name. The command line belongs to `job`."""
    first = module.split(".")[0]
    return "job" if first in ("cli", "console", "__main__") else "_utils" if first == "errors" else first


def imports(path: Path) -> Iterator[Import]:
    """Yield every import of ours in a file, also those for type checking alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(each)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for each in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and re.match(r"compressor(\.|$)", node.module or ""):
            for alias in node.names:
                yield Import(node.module.removeprefix("compressor").lstrip("."), alias.name, id(node) in inside)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if re.match(r"compressor(\.|$)", alias.name):
                    yield Import(alias.name.removeprefix("compressor").lstrip("."), "", id(node) in inside)


def used_module(used: Import, known: dict[str, Path]) -> str:
    """Return the module that an import reaches: the name itself where it is a module, else what it is taken from."""
    whole = f"{used.target}.{used.name}".strip(".")
    return whole if whole in known else used.target


@dataclass(frozen=True)
class Room:
    """A row of the table in docs/design.md."""

    number: int
    names: tuple[str, ...]
    text: str
    may_import: frozenset[int]


def rooms() -> list[Room]:
    """Read the table of rooms in docs/design.md: `| no. | room | what lives there | imports |`."""
    found = []
    for line in (DOCS / "design.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 4 and cells[0].isdigit():
            names = tuple(name.removesuffix("/").removesuffix(".py") for name in re.findall(r"`([^`]+)`", cells[1]))
            found.append(Room(int(cells[0]), names, cells[2], _numbers(cells[3], int(cells[0]))))
    return found


def _numbers(cell: str, own: int) -> frozenset[int]:
    """Return what a cell such as `0-6`, `0, 1, 4`, `all` or `-` stands for."""
    if cell == "all":
        return frozenset(range(own))
    spans = [part.strip().split("-") for part in cell.split(",") if part.strip("- ")]
    return frozenset(number for span in spans for number in range(int(span[0]), int(span[-1]) + 1))


def arrows() -> dict[tuple[str, str], int]:
    """Return how many names each room takes from each other room."""
    known = modules()
    found: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for module, path in known.items():
        for used in imports(path):
            here, there = room(module), room(used_module(used, known))
            if module and there and here != there:
                found.setdefault((here, there), set()).add((used.target, used.name))
    return {pair: len(names) for pair, names in sorted(found.items())}


# -- the picture: a row for each room that takes, a column for each that is taken from, so that all lies on one side of
# the diagonal as long as imports have a direction

_LEFT, _TOP, _CELL, _RADIUS = 190, 40, 40, 17


def picture() -> str:
    """Return the picture as SVG."""
    found = rooms()
    number = {name: each.number for each in found for name in each.names}
    most = max(arrows().values())
    width, height = _LEFT + _CELL * len(found) + 10, _TOP + _CELL * len(found) + 10
    marks = [svg.rectangle(0, 0, width, height, fill="#ffffff")]
    marks.append(svg.text(10, 24, "takes from:", font_size=12, fill="#6b7280"))
    for each in found:
        middle = _middle(each.number)
        marks.append(svg.text(10, _TOP + middle + 5, f"{each.number}  {'  '.join(each.names)}", font_size=14))
        marks.append(svg.text(_LEFT + middle, 24, str(each.number), "middle", font_size=14))
        marks.append(svg.line(10, _TOP + _CELL * each.number, width - 10, _TOP + _CELL * each.number, stroke="#e5e7eb"))
        square = svg.rectangle(_LEFT + middle - 5, _TOP + middle - 5, 10, 10, fill="#d1d5db")
        marks.append(square)
    for (here, there), names in arrows().items():
        hint = f"{here} takes {names} name{'s' * (names > 1)} from {there}"
        marks.append(_cell(number[here], number[there], names, most, hint))
    head = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width} {height}"}
    return f"{svg.element('svg', *marks, **head, font_family='sans-serif', fill='#1c2330')}\n"


def _middle(number: int) -> float:
    return _CELL * (number + 0.5)


def _cell(row: int, column: int, names: int, most: int, hint: str) -> Markup:
    """Draw a disc whose area is the number of names, with that number in it."""
    x = _LEFT + _middle(column)
    y = _TOP + _middle(row)
    disc = svg.circle(x, y, max(9.0, _RADIUS * math.sqrt(names / most)), fill="#2563eb" if row > column else "#dc2626")
    return svg.group(svg.hint(hint), disc, svg.text(x, y + 4, str(names), "middle", font_size=11, fill="#ffffff"))


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
