"""The house: modules import only from rows above them, public names are there, only the command line prints."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import compressor

ROOT = Path(compressor.__file__).parent

# docs/design.md shows the same table. A module may import from its own row's parts only within one package.
ROWS = [
    ["errors"],
    ["files", "runtime", "attention"],
    ["graph.axes", "graph.group", "graph.shortcuts", "sizes"],
    ["graph.flow", "graph.table"],
    ["graph.rules", "graph.grouping", "graph.trail", "graph.surroundings"],
    ["graph.recorder"],
    ["graph.trace", "graph.retrace", "criteria", "transaction"],
    ["costs", "masks", "surgery", "schedules", "limits", "widths"],
    ["selection", "verification", "calibration"],
    ["ledger"],
    ["cutting", "intraining"],
    ["pruning", "pruner", "models", "data"],
    ["training", "artifact", "parity", "latency", "flops"],
    ["export", "checks"],
    ["report", "settings"],
    ["job"],
    ["cli"],
    ["__main__"],
]
FREE = {"", "graph"}  # the packages' own lists of names


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str | None:
    names = [name for row in ROWS for name in row]
    fitting = [name for name in names if module == name or module.startswith(name + ".")]
    return max(fitting, key=len, default=None)


def row(module: str) -> int:
    home = room(module)
    assert home is not None, f"{module} has no row: put it into the table of tests/test_house.py and docs/design.md"
    return next(index for index, names in enumerate(ROWS) if home in names)


def imported(path: Path) -> set[str]:
    """Every module of ours that a file imports when it runs; imports for type checking alone do not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("compressor"):
            base = (node.module or "").removeprefix("compressor").removeprefix(".")
            names |= {
                f"{base}.{a.name}".strip(".") if f"{base}.{a.name}".strip(".") in modules() else base
                for a in node.names
            }
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix("compressor.") for a in node.names if a.name.startswith("compressor.")}
    return names


@pytest.mark.parametrize("module", sorted(set(modules()) - FREE))
def test_modules_import_only_from_rows_above(module: str) -> None:
    for other in imported(modules()[module]) - FREE:
        assert room(other) == room(module) or row(other) < row(module), f"{module} imports {other}"


@pytest.mark.parametrize("name", compressor.__all__)
def test_every_public_name_can_be_imported_and_is_documented(name: str) -> None:
    value = getattr(compressor, name)
    assert isinstance(value, dict) or value.__doc__


def test_an_unknown_public_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'purne'; it has .*prune"):
        compressor.purne  # noqa: B018


def test_importing_compressor_and_the_command_line_does_not_import_torch() -> None:
    code = "import sys, compressor, compressor.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_the_command_line_prints_or_exits() -> None:
    for module, path in modules().items():
        if module in ("cli", "__main__"):
            continue
        calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)}
        assert not calls & {"print", "sys.exit", "exit", "quit", "os._exit"}, module
