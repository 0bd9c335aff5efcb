"""How relevant the channels of every group were, beside channels of no effect: one stroke a channel.

The scale is that of the dummies: 0 is their mean, 1 their standard deviation. It is linear around 0 and logarithmic
outside (the inverse hyperbolic sine), so that a channel of 50 deviations fits beside many of half a deviation.

    group       dummies        channels
    layer1.0    [-1 .. 1]      ||||| | | |      |  |          12 of 64
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from compressor.report.document import GroupRelevance
from compressor.report.pictures import WIDTH, Scale, picture, shortened
from compressor.report.svg import group, hint, join, line, path, pixels, rectangle, text

_ROW = 18
_TICKS = (-30, -10, -3, -1, 0, 1, 3, 10, 30, 100, 300)
_BAND = 2.0  # of a normal distribution 95 % lie so many deviations around the mean


def relevance(groups: Sequence[GroupRelevance]) -> Markup:
    """Draw every channel of every group."""
    known = [_place(value) for each in groups for value in each.deviations if math.isfinite(value)]
    across = Scale(min([-_place(_BAND), *known]), max([_place(_BAND), *known]), 230, WIDTH - 90)
    bottom = 8 + len(groups) * _ROW
    ticks = [tick for tick in _TICKS if across.low <= _place(tick) <= across.high]
    grid = [
        line(across(_place(tick)), 4, across(_place(tick)), bottom, class_="grid")
        + text(across(_place(tick)), bottom + 14, f"{tick}", "middle", class_="axis")
        for tick in ticks
    ]
    left, right = across(-_place(_BAND)), across(_place(_BAND))
    band = rectangle(left, 4, right - left, bottom - 4, class_="dense", opacity=0.35)
    rows = [_row(each, across, 4 + row * _ROW) for row, each in enumerate(groups)]
    label = text((across.start + across.end) / 2, bottom + 30, "deviations of the dummies", "middle", class_="axis")
    return picture("relevance of every channel beside dummies", bottom + 36, [band, *grid, *rows, label])


def _place(value: float) -> float:
    return math.asinh(value)


def _row(of: GroupRelevance, across: Scale, top: float) -> Markup:
    above = sum(of.is_above)
    says = (
        f"{of.name}: {above} of {len(of.is_above)} channels are above chance, {of.undecided} cannot be told from it; "
        f"two halves of the steps rank them with a correlation of {of.reliability:.2f}"
    )
    return group(
        hint(says),
        rectangle(across.start, top, across.end - across.start, 14, fill="transparent"),  # to point at
        text(across.start - 8, top + 11, shortened(of.name), "end", class_="label"),
        join(_strokes(of, across, top, is_above) for is_above in (False, True)),
        text(across.end + 8, top + 11, f"{above} of {len(of.is_above)}", class_="value"),
    )


def _strokes(of: GroupRelevance, across: Scale, top: float, is_above: bool) -> Markup:
    """Draw all channels on one side of chance as one path: a wide network has thousands of them."""
    chosen = [
        value
        for value, above in zip(of.deviations, of.is_above, strict=True)
        if above == is_above and math.isfinite(value)
    ]
    steps = [f"M{pixels(across(_place(value)))} {pixels(top + 1)}v12" for value in sorted(chosen)]
    return path("".join(steps), class_="pruned" if is_above else "train") if steps else Markup("")
