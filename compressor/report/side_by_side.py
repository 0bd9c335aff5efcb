"""Several finished runs side by side: accuracy against latency, MACs and parameters, and which of them are best.

    run   accuracy   MACs     on the front
    a     0.91       100 M    yes
    b     0.90        50 M    yes
    c     0.89        60 M    no: b is better in both
    d     0.90        50 M    yes, as b: equal models are both on it

The front (of Pareto) holds the models that no other one beats: as accurate at less cost, or more so at the same. The
dense model of each run stands in the comparison like any other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from markupsafe import Markup

from compressor.errors import InputError
from compressor.report import tables
from compressor.report.document import Figures, Report
from compressor.report.files import as_json, filled_in, write_texts
from compressor.report.side_by_side_picture import COUNTS, Point, draw_trade_off

FILES = ("runs.json", "runs.md", "runs.html")
_FORMAT = {"format": "compressor-runs", "version": 1}
_DRIFT = 0.05  # of one dense model's time between two runs, from where on it is said


@dataclass(frozen=True)
class Model:
    """One model of a run.

    Attributes:
        name: unique: the run's, with "(dense)" where it is the model that it began with.
        criterion: that pruned it, "dense" where none did.
        accuracy: on the test part, in [0, 1].
        params, macs: its counts.
        latency_ms: by place ("onnxruntime, batch 1"), the median.
    """

    name: str
    criterion: str
    accuracy: float
    params: int
    macs: int
    latency_ms: Mapping[str, float]

    def cost(self, measure: str) -> float:
        """Return what it costs by "params", "MACs" or a place's milliseconds; NaN where that was not measured."""
        counts: dict[str, float] = {"params": self.params, "MACs": self.macs}
        return counts.get(measure, self.latency_ms.get(measure, math.nan))


def models(reports: Sequence[Report]) -> list[Model]:
    """Return the models of runs in their order, each dense one once.

    Raises:
        InputError: two runs have one name, or were not measured on the same test images.
    """
    names = [report.name for report in reports]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"{twice} is given twice; name every run once")
    tests = {report.name: (report.settings.get("data"), report.dense.images) for report in reports}
    if len(set(tests.values())) > 1:
        listed = ", ".join(f"{name}: {data}, {images:,} images" for name, (data, images) in tests.items())
        raise InputError(
            f"accuracies on different test images cannot be compared ({listed}); give runs on one data set"
        )
    found: list[Model] = []
    seen: set[tuple[float, int, int]] = set()
    for report in reports:
        dense = report.dense
        # Runs that differ in the criterion alone share their dense model: as accurate, as large.
        known = (dense.accuracy, dense.params, dense.macs)
        if known not in seen:
            seen.add(known)
            found.append(_model(report, f"{report.name} (dense)", "dense", dense, "dense"))
        found.append(_model(report, report.name, report.settings.get("criterion", "?"), report.pruned, "pruned"))
    return found


def _model(report: Report, name: str, criterion: str, figures: Figures, which: str) -> Model:
    return Model(name, criterion, figures.accuracy, figures.params, figures.macs, _latency_ms(report, which))


def _latency_ms(report: Report, which: str) -> dict[str, float]:
    return {
        f"{each.backend}, {each.device}, batch {each.batch_size}": each.p50_ms
        for each in report.timings
        if each.model == which
    }


def measures(found: Iterable[Model]) -> list[str]:
    """Return what the models can be compared by: the places in which all were timed, MACs and params."""
    found = list(found)
    places = [place for place in found[0].latency_ms if all(place in each.latency_ms for each in found)]
    return [*places, *COUNTS]


def front(found: Iterable[Model], measure: str) -> list[Model]:
    """Return the models that no other one beats in accuracy and cost, the cheapest first."""
    known = [each for each in found if not math.isnan(each.cost(measure))]
    best = [each for each in known if not any(_beats(other, each, measure) for other in known)]
    return sorted(best, key=lambda each: (each.cost(measure), -each.accuracy))


def _beats(one: Model, other: Model, measure: str) -> bool:
    cost, others = one.cost(measure), other.cost(measure)
    no_worse = cost <= others and one.accuracy >= other.accuracy
    return no_worse and (cost < others or one.accuracy > other.accuracy)


def warnings(reports: Sequence[Report]) -> list[str]:
    """Return in words why times of these runs may not be comparable.

    Models of different runs were not timed in turns. What they have in common shows what that costs: the dense model.
    """
    said = []
    machines = {str(report.machine.get("cpu", "?")) for report in reports}
    if len(machines) > 1:
        said.append(f"the runs were timed on different processors: {', '.join(sorted(machines))}")
    times: dict[tuple[int, int, str], list[float]] = {}
    for report in reports:
        for place, value in _latency_ms(report, "dense").items():
            times.setdefault((report.dense.params, report.dense.macs, place), []).append(value)
    for (*_, place), values in times.items():
        if max(values) > (1 + _DRIFT) * min(values):
            low, high = tables.milliseconds(min(values)), tables.milliseconds(max(values))
            said.append(
                f"{place}: the same dense model took {low} to {high} ms in different runs; for smaller differences "
                "time the files in one run: compress benchmark FILE..."
            )
    return said


# -- as text


def head(chosen: Sequence[str]) -> tuple[str, ...]:
    """Return the first line of the table."""
    times = [f"{measure}: ms" for measure in chosen if measure not in COUNTS]
    return ("run", "criterion", "accuracy %", "params", "MACs", *times, "on the front of")


def rows(found: Sequence[Model], chosen: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the table under `head`."""
    fronts = {measure: {each.name for each in front(found, measure)} for measure in chosen}
    times = [measure for measure in chosen if measure not in COUNTS]
    return [
        (
            each.name,
            each.criterion,
            f"{100 * each.accuracy:.2f}",
            tables.count(each.params),
            tables.count(each.macs),
            *(tables.milliseconds(each.cost(place)) for place in times),
            "; ".join(measure for measure in chosen if each.name in fronts[measure]) or "-",
        )
        for each in found
    ]


_PROTOCOL = (
    "On the front: no other model is as accurate at less cost, or more accurate at the same. Accuracy is of the test "
    "part; times are medians for a whole batch, of runs that were timed one after the other."
)


def markdown(reports: Sequence[Report]) -> str:
    """Return the runs side by side as Markdown."""
    found = models(reports)
    chosen = measures(found)
    said = [f"- {each}" for each in warnings(reports)]
    commands = "\n".join(report.command for report in reports)
    parts = [
        f"# {len(reports)} runs",
        tables.grid(head(chosen), rows(found, chosen)),
        _PROTOCOL,
        *(["\n".join(said)] if said else []),
        f"## Again\n\n```\n{commands}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def html(reports: Sequence[Report]) -> str:
    """Return the runs side by side as one HTML page: no script, nothing loaded from elsewhere, light and dark."""
    found = models(reports)
    chosen = measures(found)
    return filled_in(
        "side_by_side.html.j2",
        reports=reports,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        head=head(chosen),
        rows=rows(found, chosen),
        protocol=_PROTOCOL,
        warnings=warnings(reports),
        pictures=[(measure, _picture(found, measure)) for measure in chosen],
    )


def _picture(found: Sequence[Model], measure: str) -> Markup:
    points = {each.name: Point(each.name, each.criterion, each.accuracy, each.cost(measure)) for each in found}
    return draw_trade_off(list(points.values()), [points[each.name] for each in front(found, measure)], measure)


def write(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Write `runs.json`, `runs.md` and `runs.html` into a folder, which is made where it is missing; return them."""
    found = models(reports)
    fronts = {measure: [each.name for each in front(found, measure)] for measure in measures(found)}
    content = {**_FORMAT, "models": [dataclasses.asdict(each) for each in found], "fronts": fronts}
    texts = (
        as_json(content),
        markdown(reports),
        html(reports),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_texts({folder / name: text for name, text in zip(FILES, texts, strict=True)})
    return [folder / name for name in FILES]
