"""The comparison of a grid of runs: criteria side by side, with their spread, and what they differ by.

    accuracy of relevance, seeds 0 to 3:    [0.91, 0.92, 0.90, 0.91]
    of random, the same seeds:              [0.90, 0.90, 0.89, 0.90]
    paired difference:                      0.0125 ± 0.0080, a 95 % t interval over four pairs

A seed is one order of the images and one start, the same for every criterion: differences are taken seed by seed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev

from compressor.report import tables
from compressor.report.comparison_picture import draw_comparison
from compressor.report.document import Report
from compressor.report.files import as_json, filled_in, write_texts

CONTROLS = ("random", "l1")  # what every criterion is held against
_FORMAT = {"format": "compressor-comparison", "version": 1}
FILES = ("compare.json", "compare.md", "compare.html")


@dataclass(frozen=True)
class Cell:
    """One finished run of a grid.

    Attributes:
        criterion, sparsity, seed: what it was asked.
        accuracy, dense_accuracy: on the test part, in [0, 1].
        params, macs: counts before and after.
        seconds: of training, of the pruned model alone.
        reached: whether what was asked is gone.
    """

    criterion: str
    sparsity: float
    seed: int
    accuracy: float
    dense_accuracy: float
    params: tuple[int, int]
    macs: tuple[int, int]
    seconds: float
    reached: bool

    @staticmethod
    def from_report(report: Report) -> Cell:
        """Return what a grid reads of a run's report."""
        settings, dense, pruned = report.settings, report.dense, report.pruned
        return Cell(
            criterion=settings["criterion"],
            sparsity=settings["sparsity"],
            seed=settings["seed"],
            accuracy=pruned.accuracy,
            dense_accuracy=dense.accuracy,
            params=(dense.params, pruned.params),
            macs=(dense.macs, pruned.macs),
            seconds=sum(epoch.seconds for epoch in report.epochs if epoch.stage == "pruned"),
            reached=report.goal.met,
        )


@dataclass(frozen=True)
class Comparison:
    """A grid of runs, as far as it has come.

    Attributes:
        name: of its folder.
        command: what to type to go on with it, or to make it again.
        cells: that are finished.
        failed: by name of the cell, the reason.
        missing: names of cells that are neither.
        machine: of whoever wrote this.
        created: when.
    """

    name: str
    command: str
    cells: tuple[Cell, ...]
    failed: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    machine: Mapping[str, str] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


@dataclass(frozen=True)
class Difference:
    """A mean difference of accuracy over n pairs, and half of its 95 % interval; NaN of a single pair."""

    n: int
    mean: float
    half: float


@dataclass(frozen=True)
class Summary:
    """One criterion at one sparsity; shares in [0, 1], means over seeds.

    Attributes:
        n: finished runs.
        accuracy, sd, lowest, highest: over them; sd is NaN of a single run.
        params, macs: the share that is left.
        seconds: of training.
        against: by control, the paired difference; controls that share no seed are left out, as is itself.
        unreached: runs that could not remove what was asked.
    """

    criterion: str
    sparsity: float
    n: int
    accuracy: float
    sd: float
    lowest: float
    highest: float
    params: float
    macs: float
    seconds: float
    against: Mapping[str, Difference]
    unreached: int


def summaries(cells: Iterable[Cell]) -> list[Summary]:
    """Return one line for each criterion and sparsity, by sparsity, in the order in which criteria come."""
    found: dict[tuple[float, str], dict[int, Cell]] = {}
    for cell in cells:
        found.setdefault((cell.sparsity, cell.criterion), {})[cell.seed] = cell
    rank = {criterion: index for index, criterion in enumerate(dict.fromkeys(name for _, name in found))}
    keys = sorted(found, key=lambda key: (key[0], rank[key[1]]))
    return [_summary(key, found) for key in keys]


def _summary(key: tuple[float, str], found: Mapping[tuple[float, str], Mapping[int, Cell]]) -> Summary:
    sparsity, criterion = key
    by_seed = found[key]
    runs = list(by_seed.values())
    accuracies = [each.accuracy for each in runs]
    against = {}
    for control in CONTROLS:
        other = found.get((sparsity, control), {})
        shared = sorted(by_seed.keys() & other.keys())
        if shared and control != criterion:
            against[control] = paired_difference([by_seed[seed].accuracy - other[seed].accuracy for seed in shared])
    return Summary(
        criterion=criterion,
        sparsity=sparsity,
        n=len(runs),
        accuracy=mean(accuracies),
        sd=stdev(accuracies) if len(runs) > 1 else math.nan,
        lowest=min(accuracies),
        highest=max(accuracies),
        params=mean(each.params[1] / each.params[0] for each in runs),
        macs=mean(each.macs[1] / each.macs[0] for each in runs),
        seconds=mean(each.seconds for each in runs),
        against=against,
        unreached=sum(not each.reached for each in runs),
    )


def paired_difference(differences: Sequence[float]) -> Difference:
    """Return the mean of differences and its 95 % t interval."""
    from scipy import stats

    n = len(differences)
    half = math.nan
    if n > 1:
        half = float(stats.t.ppf(0.975, n - 1)) * stdev(differences) / math.sqrt(n)
    return Difference(n, mean(differences), half)


# -- as text


HEAD = (
    "criterion", "sparsity", "accuracy %", "sd", "n", "params left", "MACs left", "training s",
    *(f"minus {control}" for control in CONTROLS),
)  # fmt: skip


def rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Return the table under `HEAD`; a criterion without a finished run has none."""
    return [
        (
            line.criterion,
            f"{line.sparsity:g}" + (" (not reached)" if line.unreached else ""),
            f"{100 * line.accuracy:.2f}",
            "" if math.isnan(line.sd) else f"{100 * line.sd:.2f}",
            str(line.n),
            f"{line.params:.1%}",
            f"{line.macs:.1%}",
            f"{line.seconds:.0f}",
            *(_written(line.against.get(control)) for control in CONTROLS),
        )
        for line in summaries(comparison.cells)
    ]


def _written(difference: Difference | None) -> str:
    if difference is None:
        return ""
    half = "" if math.isnan(difference.half) else f" ± {100 * difference.half:.2f}"
    return f"{100 * difference.mean:+.2f}{half}"


def _dense_accuracies(comparison: Comparison) -> list[float]:
    """Return one accuracy a seed: all criteria of a seed share their dense model."""
    return list({cell.seed: cell.dense_accuracy for cell in comparison.cells}.values())


def progress(comparison: Comparison) -> str:
    """Return in one sentence how far the grid is, and what the dense model reaches."""
    total = len(comparison.cells) + len(comparison.failed) + len(comparison.missing)
    failed = f", {len(comparison.failed)} failed" if comparison.failed else ""
    dense = ""
    if comparison.cells:
        dense = f"; dense: {100 * mean(_dense_accuracies(comparison)):.2f} %"
    return f"{len(comparison.cells)} of {total} runs finished{failed}{dense}"


_PROTOCOL = (
    "Accuracy on the test part, looked at once, at the end of each run. Differences are paired over seeds, in points, "
    "with a 95 % t interval. Seconds are of training the pruned model, on a machine that other runs may have shared; "
    "latency is not measured in a grid."
)


def markdown(comparison: Comparison) -> str:
    """Return the comparison as Markdown."""
    failed = [f"- {name}: {reason}" for name, reason in comparison.failed.items()]
    parts = [
        f"# {comparison.name}",
        progress(comparison) + ".",
        tables.grid(HEAD, rows(comparison)),
        _PROTOCOL,
        *(["## Failed", "\n".join(failed)] if failed else []),
        "## Machine",
        tables.grid(("", ""), [(key, str(value)) for key, value in comparison.machine.items()]),
        "## Again",
        f"```\n{comparison.command}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def html(comparison: Comparison) -> str:
    """Return the comparison as one HTML page: no script, nothing loaded from elsewhere, light and dark."""
    return filled_in(
        "compare.html.j2",
        comparison=comparison,
        progress=progress(comparison),
        protocol=_PROTOCOL,
        head=HEAD,
        rows=rows(comparison),
        picture=draw_comparison(
            [(each.criterion, each.sparsity, each.accuracy, each.lowest, each.highest, each.n)
             for each in summaries(comparison.cells)],
            _dense_accuracies(comparison),
        ),
    )  # fmt: skip


def write(comparison: Comparison, folder: Path) -> None:
    """Write `compare.json`, `compare.md` and `compare.html` into a folder."""
    content = {**_FORMAT, **dataclasses.asdict(comparison)}
    content["summaries"] = [dataclasses.asdict(each) for each in summaries(comparison.cells)]
    texts = (
        as_json(content),
        markdown(comparison),
        html(comparison),
    )
    write_texts({folder / name: text for name, text in zip(FILES, texts, strict=True)})
