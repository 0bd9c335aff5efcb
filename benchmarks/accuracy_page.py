"""The pictures of docs/accuracy.md, and its last part, from the rows of `short_training.py` and `intraining.py`.

python benchmarks/accuracy_page.py
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from intraining.accuracy import SEEDS, VARIANTS
from results_file import RESULTS

DOCS = Path(__file__).parent.parent / "docs"
LEFT, ROW, WIDTH, GAP, TOP = 190, 22, 230, 34, 52
Cell = dict[int, float]  # by seed, in percent
Cells = dict[str, dict[float, Cell]]  # by criterion and share removed in percent

SHORT = {  # of a trained ResNet-20: what went and how long it was trained, by the rows of short_training.py
    "49 % of the MACs, one epoch": "short-resnet20-0.49-inner-1-cells",
    "70 % of the MACs, one epoch": "short-resnet20-0.7-inner-1-cells",
    "49 % of the MACs, five epochs": "short-resnet20-0.49-inner-5-cells",
}
SHORT_METHODS = ("relevance", "l1 in widths by relevance", "euclidean", "l1", "random")

HEADING = "# Trained from nothing, ten epochs on a tenth of CIFAR-10"
NOTES = (
    "In the picture a dot is one seed, the red bar the mean, and the grey line the mean of the dense network. In the "
    "table: the mean over the seeds, the smallest and largest in brackets, and the difference to `random` with its "
    "standard error, from pairs of trainings with the same seed (the same first weights and order of images); then how "
    "many multiply-adds went along, where they were counted. A criterion that does not beat `random` has shown nothing."
)


def cells_of(rows: Iterable[Mapping[str, Any]], column: str = "test accuracy %") -> Cells:
    """Return one column of the rows that have it; the dense network stands at 0 %."""
    found: Cells = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if column in row:
            found[row["criterion"]][row["asked %"]][row["seed"]] = row[column]
    return found


def ranked(cells: Cells, shares: Sequence[float]) -> list[str]:
    """Return the criteria, but for the dense network, the best first over the shares that all of them have."""
    known = [name for name in cells if name != "dense" and name not in VARIANTS]
    common = [share for share in shares if all(share in cells[name] for name in known)]
    return sorted(known, key=lambda name: -mean(mean(cells[name][share].values()) for share in common))


def table(rows: Sequence[Mapping[str, Any]], names: Sequence[str], shares: Sequence[float]) -> str:
    """Return a Markdown table with a column for each share."""
    cells, macs = cells_of(rows), cells_of(rows, "MACs removed %")
    lines = ["| criterion | " + " | ".join(f"{share:.0f} % removed" for share in shares) + " |"]
    lines += ["|---|" + "---|" * len(shares)]
    for name in names:
        shown = [
            _shown(cells[name][share], {} if name == "random" else cells["random"][share], macs[name][share])
            for share in shares
        ]
        lines.append(f"| `{name}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _shown(cell: Cell, random: Cell, macs: Cell) -> str:
    if not cell:
        return ""
    values, seeds = list(cell.values()), cell.keys() & random.keys()
    fewer = f", n = {len(values)}" if len(values) < SEEDS else ""
    text = f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f}{fewer})"
    if len(seeds) > 1:
        pairs = [cell[seed] - random[seed] for seed in sorted(seeds)]
        text += f"; {mean(pairs):+.1f} ± {stdev(pairs) / math.sqrt(len(pairs)):.1f}"
    return text + (f"; {mean(macs.values()):.0f} % of the MACs" if macs.keys() == cell.keys() else "")


@dataclass(frozen=True)
class Panel:
    """What stands under one heading of a picture: values by line, in percent, and one that all are held against."""

    heading: str
    values: Mapping[str, Sequence[float]]
    reference: float | None = None


def picture(title: str, panels: Sequence[Panel], names: Sequence[str]) -> str:
    """Return an SVG of panels side by side, with a line for each name."""
    width, height = LEFT + (WIDTH + GAP) * len(panels), TOP + ROW * len(names) + 30
    marks = [f'<rect width="{width}" height="{height}" fill="white"/>']
    marks += [f'<text x="10" y="18" font-size="13" font-weight="bold">{escape(title)}</text>']
    for line, name in enumerate(names):
        marks += [f'<text x="10" y="{TOP + ROW * (line + 0.5) + 4}">{escape(name)}</text>']
    for number, panel in enumerate(panels):
        marks += _panel(panel, names, LEFT + (WIDTH + GAP) * number, height)
    style = 'font-family="sans-serif" font-size="12"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {style}>\n'
        + "\n".join(marks)
        + "\n</svg>\n"
    )


def _panel(panel: Panel, names: Sequence[str], left: float, height: float) -> list[str]:
    every = [value for name in names for value in panel.values.get(name, ())]
    every += [panel.reference] if panel.reference is not None else []
    low, high = min(every) - 0.5, max(every) + 0.5

    def across(value: float) -> str:
        return f"{left + (value - low) / (high - low) * WIDTH:.1f}"

    marks = [f'<text x="{left}" y="{TOP - 12}" fill="#555">{escape(panel.heading)}</text>']
    if panel.reference is not None:
        x = across(panel.reference)
        marks += [f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{height - 24}" stroke="#999"/>']
    for line, name in enumerate(names):
        y, values = TOP + ROW * (line + 0.5), panel.values.get(name, ())
        marks += [f'<line x1="{left}" x2="{left + WIDTH}" y1="{y}" y2="{y}" stroke="#e5e5e5"/>']
        marks += [f'<circle cx="{across(value)}" cy="{y}" r="4" fill="#4477aa" opacity="0.6"/>' for value in values]
        if values:
            x = across(mean(values))
            marks += [f'<line x1="{x}" x2="{x}" y1="{y - 8}" y2="{y + 8}" stroke="#aa3344" stroke-width="2"/>']
    for value in range(math.ceil(low), math.floor(high) + 1, max(1, round((high - low) / 6))):
        marks += [f'<text x="{across(value)}" y="{height - 8}" text-anchor="middle" fill="#555">{value} %</text>']
    return marks


def short_panel(heading: str, name: str) -> Panel:
    """Return the test accuracies of every method, over all machines that have rows of it."""
    cells: dict[tuple[str, int], float] = {}
    for path in sorted(RESULTS.glob(f"????-??-??-{name}.json")):
        cells |= {(row["method"], row["seed"]): row["test"] for row in json.loads(path.read_text())["rows"]}
    return Panel(heading, {each: [cells[key] for key in sorted(cells) if key[0] == each] for each in SHORT_METHODS})


def main() -> None:
    """Write the page and its pictures."""
    panels = [short_panel(heading, name) for heading, name in SHORT.items()]
    (DOCS / "pictures" / "accuracy-short.svg").write_text(picture("ResNet-20, CIFAR-10", panels, SHORT_METHODS))
    newest = max(RESULTS.glob("*-intraining-accuracy.json"))
    document = json.loads(newest.read_text())
    rows = document["rows"]
    path = DOCS / "accuracy.md"
    # What stands above is written by hand.
    page = [path.read_text().partition(HEADING)[0] + HEADING, "", document["notes"], "", NOTES]
    for data in dict.fromkeys(row["data"] for row in rows):
        every = [row for row in rows if row["data"] == data]
        mine = [row for row in every if row.get("budget", "params") == "params"]
        cells = cells_of(mine)
        shares = sorted({row["asked %"] for row in mine} - {0.0})
        names, dense = ranked(cells, shares), list(cells["dense"][0.0].values())
        panels = [
            Panel(
                f"{share:.0f} % of the parameters removed",
                {name: list(cells[name].get(share, {}).values()) for name in names},
                mean(dense),
            )
            for share in shares
        ]
        (DOCS / "pictures" / f"accuracy-{data}.svg").write_text(picture(data, panels, names))
        page += ["", f"## {data}", "", f"![{data}: accuracy over sparsity](pictures/accuracy-{data}.svg)", ""]
        page += [f"Dense: {mean(dense):.1f} % ({min(dense):.1f} to {max(dense):.1f}).", "", table(mine, names, shares)]
        others = [name for name in cells if name in VARIANTS]
        if others:
            there = sorted({share for name in others for share in cells[name]})
            page += ["", "What the defaults were chosen from:", "", table(mine, others, there)]
        by_macs = [row for row in every if row.get("budget") == "macs"]
        if by_macs:
            names = list(dict.fromkeys(row["criterion"] for row in by_macs))
            there = sorted({row["asked %"] for row in by_macs})
            page += ["", "With a budget of multiply-adds instead of parameters:", "", table(by_macs, names, there)]
    machine = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
    command = "python benchmarks/intraining.py --part accuracy"
    page += ["", f"Rows: `benchmarks/results/{newest.name}`, made by `{command}`. Machine: {machine}.", ""]
    path.write_text("\n".join(page))
    print(path)


if __name__ == "__main__":
    main()
