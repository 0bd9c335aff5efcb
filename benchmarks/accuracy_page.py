"""docs/accuracy.md and its picture, from the newest rows of `intraining.py --part accuracy`.

python benchmarks/accuracy_page.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

from results_file import RESULTS

DOCS = Path(__file__).parent.parent / "docs"
LEFT, ROW, WIDTH, TOP = 150, 22, 420, 34
Cells = dict[str, list[float]]


def by_criterion(rows: Iterable[Mapping[str, Any]], data: str, asked: float) -> Cells:
    """Give the accuracies of every criterion on a data set at one sparsity, in percent; the dense ones among them."""
    found: Cells = defaultdict(list)
    for row in rows:
        if row["data"] == data and (row["asked %"] == asked or row["criterion"] == "dense"):
            found[row["criterion"]].append(row["test accuracy %"])
    return dict(sorted(found.items(), key=lambda item: -mean(item[1])))


def table(cells: Cells) -> str:
    """Give a Markdown table: mean, smallest and largest, and how many seeds."""
    lines = ["| criterion | accuracy, mean % | range | seeds |", "|---|---|---|---|"]
    for name, values in cells.items():
        lines.append(f"| `{name}` | {mean(values):.1f} | {min(values):.1f} to {max(values):.1f} | {len(values)} |")
    return "\n".join(lines)


def picture(title: str, cells: Cells) -> str:
    """Give an SVG: one line a criterion, a dot a seed, a bar at the mean."""
    every = [value for values in cells.values() for value in values]
    low, high = min(every) - 0.5, max(every) + 0.5

    def across(value: float) -> float:
        return LEFT + (value - low) / (high - low) * WIDTH

    height = TOP + ROW * len(cells) + 30
    marks = [f'<rect width="{LEFT + WIDTH + 30}" height="{height}" fill="white"/>']
    marks += [f'<text x="10" y="18" font-size="13" font-weight="bold">{escape(title)}</text>']
    for line, (name, values) in enumerate(cells.items()):
        y = TOP + ROW * line + ROW / 2
        marks += [f'<text x="10" y="{y + 4}">{escape(name)}</text>']
        marks += [f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y}" y2="{y}" stroke="#e5e5e5"/>']
        marks += [f'<circle cx="{across(value):.1f}" cy="{y}" r="4" fill="#4477aa" opacity="0.6"/>' for value in values]
        x = f"{across(mean(values)):.1f}"
        marks += [f'<line x1="{x}" x2="{x}" y1="{y - 8}" y2="{y + 8}" stroke="#aa3344" stroke-width="2"/>']
    for value in range(int(low) + 1, int(high) + 1, max(1, round((high - low) / 8))):
        marks += [f'<text x="{across(value):.1f}" y="{height - 8}" text-anchor="middle" fill="#555">{value} %</text>']
    size = f'width="{LEFT + WIDTH + 30}" height="{height}"'
    style = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(marks)}</svg>\n'


def main() -> None:
    """Write the page and a picture for every data set and sparsity that has rows."""
    newest = max(RESULTS.glob("*-intraining-accuracy.json"))
    document = json.loads(newest.read_text())
    rows = document["rows"]
    page = ["# Accuracy, for every criterion under the same schedule", "", document["notes"], ""]
    page += [
        "The red bar is the mean, a dot is one seed. A criterion that does not beat `random` has shown nothing.",
        "",
    ]
    settings = dict.fromkeys((row["data"], row["asked %"]) for row in rows if row["criterion"] != "dense")
    for data, asked in settings:
        cells, name = by_criterion(rows, data, asked), f"accuracy-{data}-{asked:.0f}.svg"
        title = f"{data}, {asked:.0f} % of the parameters removed"
        (DOCS / "pictures" / name).write_text(picture(title, cells))
        page += [f"## {title}", "", f"![{title}](pictures/{name})", "", table(cells), ""]
    machine = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
    page += [f"Rows: `benchmarks/results/{newest.name}`, made by `{document['command']}`. Machine: {machine}.", ""]
    (DOCS / "accuracy.md").write_text("\n".join(page))
    print(DOCS / "accuracy.md")


if __name__ == "__main__":
    main()
