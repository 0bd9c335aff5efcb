"""The report's pictures as inline SVG: no script, no network, a few kilobytes each.

Colours come from the page's style sheet by class (`dense`, `pruned`, `cut`, `grid`), so one picture serves light and
dark. Every mark carries a `<title>` that browsers show on hover. Coordinates are CSS pixels at a width of `WIDTH`.

A worked example: 3 epochs of 10 steps lie on the 692 pixels from 56 to 748, so that a cut after step 15, at 1.5 epochs,
is marked at 56 + 692 * 1.5 / 3 = 402.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from compressor.report.document import Cut, Epoch, Layer, Report, Timing
from compressor.report.svg import circle, element, group, hint, join, line, polyline, rectangle, text
from compressor.report.tables import Pair, count, kept, milliseconds, pairs

WIDTH = 760
_ROW = 18  # height of one bar with its gap


@dataclass(frozen=True)
class Scale:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return where a value lies, in pixels."""
        span = (self.high - self.low) or 1.0  # one value alone lies at the start
        return self.start + (value - self.low) / span * (self.end - self.start)

    def ticks(self, at_most: int = 5) -> list[float]:
        """Return round values within the scale: 1, 2 or 5 times a power of ten apart."""
        step = _round_step((self.high - self.low) / at_most)
        # 0.3 / 0.1 is a little below 3: without the allowance the last tick would be missing.
        first = math.ceil(self.low / step - 1e-9)
        return [step * n for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def channels(layers: Sequence[Layer]) -> Markup:
    """Draw the channels of every group: what stayed over what there was."""
    widest = max((layer.before for layer in layers), default=1)
    across = Scale(0, widest, 230, WIDTH - 110)
    bars = [_channel_bar(layer, across, 4 + row * _ROW) for row, layer in enumerate(layers)]
    return picture("channels per group, before and after", 8 + len(layers) * _ROW, bars)


def training(report: Report) -> Markup:
    """Draw validation accuracy over the epochs, and below it the parameters left, with every cut marked."""
    offsets = _offsets(report.epochs)
    curves = {stage: _curve(report.epochs, stage, offset) for stage, offset in offsets.items()}
    last = max((x for points in curves.values() for x, _ in points), default=1.0)
    across = Scale(0, last, 56, WIDTH - 12)
    marks = [(offsets[cut.stage] + cut.step / _steps_per_epoch(report.epochs, cut.stage), cut) for cut in report.cuts]
    upper = _accuracy_panel(curves, across, marks)
    lower = _params_panel(report, offsets, across, marks)
    label = text((across.start + across.end) / 2, 366, "epoch", "middle", class_="axis")
    return picture("validation accuracy and parameters over the training", 370, [upper, lower, label])


def latency(timings: Iterable[Timing]) -> Markup:
    """Draw latency, dense over pruned, in every place: line from p10 to p99, box from p25 to p75, stroke at p50."""
    blocks = [_latency_block(pair, 4 + 88 * row) for row, pair in enumerate(pairs(timings))]
    return picture("latency of both models, with spread", 4 + 88 * len(blocks), blocks)


def _channel_bar(layer: Layer, across: Scale, top: float) -> Markup:
    return group(
        hint(f"{layer.name}: {layer.after} of {layer.before} channels stay ({kept(layer)})"),
        text(across.start - 8, top + 11, shortened(layer.name), "end", class_="label"),
        # What stayed is drawn over what there was: the grey that is left is what went.
        _bar(across.start, across(layer.before), top, 13, "dense"),
        _bar(across.start, across(layer.after), top, 13, "pruned"),
        text(across(layer.before) + 6, top + 11, f"{layer.before} → {layer.after}", class_="value"),
    )


def shortened(name: str) -> str:
    """Return a name as it fits in front of a row: the end of a long one, which tells it from others."""
    return name if len(name) <= 34 else "…" + name[-33:]


def _offsets(epochs: Sequence[Epoch]) -> dict[str, float]:
    """Return where each stage begins: the two models go on together from the end of "train", if there is one."""
    shared = max((epoch.epoch for epoch in epochs if epoch.stage == "train"), default=0)
    return {"train": 0.0, "dense": float(shared), "pruned": float(shared)}


def _curve(epochs: Sequence[Epoch], stage: str, offset: float) -> list[tuple[float, Epoch]]:
    return [(offset + epoch.epoch, epoch) for epoch in epochs if epoch.stage == stage]


def _steps_per_epoch(epochs: Sequence[Epoch], stage: str) -> float:
    return max((epoch.step / epoch.epoch for epoch in epochs if epoch.stage == stage), default=1.0)


def _accuracy_panel(
    curves: dict[str, list[tuple[float, Epoch]]], across: Scale, marks: Sequence[tuple[float, Cut]]
) -> Markup:
    shown = [epoch.validation_accuracy for points in curves.values() for _, epoch in points]
    up = Scale(_floor(shown), 1.0, 200, 16)
    lines = [
        polyline([(across(x), up(epoch.validation_accuracy)) for x, epoch in points], class_=stage)
        for stage, points in curves.items()
    ]
    dots = [_dot(across(x), up(e.validation_accuracy), e) for points in curves.values() for x, e in points]
    title = text(4, 10, "validation accuracy, %", class_="axis")
    return join([title, _grid(across, up), *_cut_lines(marks, across, 16, 200), *lines, *dots])


def _params_panel(
    report: Report, offsets: dict[str, float], across: Scale, marks: Sequence[tuple[float, Cut]]
) -> Markup:
    """Draw the pruned model's parameters as a staircase that falls at each cut."""
    up = Scale(0, 1, 336, 256)
    left = 1.0
    points = [(across(offsets["pruned"]), up(left))]
    # Two points for each cut: between cuts nothing goes, and a slope would say otherwise.
    for x, cut in marks:
        points += [(across(x), up(left)), (across(x), up(cut.params / report.dense.params))]
        left = cut.params / report.dense.params
    stairs = polyline([*points, (across.end, up(left))], class_="pruned")
    title = text(4, 246, "parameters left, %", class_="axis")
    return join([title, _grid(across, up), *_cut_lines(marks, across, 256, 336), stairs])


def _cut_lines(marks: Sequence[tuple[float, Cut]], across: Scale, top: float, bottom: float) -> list[Markup]:
    says = "cut at step {}: {:,} channels go, {} parameters are left"
    return [
        line(
            across(x),
            top,
            across(x),
            bottom,
            hint(says.format(cut.step, cut.channels, count(cut.params))),
            class_="cut",
        )
        for x, cut in marks
    ]


def _dot(x: float, y: float, epoch: Epoch) -> Markup:
    says = f"{epoch.stage}, epoch {epoch.epoch}: {epoch.validation_accuracy:.2%}, {count(epoch.params)} parameters"
    return circle(x, y, 2.6, hint(says), class_=epoch.stage)


def _latency_block(pair: Pair, top: float) -> Markup:
    # A scale for each place, from 0 on: lengths compare two models, and batch 32 would flatten batch 1 to nothing.
    both = (pair.dense, pair.pruned)
    across = Scale(0, 1.05 * max(timing.percentile_ms(99) for timing in both), 70, WIDTH - 90)
    ticks = [
        line(across(tick), top + 18, across(tick), top + 62, class_="grid")
        + text(across(tick), top + 76, f"{tick:g} ms", "middle", class_="axis")
        for tick in across.ticks()
    ]
    rows = [_latency_row(timing, across, top + 30 + 22 * row) for row, timing in enumerate(both)]
    return join([text(4, top + 10, pair.place, class_="label"), *ticks, *rows])


def _latency_row(timing: Timing, across: Scale, middle: float) -> Markup:
    low, left, right, high = (across(timing.percentile_ms(q)) for q in (10, 25, 75, 99))
    says = (
        f"{timing.model}: p50 {milliseconds(timing.p50_ms)}, p90 {milliseconds(timing.percentile_ms(90))}, "
        f"p99 {milliseconds(timing.percentile_ms(99))} ms; {timing.n} calls"
    )
    middle_x = across(timing.p50_ms)
    return group(
        hint(says),
        text(across.start - 8, middle + 4, timing.model, "end", class_="axis"),
        line(low, middle, high, middle, class_=f"whisker {timing.model}"),
        _bar(left, right, middle - 6, 12, timing.model),
        line(middle_x, middle - 8, middle_x, middle + 8, class_="median"),
        text(high + 8, middle + 4, f"{milliseconds(timing.p50_ms)} ms", class_="value"),
    )


def _bar(begin: float, end: float, top: float, height: float, kind: str) -> Markup:
    return rectangle(begin, top, end - begin, height, class_=kind, rx=1.5)


def _grid(across: Scale, up: Scale) -> Markup:
    """Draw horizontal lines with percentages, and the epochs below."""
    # A short training has ticks between two epochs, where nothing was measured.
    whole = [tick for tick in across.ticks(10) if tick == int(tick)]
    epochs = [text(across(tick), up.start + 14, f"{tick:g}", "middle", class_="axis") for tick in whole]
    return join([percent_levels(up, across.start, across.end), *epochs])


def percent_levels(up: Scale, left: float, right: float) -> Markup:
    """Draw a horizontal line at every round share, with its percentage on the left."""
    return join(
        line(left, up(tick), right, up(tick), class_="grid")
        + text(left - 8, up(tick) + 4, f"{100 * tick:.4g}", "end", class_="axis")
        for tick in up.ticks()
    )


def legend(paint: Mapping[str, str], x: float, y: float) -> Markup:
    """Draw names below each other, each with a dot of its colour; `x` and `y` are where the first one begins."""
    return join(
        circle(x + 4, y - 4 + 20 * row, 4, style=f"fill:{colour}") + text(x + 14, y + 20 * row, name, class_="label")
        for row, (name, colour) in enumerate(paint.items())
    )


def _floor(accuracies: Sequence[float]) -> float:
    """Return where the accuracy axis begins: at the tenth below the worst, so that differences can be read."""
    known = [value for value in accuracies if not math.isnan(value)]  # an epoch that diverged has none
    return max(0.0, math.floor(10 * min(known, default=0.0)) / 10)


def _round_step(raw: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that is not below `raw`."""
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)


def picture(label: str, height: float, marks: Iterable[Markup]) -> Markup:
    """Return marks as one picture of the page's width."""
    return element("svg", join(marks), viewBox=f"0 0 {WIDTH} {height:.0f}", role="img", aria_label=label)
