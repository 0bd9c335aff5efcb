"""The report's pictures as inline SVG: no script, no network, a few kilobytes each.

Colours come from the page's style sheet by class (`dense`, `pruned`, `cut`, `grid`), so one picture serves light and
dark. Every mark carries a `<title>` that browsers show on hover. Coordinates are CSS pixels at a width of `WIDTH`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from compressor.report.document import Cut, Epoch, Layer, Report, Timing
from compressor.report.tables import count, kept, milliseconds, pairs

WIDTH = 760
_ROW = 18  # height of one bar with its gap


@dataclass(frozen=True)
class _Scale:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = (self.high - self.low) or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)

    def ticks(self, at_most: int = 5) -> list[float]:
        """Return round values within the scale: 1, 2 or 5 times a power of ten apart."""
        step = _round_step((self.high - self.low) / at_most)
        first = math.ceil(self.low / step - 1e-9)
        return [step * n for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def channels(layers: Sequence[Layer]) -> Markup:
    """Draw the channels of every group: what stayed over what there was."""
    widest = max((layer.before for layer in layers), default=1)
    across = _Scale(0, widest, 230, WIDTH - 110)
    bars = [_channel_bar(layer, across, 4 + row * _ROW) for row, layer in enumerate(layers)]
    return _picture("channels per group, before and after", 8 + len(layers) * _ROW, bars)


def training(report: Report) -> Markup:
    """Draw validation accuracy over the epochs, and below it the parameters left, with every cut marked."""
    offsets = _offsets(report.epochs)
    curves = {stage: _curve(report.epochs, stage, offset) for stage, offset in offsets.items()}
    last = max((x for points in curves.values() for x, _ in points), default=1.0)
    across = _Scale(0, last, 56, WIDTH - 12)
    marks = [(offsets[cut.stage] + cut.step / _steps_per_epoch(report.epochs, cut.stage), cut) for cut in report.cuts]
    upper = _accuracy_panel(curves, across, marks)
    lower = _params_panel(report, offsets, across, marks)
    label = _text((across.start + across.end) / 2, 366, "epoch", "axis", "middle")
    return _picture("validation accuracy and parameters over the training", 370, [upper, lower, label])


def latency(timings: Iterable[Timing]) -> Markup:
    """Draw latency, dense over pruned, in every place: line from p10 to p99, box from p25 to p75, stroke at p50."""
    blocks = [_latency_block(place, both, 4 + 88 * row) for row, (place, both) in enumerate(pairs(timings))]
    return _picture("latency of both models, with spread", 4 + 88 * len(blocks), blocks)


def _channel_bar(layer: Layer, across: _Scale, top: float) -> Markup:
    hint = f"{layer.name}: {layer.after} of {layer.before} channels stay ({kept(layer)})"
    name = layer.name if len(layer.name) <= 34 else "…" + layer.name[-33:]
    return Markup("<g><title>{}</title>{}</g>").format(
        hint,
        _join(
            _text(across.start - 8, top + 11, name, "label", "end"),
            _rect(across.start, top, across(layer.before) - across.start, 13, "dense"),
            _rect(across.start, top, across(layer.after) - across.start, 13, "pruned"),
            _text(across(layer.before) + 6, top + 11, f"{layer.before} → {layer.after}", "value", "start"),
        ),
    )


def _offsets(epochs: Sequence[Epoch]) -> dict[str, float]:
    """Return where each stage begins: the two models go on together from the end of "train", if there is one."""
    shared = max((epoch.epoch for epoch in epochs if epoch.stage == "train"), default=0)
    return {"train": 0.0, "dense": float(shared), "pruned": float(shared)}


def _curve(epochs: Sequence[Epoch], stage: str, offset: float) -> list[tuple[float, Epoch]]:
    return [(offset + epoch.epoch, epoch) for epoch in epochs if epoch.stage == stage]


def _steps_per_epoch(epochs: Sequence[Epoch], stage: str) -> float:
    return max((epoch.step / epoch.epoch for epoch in epochs if epoch.stage == stage), default=1.0)


def _accuracy_panel(
    curves: dict[str, list[tuple[float, Epoch]]], across: _Scale, marks: Sequence[tuple[float, Cut]]
) -> Markup:
    shown = [epoch.validation_accuracy for points in curves.values() for _, epoch in points]
    up = _Scale(_floor(shown), 1.0, 200, 16)
    lines = [
        _polyline([(across(x), up(epoch.validation_accuracy)) for x, epoch in points], stage)
        for stage, points in curves.items()
    ]
    dots = [_dot(across(x), up(e.validation_accuracy), e) for points in curves.values() for x, e in points]
    title = _text(4, 10, "validation accuracy, %", "axis", "start")
    return _join(title, _grid(across, up, percent=True), *_cut_lines(marks, across, 16, 200), *lines, *dots)


def _params_panel(
    report: Report, offsets: dict[str, float], across: _Scale, marks: Sequence[tuple[float, Cut]]
) -> Markup:
    """Draw the pruned model's parameters as a staircase that falls at each cut."""
    up = _Scale(0, 1, 336, 256)
    begin, left = offsets["pruned"], 1.0
    points = [(across(begin), up(left))]
    for x, cut in marks:
        points += [(across(x), up(left)), (across(x), up(cut.params / report.dense.params))]
        left = cut.params / report.dense.params
    stairs = _polyline([*points, (across.end, up(left))], "pruned")
    title = _text(4, 246, "parameters left, %", "axis", "start")
    return _join(title, _grid(across, up, percent=True), *_cut_lines(marks, across, 256, 336), stairs)


def _cut_lines(marks: Sequence[tuple[float, Cut]], across: _Scale, top: float, bottom: float) -> list[Markup]:
    hint = "cut at step {}: {:,} channels go, {} parameters are left"
    return [
        Markup(
            '<line class="cut" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"><title>{3}</title></line>'
        ).format(across(x), top, bottom, hint.format(cut.step, cut.channels, count(cut.params)))
        for x, cut in marks
    ]


def _dot(x: float, y: float, epoch: Epoch) -> Markup:
    hint = f"{epoch.stage}, epoch {epoch.epoch}: {epoch.validation_accuracy:.2%}, {count(epoch.params)} parameters"
    return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="2.6"><title>{}</title></circle>').format(
        epoch.stage, x, y, hint
    )


def _latency_block(place: str, both: tuple[Timing, Timing], top: float) -> Markup:
    across = _Scale(0, 1.05 * max(timing.p99_ms for timing in both), 70, WIDTH - 90)
    ticks = [
        _join(
            _line(across(tick), top + 18, across(tick), top + 62, "grid"),
            _text(across(tick), top + 76, f"{tick:g} ms", "axis", "middle"),
        )
        for tick in across.ticks()
    ]
    rows = [_latency_row(timing, across, top + 30 + 22 * row) for row, timing in enumerate(both)]
    return _join(_text(4, top + 10, place, "label", "start"), *ticks, *rows)


def _latency_row(timing: Timing, across: _Scale, middle: float) -> Markup:
    hint = (
        f"{timing.model}: p50 {milliseconds(timing.p50_ms)}, p90 {milliseconds(timing.p90_ms)}, "
        f"p99 {milliseconds(timing.p99_ms)} ms; {timing.n} calls"
    )
    box = _rect(across(timing.p25_ms), middle - 6, across(timing.p75_ms) - across(timing.p25_ms), 12, timing.model)
    marks = _join(
        _text(across.start - 8, middle + 4, timing.model, "axis", "end"),
        _line(across(timing.p10_ms), middle, across(timing.p99_ms), middle, f"whisker {timing.model}"),
        box,
        _line(across(timing.p50_ms), middle - 8, across(timing.p50_ms), middle + 8, "median"),
        _text(across(timing.p99_ms) + 8, middle + 4, f"{milliseconds(timing.p50_ms)} ms", "value", "start"),
    )
    return Markup("<g><title>{}</title>{}</g>").format(hint, marks)


def _grid(across: _Scale, up: _Scale, *, percent: bool) -> Markup:
    """Draw horizontal lines with percentages, and the epochs below."""
    levels = [
        _join(
            _line(across.start, up(tick), across.end, up(tick), "grid"),
            _text(across.start - 8, up(tick) + 4, f"{100 * tick:.4g}", "axis", "end"),
        )
        for tick in up.ticks()
    ]
    epochs = [
        _text(across(tick), up.start + 14, f"{tick:g}", "axis", "middle")
        for tick in across.ticks(10)
        if tick == int(tick)
    ]
    return _join(*levels, *epochs)


def _floor(accuracies: Sequence[float]) -> float:
    """Return where the accuracy axis begins: below the worst late value, so that the end can be read."""
    late = [value for value in accuracies if not math.isnan(value)]
    return max(0.0, math.floor(10 * min(late, default=0.0)) / 10)


def _round_step(raw: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that is not below `raw`."""
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)


def _picture(label: str, height: float, parts: Iterable[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, label, _join(*parts)
    )


def _join(*parts: Markup) -> Markup:
    return Markup("").join(parts)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(kind, x1, y1, x2, y2)


def _rect(x: float, y: float, width: float, height: float, kind: str) -> Markup:
    return Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="1.5"/>').format(
        kind, x, y, max(width, 0.0), height
    )


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, text)


def _polyline(points: Sequence[tuple[float, float]], kind: str) -> Markup:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Markup('<polyline class="{}" points="{}"/>').format(kind, path)
