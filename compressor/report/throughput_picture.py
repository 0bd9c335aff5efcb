"""Images a second over the batch size, a line for both models in each place."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from compressor.report.document import Timing
from compressor.report.graph_style import colours
from compressor.report.pictures import WIDTH, Scale, legend, picture
from compressor.report.svg import circle, group, hint, join, line, polyline, text
from compressor.report.tables import count

_HEIGHT, _BOTTOM, _LEFT = 300, 260, 64
_LEGEND = 220  # pixels on the right


def throughput(timings: Sequence[Timing]) -> Markup:
    """Draw what was timed at two batch sizes or more; the axes are logarithmic."""
    series: dict[str, list[Timing]] = {}
    for timing in timings:
        if timing.model != "control":
            series.setdefault(f"{timing.backend}, {timing.model}", []).append(timing)
    series = {name: mine for name, mine in series.items() if len(mine) > 1}
    if not series:
        return Markup("")
    rates = [math.log2(_images_a_second(each)) for mine in series.values() for each in mine]
    sizes = sorted({each.batch_size for mine in series.values() for each in mine})
    right = WIDTH - _LEGEND
    across = Scale(math.log2(sizes[0]), math.log2(sizes[-1]), _LEFT + 20, right - 20)
    up = Scale(min(rates) - 0.3, max(rates) + 0.3, _BOTTOM, 24)
    paint = dict(zip(series, colours(len(series)), strict=True))
    levels = range(math.ceil(up.low), math.floor(up.high) + 1, max(1, round((up.high - up.low) / 6)))
    marks = [
        text(4, 12, "images a second", class_="axis"),
        *(line(_LEFT, up(level), right, up(level), class_="grid") for level in levels),
        *(text(_LEFT - 8, up(level) + 4, count(2.0**level), "end", class_="axis") for level in levels),
        *(text(across(math.log2(size)), _BOTTOM + 16, f"{size}", "middle", class_="axis") for size in sizes),
        text((_LEFT + right) / 2, _BOTTOM + 34, "images at once", "middle", class_="axis"),
        *(_series(name, mine, paint[name], across, up) for name, mine in series.items()),
        legend(paint, right + 8, 44),
    ]
    return picture("throughput over batch size", _HEIGHT, marks)


def _images_a_second(timing: Timing) -> float:
    return float(f"{1e3 * timing.batch_size / timing.p50_ms:.3g}")


def _series(name: str, mine: Sequence[Timing], colour: str, across: Scale, up: Scale) -> Markup:
    ordered = sorted(mine, key=lambda each: each.batch_size)
    places = [(across(math.log2(each.batch_size)), up(math.log2(_images_a_second(each)))) for each in ordered]
    says = [f"{name}: {count(_images_a_second(each))} images a second, {each.batch_size} at once" for each in ordered]
    return join(
        [
            polyline(places, style=f"stroke:{colour}"),
            *(
                group(hint(words), circle(x, y, 3.2, style=f"fill:{colour}"))
                for (x, y), words in zip(places, says, strict=True)
            ),
        ]
    )
