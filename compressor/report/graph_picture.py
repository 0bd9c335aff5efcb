"""The channel graph as a picture: one SVG, no script, no style sheet, readable on light and dark pages.

Weights stand one below the other in the order in which the model uses them. The upper edge of a box is its input side,
the lower edge its output side, in the colours of the groups that live there. Each group is also a wire beside the
boxes: a dot where a weight writes its channels, an arrow where one reads them. What hangs on one wire is cut together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from markupsafe import Markup

from compressor.graph import ChannelGraph
from compressor.report.graph_layout import Node, Stripe, Tap, Wire, blocks, nodes, wires
from compressor.report.graph_legend import Legend, shown
from compressor.report.graph_style import FAINT, INK, LETTER, PLAIN, QUIET
from compressor.report.inspection import inspect_graph
from compressor.report.svg import element, group, hint, path, pixels, rectangle, text
from compressor.report.tables import count

_TOP, _LEFT = 64, 28  # where the boxes begin
_GAP = 5  # between two boxes
_SHADE, _OUTLINE, _SLIM_OUTLINE = "#f1f3f6", "#8a93a3", "#d5d9e0"
_SLIM_TYPE: dict[str, Any] = {"font_size": 9, "fill": FAINT}


def draw_graph(graph: ChannelGraph) -> Markup:
    """Draw which channels of a model go together, which cannot be cut, and why.

    Args:
        graph: read only.

    Returns:
        One `<svg>` element with its own background, for a file or for a page; the same graph gives the same text.
        Every box says on hover who lives on its sides, and why what is grey cannot be cut.
    """
    found = inspect_graph(graph)
    legend = Legend(found)
    rows = nodes(graph)
    page = _Page(rows, wires(rows), legend)
    height = max(page.tops[-1], _TOP + 10 + legend.height) + 8
    width = page.end + legend.width
    # A background of its own: on a dark page the ink would not be seen.
    marks = [element("rect", width=width, height=height, fill="#ffffff"), *legend.patterns()]
    marks += [*_head(type(graph.model).__name__, found), *page.marks(), *legend.table(page.end, _TOP + 10)]
    picture = element(
        "svg",
        Markup("\n").join(["", *marks, ""]),  # a line for each mark, so that two pictures can be compared
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {pixels(width)} {pixels(height)}",
        width=width,
        height=height,
        role="img",
        aria_label="channel graph",
        font_family="ui-monospace, Menlo, Consolas, monospace",
    )
    return picture + Markup("\n")


def _head(model: str, found: dict[str, Any]) -> Iterator[Markup]:
    number = len(found["groups"])
    yield text(8, 20, f"{model}: {number} group{'s' * (number != 1)} of channels", font_size=14, fill=INK)
    costs = f"{count(found['params'])} parameters, {count(found['macs'])} MACs."
    yield text(8, 36, f"{costs} One colour, one wire: the same channels, cut together.", **QUIET)
    inexact = " Hatched, dashed: not exact." if not all(group["exact"] for group in found["groups"]) else ""
    key = "Upper edge: input side. Lower edge: output side. Grey: cannot be cut, hover for why."
    yield text(8, 50, key + inexact, **QUIET)


class _Page:
    """The boxes with their wires, and where they stand.

    Attributes:
        tops: the upper edge of every box, and where the next one would begin.
        right: the right edge of the boxes; wires run from there to `end`.
    """

    def __init__(self, rows: Sequence[Node], lines: Sequence[Wire], legend: Legend) -> None:
        self._rows = rows
        self._wires = lines
        self._legend = legend
        letters = max((len(shown(node.name)) + len(_shape(node)) for node in rows), default=10)
        lanes = max((wire.lane + 1 for wire in lines), default=0)
        # Many lanes stand closer, but never so close that two lines of 1.8 pixels touch.
        self._pitch = min(11.0, max(4.5, 220 / max(lanes, 1)))
        self.tops = list(accumulate((_height(node) + _GAP for node in rows), initial=_TOP))
        self.right = _LEFT + 28 + LETTER * letters
        self.end = self._lane(lanes) + 28

    def marks(self) -> Iterator[Markup]:
        """Draw everything, what lies below first."""
        yield from self._blocks()
        # The outer lanes first: where an inner one crosses their horizontals, it lies above them.
        for wire in sorted(self._wires, key=lambda wire: -wire.lane):
            yield self._wire(wire)
        yield from self._bundles()
        yield from map(self._dots, self._wires)
        yield from map(self._box, self._rows, self.tops)
        yield from self._edges()

    # -- boxes

    def _blocks(self) -> Iterator[Markup]:
        """Shade every other block of the model, and write its name beside it."""
        start = 0
        for number, (name, length) in enumerate(blocks(self._rows)):
            top, bottom = (self.tops[row] - _GAP / 2 for row in (start, start + length))
            start += length
            if number % 2 == 0:
                yield rectangle(6, top, self.end - 20, bottom - top, fill=_SHADE)
            if length > 1 and LETTER * len(name) < bottom - top:
                turned = f"translate(19 {pixels((top + bottom) / 2)}) rotate(-90)"
                yield group(text(0, 0, name, "middle", **QUIET), transform=turned)

    def _box(self, node: Node, top: float) -> Markup:
        left, width = self._sides(node)
        name, shape = (_SLIM_TYPE, _SLIM_TYPE) if node.slim else (PLAIN, QUIET)
        line = top + (8.5 if node.slim else 16)
        outline = _SLIM_OUTLINE if node.slim else _OUTLINE
        return group(
            hint("\n".join(_hints(node))),
            rectangle(left, top, width, _height(node), fill="#ffffff", stroke=outline),
            text(left + 6, line, shown(node.name), **name),
            text(left + width - 6, line, _shape(node), "end", **shape),
        )

    def _edges(self) -> Iterator[Markup]:
        """Draw the coloured edges of all boxes: one path for each group, which says on hover whose it is."""
        # One path, not a mark for each edge: a DenseNet-201 has thousands of them, and the file stays below 1 MB.
        paths: dict[str | None, list[str]] = defaultdict(list)
        for node, top in zip(self._rows, self.tops, strict=False):
            left, width = self._sides(node)
            thick = _edge(node)
            for stripes, y in ((node.inputs, top), (node.outputs, top + _height(node) - thick)):
                whole = sum(stripe.share for stripe in stripes)
                begin = left
                # A BatchNorm hands its channels through: one edge tells all.
                for stripe in () if node.slim and y == top else stripes:
                    length = width * stripe.share / whole
                    stroke = f"M{pixels(begin)} {pixels(y)}h{pixels(length)}v{thick}h-{pixels(length)}z"
                    paths[stripe.group].append(stroke)
                    begin += length
        for owner, strokes in paths.items():
            yield path("".join(strokes), hint(owner or "frozen"), fill=self._legend.fill(owner))

    def _sides(self, node: Node) -> tuple[float, float]:
        """Return the left edge and the width of a box."""
        indent = 10 if node.slim else 0
        return _LEFT + indent, self.right - _LEFT - 2 * indent

    # -- wires

    def _lane(self, number: int) -> float:
        return self.right + 20 + self._pitch * number

    def _meets(self, tap: Tap) -> float:
        """Return the height at which a wire meets a box: the middle of an edge."""
        node = self._rows[tap.row]
        top = self.tops[tap.row]
        return top + (_edge(node) / 2 if tap.side == "input" else _height(node) - _edge(node) / 2)

    def _wire(self, wire: Wire) -> Markup:
        """Draw the vertical of a group, and the horizontals to boxes on whose side it is alone."""
        across = pixels(self._lane(wire.lane))
        colour = self._legend.colour[wire.group]
        heights = [self._meets(tap) for tap in wire.taps]
        alone = [tap for tap in wire.taps if len(self._rows[tap.row].groups(tap.side)) == 1]
        strokes = f"M{across} {pixels(min(heights))}V{pixels(max(heights))}"
        strokes += "".join(f"M{pixels(self.right)} {pixels(self._meets(tap))}H{across}" for tap in alone)
        dashes = {"stroke_dasharray": "5 2.5"} if wire.group in self._legend.inexact else {}
        line = path(strokes, hint(wire.group), fill="none", stroke=colour, stroke_width=1.8, **dashes)
        return line + self._ends(alone, colour)

    def _bundles(self) -> Iterator[Markup]:
        """Draw one grey line where several groups live on one side of a box, out to the farthest of their wires."""
        outward = sorted(self._wires, key=lambda wire: wire.lane)
        far = {tap: self._lane(wire.lane) for wire in outward for tap in wire.taps}
        many = [tap for tap in sorted(far) if len(self._rows[tap.row].groups(tap.side)) > 1]
        strokes = "".join(f"M{pixels(self.right)} {pixels(self._meets(tap))}H{pixels(far[tap])}" for tap in many)
        yield path(strokes, stroke=FAINT, stroke_width=1.2) + self._ends(many, FAINT)

    def _ends(self, taps: Iterable[Tap], colour: str) -> Markup:
        """Draw an arrow into every input and a dot at every output."""
        arrow = "M{0} {1}l8 -3.6v7.2z"
        dot = "M{0} {1}a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z"
        marks = (
            (arrow if tap.side == "input" else dot).format(pixels(self.right), pixels(self._meets(tap))) for tap in taps
        )
        return path("".join(marks), fill=colour)

    def _dots(self, wire: Wire) -> Markup:
        """Draw where a wire is met: a line without length and with round ends is a dot."""
        across = pixels(self._lane(wire.lane))
        dots = "".join(f"M{across} {pixels(self._meets(tap))}h0" for tap in wire.taps)
        return path(dots, stroke=self._legend.colour[wire.group], stroke_width=4.4, stroke_linecap="round")


def _hints(node: Node) -> list[str]:
    """Return what a box says on hover."""
    sides = {"channels": node.outputs} if node.slim else {"output": node.outputs, "input": node.inputs}
    lived = [f"{side}: {', '.join(_lives(stripe) for stripe in stripes)}" for side, stripes in sides.items()]
    frozen = [f"{each.tensor} dimension {each.dim} is frozen: {each.reason}" for each in node.frozen]
    return [f"{node.name} {_shape(node)}", *lived, *frozen, f"tensors: {', '.join(node.tensors)}"]


def _lives(stripe: Stripe) -> str:
    return f"{stripe.share} of {stripe.group}" if stripe.group else f"{stripe.share} frozen"


def _height(node: Node) -> int:
    return 14 if node.slim else 25


def _edge(node: Node) -> int:
    """Return how thick the coloured edges are."""
    return 3 if node.slim else 4


def _shape(node: Node) -> str:
    return "×".join(map(str, node.shape))
