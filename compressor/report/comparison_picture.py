"""Accuracy over sparsity, a line for each criterion: the figure of a comparison, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from markupsafe import Markup

from compressor.report.graph_style import colours
from compressor.report.pictures import WIDTH, Scale, legend, percent_levels, picture
from compressor.report.svg import circle, group, hint, join, line, polyline, text

_HEIGHT, _BOTTOM = 380, 340
_LEGEND = 190  # pixels on the right

# criterion, sparsity, mean, lowest, highest, runs
Point = tuple[str, float, float, float, float, int]


def draw_comparison(points: Sequence[Point], dense: Sequence[float]) -> Markup:
    """Draw mean accuracies with their range over seeds, and the dense model's mean as a dashed line.

    Args:
        points: criterion, sparsity, mean, lowest and highest accuracy in [0, 1], number of runs.
        dense: accuracies of dense models.
    """
    if not points:
        return picture("accuracy over sparsity", 24, [text(4, 16, "no run is finished yet", class_="axis")])
    sparsities = sorted({point[1] for point in points})
    shown = [*(value for point in points for value in point[3:5]), *dense]
    margin = 0.08 * (max(shown) - min(shown)) or 0.01
    # Criteria at the same sparsity would cover each other's whiskers: each stands a few pixels beside the one before.
    across = Scale(sparsities[0], sparsities[-1], 80, WIDTH - _LEGEND - 40)
    up = Scale(min(shown) - margin, max(shown) + margin, _BOTTOM, 20)
    names = list(dict.fromkeys(point[0] for point in points))
    paint = dict(zip(names, colours(len(names)), strict=True))
    marks = [text(4, 12, "test accuracy, %", class_="axis")]
    marks.append(percent_levels(up, 56, WIDTH - _LEGEND))
    marks += [text(across(each), _BOTTOM + 18, f"{each:g}", "middle", class_="axis") for each in sparsities]
    marks.append(text((56 + WIDTH - _LEGEND) / 2, _BOTTOM + 36, "removed", "middle", class_="axis"))
    if dense:
        level = up(mean(dense))
        marks.append(line(56, level, WIDTH - _LEGEND, level, hint("dense"), class_="cut"))
        # Below the names, not beside its line: where that is depends on the accuracies, and names stand there.
        x, y = WIDTH - _LEGEND + 8, 44 + 20 * len(names)
        marks.append(line(x, y - 4, x + 10, y - 4, class_="cut"))
        marks.append(text(x + 14, y, f"dense {100 * mean(dense):.2f}", class_="label"))
    for index, name in enumerate(names):
        mine = sorted(point for point in points if point[0] == name)
        shift = 5 * (index - (len(names) - 1) / 2)
        marks.append(_series(mine, paint[name], across, up, shift))
    marks.append(legend(paint, WIDTH - _LEGEND + 8, 44))
    return picture("accuracy over sparsity", _HEIGHT, [join(marks)])


def _series(mine: Sequence[Point], colour: str, across: Scale, up: Scale, shift: float) -> Markup:
    places = [(across(sparsity) + shift, up(middle)) for _, sparsity, middle, *_ in mine]
    drawn = [polyline(places, style=f"stroke:{colour}")]
    for (x, y), (name, sparsity, middle, lowest, highest, n) in zip(places, mine, strict=True):
        says = f"{name}, {sparsity:g} removed: {middle:.2%} ({lowest:.2%} to {highest:.2%}, {n} runs)"
        drawn.append(
            group(
                hint(says),
                line(x, up(lowest), x, up(highest), style=f"stroke:{colour};stroke-width:1.5"),
                circle(x, y, 3.2, style=f"fill:{colour}"),
            )
        )
    return join(drawn)
