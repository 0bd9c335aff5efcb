"""Accuracy over one cost: a dot for each model, and a line along those that no other one beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from compressor.report.graph_style import colours
from compressor.report.pictures import WIDTH, Scale, legend, percent_levels, picture
from compressor.report.svg import circle, group, hint, join, polyline, text
from compressor.report.tables import count, milliseconds

_HEIGHT, _BOTTOM, _LEFT = 330, 290, 56
_LEGEND = 170  # pixels on the right
COUNTS = ("MACs", "params")  # costs that are counts; every other one is milliseconds in a place


class Point(NamedTuple):
    """A model: its name, what pruned it, its accuracy in [0, 1] and what it costs."""

    name: str
    criterion: str
    accuracy: float
    cost: float


def draw_trade_off(points: Sequence[Point], front: Sequence[Point], measure: str) -> Markup:
    """Draw models by accuracy and cost.

    Args:
        points: all models.
        front: those of them that a line joins, the cheapest first.
        measure: "MACs", "params" or a place, whose milliseconds are the cost.
    """
    is_count = measure in COUNTS
    costs = [each.cost for each in points]
    accuracies = [each.accuracy for each in points]
    margin = 0.08 * (max(accuracies) - min(accuracies)) or 0.01
    across = Scale(0, 1.05 * max(costs), _LEFT, WIDTH - _LEGEND)
    up = Scale(min(accuracies) - margin, max(accuracies) + margin, _BOTTOM, 20)
    show = count if is_count else milliseconds
    unit = measure if is_count else f"ms ({measure})"
    names = list(dict.fromkeys(each.criterion for each in points))
    paint = dict(zip(names, colours(len(names)), strict=True))
    marks = [text(4, 12, "test accuracy, %", class_="axis")]
    marks.append(percent_levels(up, _LEFT, across.end))
    marks += [text(across(tick), _BOTTOM + 18, show(tick), "middle", class_="axis") for tick in across.ticks()]
    marks.append(text((_LEFT + across.end) / 2, _BOTTOM + 36, unit, "middle", class_="axis"))
    marks.append(polyline(_stairs(front, across, up), class_="train"))
    # Criteria alone: names of runs are in the table, and on every dot.
    marks.append(legend(paint, across.end + 8, 40))
    for each in points:
        says = f"{each.name}: {each.accuracy:.2%}, {show(each.cost)} {unit}"
        dot = circle(across(each.cost), up(each.accuracy), 4.5, style=f"fill:{paint[each.criterion]}")
        marks.append(group(hint(says), dot))
    return picture(f"accuracy over {measure}", _HEIGHT, [join(marks)])


def _stairs(front: Sequence[Point], across: Scale, up: Scale) -> list[tuple[float, float]]:
    """Return the corners of the front: between two models, what can be had is the cheaper one."""
    points: list[tuple[float, float]] = []
    for each in front:
        x, y = across(each.cost), up(each.accuracy)
        if points:
            points.append((x, points[-1][1]))
        points.append((x, y))
    return points
