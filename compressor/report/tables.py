"""The report's tables as text: what is compared, in which unit, and how it changed.

test accuracy (449 images)   98.00%   97.00%   -1.00 points
parameters                   10.0 k   4.00 k   -60.0%
torch, batch 1: p50/p90 ms   3.00/3.60   1.50/1.80   2.00× as fast (1.95 to 2.05)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from compressor._utils import Speedup, noise, speedup
from compressor.report.document import Layer, OwnMetric, Report, Timing

MOST_CLASSES = 30  # in a table; a thousand would hide the rest of a page
CLASS_HEAD = ("class", "test images", "dense", "pruned", "change")


@dataclass(frozen=True)
class Row:
    """One line of the table dense | pruned, ready to print."""

    label: str
    dense: str
    pruned: str
    change: str


def comparison(report: Report) -> list[Row]:
    """Return the lines of the table dense | pruned: accuracy, costs, file sizes, then latency place by place."""
    dense = report.dense
    pruned = report.pruned
    # In points: a relative change of a percentage is read as one or the other, and nobody knows which.
    points = 100 * (pruned.accuracy - dense.accuracy)
    rows = [
        Row(
            f"test accuracy ({dense.images:,} images)",
            f"{dense.accuracy:.2%}",
            f"{pruned.accuracy:.2%}",
            f"{points:+.2f} points",
        ),
        *(_metric_row(each) for each in report.metrics),
        _row("parameters", dense.params, pruned.params, count),
        _row("MACs", dense.macs, pruned.macs, count),
        *_row_if_known("MACs as fvcore counts", dense.fvcore_macs, pruned.fvcore_macs, count),
        _row("channels", dense.channels, pruned.channels, "{:,}".format),
        _row("model.safetensors", dense.size_bytes, pruned.size_bytes, size),
        *_row_if_known("model.onnx", dense.onnx_size_bytes, pruned.onnx_size_bytes, size),
    ]
    memory = [
        _row(f"memory in onnxruntime, batch {each.batch_size}", each.dense_bytes, each.pruned_bytes, size)
        for each in report.memory
    ]
    return [*rows, *_lowered_rows(report), *memory, *(_latency_row(each) for each in pairs(report.timings))]


def classes(report: Report) -> list[tuple[str, str, str, str, str]]:
    """Return class, test images, accuracy dense and pruned, and the change, the classes that lost most first."""
    worst_first = sorted(report.classes, key=lambda each: each.points)
    rows = [
        (each.name, f"{each.images:,}", f"{each.dense:.1%}", f"{each.pruned:.1%}", f"{each.points:+.1f} points")
        for each in worst_first[:MOST_CLASSES]
    ]
    if left_out := len(worst_first) - len(rows):
        rows.append((f"{left_out:,} more in report.json", "", "", "", ""))
    return rows


def _metric_row(metric: OwnMetric) -> Row:
    """Return a figure of the user's own, with what its change means where it is one."""
    change = metric.pruned - metric.dense
    verdict = "" if change == 0 else " (better)" if (change > 0) is metric.higher_is_better else " (worse)"
    return Row(metric.name, f"{metric.dense:.4g}", f"{metric.pruned:.4g}", f"{change:+.4g}{verdict}")


def _lowered_rows(report: Report) -> list[Row]:
    """Return accuracy and size of both models in a lower precision; a file that missed its gate has a dash."""
    by_file = {each.file.partition(".")[0]: each for each in report.lowered}
    if not by_file:
        return []
    dense, pruned = (by_file.get(name) for name in ("dense", "model"))
    kind = report.lowered[0].precision
    points = 100 * (pruned.accuracy - dense.accuracy) if dense and pruned else math.nan
    accuracies = [f"{each.accuracy:.2%}" if each and not each.missed else "-" for each in (dense, pruned)]
    epochs = [each.qat_epochs if each else 0 for each in (dense, pruned)]
    sizes = [size(each.size_bytes) if each and not each.missed else "-" for each in (dense, pruned)]
    return [
        Row(
            f"test accuracy in {kind}",
            accuracies[0],
            accuracies[1],
            "" if math.isnan(points) else f"{points:+.2f} points",
        ),
        Row(f"model.{kind}.onnx", sizes[0], sizes[1], ""),
        *([Row(f"epochs of training for {kind}", str(epochs[0]), str(epochs[1]), "")] if any(epochs) else []),
    ]


def _row_if_known(label: str, dense: int | None, pruned: int | None, show: Callable[[float], str]) -> list[Row]:
    return [] if dense is None or pruned is None else [_row(label, dense, pruned, show)]


@dataclass(frozen=True)
class Pair:
    """Both models in one place."""

    place: str
    dense: Timing
    pruned: Timing
    control: Timing | None

    @property
    def speedup(self) -> Speedup:
        """How many times as fast the pruned one is."""
        return speedup(self.dense.samples_ms, self.pruned.samples_ms)

    @property
    def noise(self) -> float:
        """The share by which the dense model differs from itself; 0 where that was not measured."""
        return noise(self.dense.samples_ms, self.control.samples_ms) if self.control else 0.0

    def verdict(self) -> str:
        """Return what this says in words."""
        return verdict(self.dense.samples_ms, self.pruned.samples_ms, self.noise)


def verdict(base: Sequence[float], other: Sequence[float], differ: float) -> str:
    """Return how many times as fast `other` is as `base`, with its uncertainty, in words.

    Args:
        base, other: samples that were taken in turns.
        differ: the share by which equal models do.
    """
    found = speedup(base, other)
    if found.is_within(differ):
        return "no measurable difference"
    return f"{found.ratio:.2f}× as fast ({found.low:.2f} to {found.high:.2f})"


def pairs(timings: Iterable[Timing]) -> list[Pair]:
    """Return every place in which both models were timed, on the run's one device."""
    # A place without its counterpart is left out: half a comparison would be read as a whole one.
    places: dict[str, dict[str, Timing]] = {}
    for timing in timings:
        places.setdefault(f"{timing.backend}, batch {timing.batch_size}", {})[timing.model] = timing
    return [
        Pair(place, each["dense"], each["pruned"], each.get("control"))
        for place, each in places.items()
        if {"dense", "pruned"} <= each.keys()
    ]


def summary(report: Report) -> str:
    """Return the run's result in one sentence: asked, reached, and what it cost in accuracy."""
    goal = report.goal
    points = 100 * (report.pruned.accuracy - report.dense.accuracy)
    verdict = "" if goal.met else " (not reached)"
    # Masks on single weights leave every layer as wide as it was; only channels are really gone.
    done = "set to zero" if goal.measure == "weights" else "removed"
    return (
        f"{goal.reached:.1%} of the {goal.measure} {done}, {goal.wanted}{verdict}; "
        f"test accuracy {report.pruned.accuracy:.2%} against {report.dense.accuracy:.2%} dense ({points:+.2f} points)"
    )


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is left-aligned, the others right-aligned; `|` is escaped."""
    align = [":--", *["--:"] * (len(head) - 1)]
    lines = [head, align, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def count(n: float) -> str:
    """Return a large count with three significant digits: 11.2 M."""
    # From 0.9995 of the next unit on: three digits would round 999,600 up to a fourth.
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(n) >= 0.9995 * limit:
            return _three_digits(n / limit) + unit
    return f"{n:g}"


def size(size_bytes: float) -> str:
    """Return a file size in decimal units with three significant digits: 42.7 MB."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= 0.9995 * limit:
            return f"{_three_digits(size_bytes / limit)} {unit}"
    return f"{size_bytes:g} B"


def milliseconds(value_ms: float) -> str:
    """Return a time with three significant digits, without its unit: 0.412, 3.18, 128."""
    return _three_digits(value_ms)


def kept(layer: Layer) -> str:
    """Return the share of a group's channels that stayed."""
    return f"{layer.after / layer.before:.0%}"


def _row(label: str, dense: float, pruned: float, show: Callable[[float], str]) -> Row:
    return Row(label, show(dense), show(pruned), f"{(pruned - dense) / dense:+.1%}" if dense else "")


def _latency_row(pair: Pair) -> Row:
    # Medians: the mean of a few hundred calls is moved by one that another process interrupted.
    return Row(f"{pair.place}: p50/p90 ms", _latency(pair.dense), _latency(pair.pruned), pair.verdict())


def _latency(timing: Timing) -> str:
    return f"{milliseconds(timing.p50_ms)}/{milliseconds(timing.percentile_ms(90))}"


def _three_digits(value: float) -> str:
    # Rounded first: 9.996 becomes 10.0, which has one decimal where 9.99 has two.
    rounded = float(f"{value:.3g}")
    decimals = 2 - math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{rounded:.{min(max(decimals, 0), 4)}f}"
