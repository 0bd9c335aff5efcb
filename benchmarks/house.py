"""How easy the code is to see: a table of figures of one checkout, or of two side by side.

    python benchmarks/house.py                      this checkout
    python benchmarks/house.py --before OTHER       another one's figures beside it, the earlier commit say

Lines of code are lines that are neither blank, nor comments, nor part of a docstring. A default counts once for every
parameter or field that gives one of the command line's options a literal value of its own.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import statistics
import tokenize
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
# Options that the command line offers, by the names that parameters have (the old names beside the new ones).
OPTIONS = {
    *("sparsity", "measure", "allocate", "round_to", "floor", "compensate", "recalibrate", "images", "epochs"),
    *("batch_size", "lr", "prune_every", "collect", "granularity", "allocation", "estimator", "relevance_estimator"),
    *("drop", "observe_every", "confidence", "delta", "dummies", "warmup", "half_life", "seed"),
}


def figures(root: Path) -> dict[str, str]:
    """Return the figures of the package in a checkout."""
    package = root / "compressor"
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    trees = {path: ast.parse(source) for path, source in sources.items()}
    code, comments = map(sum, zip(*(_lines(source, trees[path]) for path, source in sources.items()), strict=True))
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lengths = [_length(node) for node in functions]
    constructor = max((node for node in functions if node.name == "__init__"), key=_arguments)
    defaults = [name for tree in trees.values() for name in _defaults(tree)]
    longest = max(sources, key=lambda path: sources[path].count("\n"))
    twice = sorted({name for name in defaults if defaults.count(name) > 1})
    return {
        "names at the package's top level": str(len({path.name for path in package.iterdir()} - {"__pycache__"})),
        "lines of code": f"{code:,}",
        "lines of code per comment": f"{code / comments:.1f}",
        "files": str(len(sources)),
        "longest file, lines": f"{sources[longest].count(chr(10))} ({longest.relative_to(package)})",
        "function length, lines: median / p90 / max": f"{statistics.median(lengths):g} / "
        f"{np.percentile(lengths, 90):.0f} / {max(lengths)}",
        "modules in import cycles": str(_in_cycles(package, trees)),
        "arguments of the longest constructor": str(_arguments(constructor)),
        "places where a default stands": f"{len(defaults)} for {len(set(defaults))} options",
        "options with a default in several places": ", ".join(twice) or "none",
    }


def _lines(source: str, tree: ast.Module) -> tuple[int, int]:
    """Return the numbers of lines of code and of lines with a comment."""
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    code = {line for token in tokens if token.type not in skipped for line in range(token.start[0], token.end[0] + 1)}
    ignored = ("# noqa", "# type:", "# fmt:")
    comments = {t.start[0] for t in tokens if t.type == tokenize.COMMENT and not t.string.startswith(ignored)}
    return len(code - _docstrings(tree)), len(comments)


def _docstrings(tree: ast.Module) -> set[int]:
    """Return the lines of docstrings."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = [node.body[0] for node in ast.walk(tree) if isinstance(node, owners) and node.body]
    strings = [each for each in first if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)]
    return {line for each in strings for line in range(each.lineno, (each.end_lineno or each.lineno) + 1)}


def _length(function: ast.FunctionDef) -> int:
    """Return the lines of a function without its docstring."""
    body = function.body
    has_text = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    text = (body[0].end_lineno or 0) - body[0].lineno + 1 if has_text else 0
    return (function.end_lineno or 0) - function.lineno + 1 - text


def _arguments(function: ast.FunctionDef) -> int:
    """Return the number of arguments without `self`; what takes any keyword counts as one."""
    given = function.args
    return len(given.posonlyargs + given.args + given.kwonlyargs) - 1 + bool(given.vararg) + bool(given.kwarg)


def _defaults(tree: ast.Module) -> Iterator[str]:
    """Yield the options to which a signature, a dataclass field or a call of a field helper gives a literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            args = node.args
            last = args.args[len(args.args) - len(args.defaults) :]
            pairs = [*zip(last, args.defaults, strict=True), *zip(args.kwonlyargs, args.kw_defaults, strict=True)]
            yield from (each.arg for each, value in pairs if each.arg in OPTIONS and _is_literal(value))
        elif isinstance(node, ast.ClassDef):
            fields = [
                each for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
            ]
            for each in fields:
                if each.target.id in OPTIONS and _is_literal(each.value):  # type: ignore[union-attr]
                    yield each.target.id  # type: ignore[union-attr]
        elif isinstance(node, ast.Dict):
            named = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            if set(named) & OPTIONS:
                pairs_ = zip(node.keys, node.values, strict=True)
                yield from (
                    k.value for k, v in pairs_ if isinstance(k, ast.Constant) and k.value in OPTIONS and _is_literal(v)
                )


def _is_literal(value: ast.expr | None) -> bool:
    """Return whether a default is a value of its own: a constant, or the first argument of a field helper."""
    if isinstance(value, ast.Call) and value.args and ast.unparse(value.func) in ("_option", "option"):
        value = value.args[0]
    return isinstance(value, ast.Constant) and value.value is not None and value.value != ""


def _in_cycles(package: Path, trees: dict[Path, ast.Module]) -> int:
    """Return how many modules can reach themselves by imports, those for type checking and in functions included."""
    names = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__") for path in trees
    }
    takes: dict[str, set[str]] = {}
    for path, tree in trees.items():
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        if module.endswith(".__init__"):
            continue  # a package's list of names takes from all its modules
        found = takes.setdefault(module, set())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    found |= {name for name in (f"{node.module}.{alias.name}", node.module) if name in names} - {module}
    count = 0
    while True:
        try:
            list(TopologicalSorter(takes).static_order())
            return count
        except CycleError as error:
            gone = set(error.args[1])
            count += len(gone)
            takes = {name: each - gone for name, each in takes.items() if name not in gone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--json", type=Path, help="also write the figures into this file")
    arguments = parser.parse_args()
    columns = {"before": figures(arguments.before)} if arguments.before else {}
    columns["after" if arguments.before else "now"] = figures(ROOT)
    print("| | " + " | ".join(columns) + " |\n|:--" + "|--:" * len(columns) + "|")
    for name in next(iter(columns.values())):
        print(f"| {name} | " + " | ".join(each[name] for each in columns.values()) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(columns, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
