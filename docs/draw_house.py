"""The house, read from the code: rooms, their imports, and the picture of both in docs/design.md.

    python docs/draw_house.py           writes docs/pictures/house.svg

tests/test_house.py holds the picture, and the table of rooms in docs/design.md, against the code.
"""

from __future__ import annotations

import ast
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
    """Return the room of a module: the first part of its name. The command line's two files are one room."""
    first = module.split(".")[0]
    return "job" if first in ("cli", "__main__") else "_utils" if first == "errors" else first


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


# -- the picture: rooms from the ground up, an arrow for every import, as wide as many names are taken

_WIDTH, _ROW, _BOX, _LEFT, _TOP = 900, 46, 30, 20, 40
_BOX_WIDTH = 300


def picture() -> str:
    """Return the picture as SVG: a box for each room, the lowest at the bottom, and a line for every import."""
    found = sorted(rooms(), key=lambda each: -each.number)
    middle = {name: _TOP + index * _ROW + _BOX / 2 for index, each in enumerate(found) for name in each.names}
    middle |= {"_utils": middle["_utils"], "job": middle["job"]}
    tone = dict(zip((each.number for each in found), svg.colours(len(found)), strict=True))
    number = {name: each.number for each in found for name in each.names}
    lines = []
    for lane, ((here, there), names) in enumerate(arrows().items()):
        x = _LEFT + _BOX_WIDTH + 30 + 11 * lane
        lines.append(_arrow(x, middle[here], middle[there], names, tone[number[here]], f"{here} takes {names} of {there}"))
    boxes = [_box(_TOP + index * _ROW, each, tone[each.number]) for index, each in enumerate(found)]
    height = _TOP + len(found) * _ROW
    title = svg.text(_LEFT, 22, "rooms (numbers as in the table) and what they import; hover an arrow", size=12)
    head = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" font-family="sans-serif">').format(
        _WIDTH, height
    )
    paper = svg.rectangle(0, 0, _WIDTH, height, "#ffffff")
    return str(head + paper + title + svg.joined(lines) + svg.joined(boxes) + Markup("</svg>\n"))


def _box(top: float, each: Room, tone: str) -> Markup:
    names = " ".join(each.names)
    frame = svg.rectangle(_LEFT, top, _BOX_WIDTH, _BOX, "#ffffff", tone)
    return frame + svg.text(_LEFT + 10, top + 19, f"{each.number}  {names}", size=13)


def _arrow(x: float, start: float, end: float, names: int, tone: str, hint: str) -> Markup:
    """Draw a bracket from the box of one room to that of another, with a head at the room that is imported."""
    left = _LEFT + _BOX_WIDTH
    width = min(1 + names / 6, 4)
    path = Markup('<path d="M{0} {2}H{1}V{3}H{0}" fill="none" stroke="{4}" stroke-width="{5:.1f}"/>').format(
        left, svg.pixels(x), svg.pixels(start), svg.pixels(end), tone, width
    )
    head = Markup('<path d="M{0} {2}l8 -4v8z" fill="{1}"/>').format(left, tone, svg.pixels(end))
    return Markup("<g>{}{}{}</g>").format(svg.hint([hint]), path, head)


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
