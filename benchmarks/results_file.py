"""Where benchmarks leave their figures: dated files under `benchmarks/results/`, with machine, versions and command."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from compressor.deploy import describe_machine

RESULTS = Path(__file__).parent / "results"
BEGAN = datetime.date.today()  # a run over midnight stays in one file


def write(name: str, rows: list[dict[str, Any]], notes: str = "") -> Path:
    """Write rows of figures as JSON and as a Markdown table; give the Markdown file's path."""
    RESULTS.mkdir(exist_ok=True)
    stem = f"{BEGAN.isoformat()}-{name}"
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    document = {"command": command, "machine": describe_machine(), "notes": notes, "rows": rows}
    (RESULTS / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    path = RESULTS / f"{stem}.md"
    path.write_text(_markdown(name, document))
    return path


def earlier(name: str) -> list[dict[str, Any]]:
    """Return the rows that a machine like this one wrote under that name last: delete its file to measure anew."""
    for path in sorted(RESULTS.glob(f"????-??-??-{name}.json"), reverse=True):
        document = json.loads(path.read_text())
        if _alike(document.get("machine", {}), describe_machine()):
            rows: list[dict[str, Any]] = document["rows"]
            return rows
    return []


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two machines differ in the build of their kernel at most, in what is known of both."""
    return bool(one) and all(one[name] == other[name] for name in one.keys() & other.keys() - {"os"})


def _markdown(name: str, document: dict[str, Any]) -> str:
    columns = list(dict.fromkeys(key for row in document["rows"] for key in row))
    lines = [f"# {name}", "", f"Command: `{document['command']}`", "", document["notes"], ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_shown(row.get(key, "")) for key in columns) + " |" for row in document["rows"]]
    lines += ["", "Machine: " + ", ".join(f"{key} {value}" for key, value in document["machine"].items()), ""]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
