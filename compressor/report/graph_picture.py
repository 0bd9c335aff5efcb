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
from compressor.report.inspection import inspection
from compressor.report.svg import FAINT, INK, LETTER, hint, joined, pixels, rectangle, text
from compressor.report.tables import count

_TOP, _LEFT = 64, 28  # where the boxes begin
_GAP = 5  # between two boxes
_SHADE, _OUTLINE, _SLIM_OUTLINE = "#f1f3f6", "#8a93a3", "#d5d9e0"


def graph_picture(graph: ChannelGraph) -> Markup:
    """Draw which channels of a model go together, which cannot be cut, and why.

    Args:
        graph: read only.

    Returns:
        One `<svg>` element with its own background, for a file or for a page; the same graph gives the same text.
        Every box says on hover who lives on its sides, and why what is grey cannot be cut.
    """
    found = inspection(graph)
    legend, rows = Legend(found), nodes(graph)
    page = _Page(rows, wires(rows), legend)
    height = max(page.tops[-1], _TOP + 10 + legend.height) + 8
    marks = [*legend.patterns(), *_head(type(graph.model).__name__, found), *page.marks()]
    marks += legend.table(page.end, _TOP + 10)
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" '
        'aria-label="channel graph" font-family="ui-monospace, Menlo, Consolas, monospace">\n'
        '<rect width="{0}" height="{1}" fill="#ffffff"/>\n{2}\n</svg>\n'
    ).format(pixels(page.end + legend.width), pixels(height), Markup("\n").join(marks))


def _head(model: str, found: dict[str, Any]) -> Iterator[Markup]:
    number = len(found["groups"])
    yield text(8, 20, f"{model}: {number} group{'s' * (number != 1)} of channels", size=14)
    costs = f"{count(found['params'])} parameters, {count(found['macs'])} MACs."
    yield text(8, 36, f"{costs} One colour, one wire: the same channels, cut together.", fill=FAINT)
    inexact = " Hatched, dashed: not exact." if not all(group["exact"] for group in found["groups"]) else ""
    key = "Upper edge: input side. Lower edge: output side. Grey: cannot be cut, hover for why."
    yield text(8, 50, key + inexact, fill=FAINT)


class _Page:
    """The boxes with their wires, and where they stand.

    Attributes:
        tops: the upper edge of every box, and where the next one would begin.
        right: the right edge of the boxes; wires run from there to `end`.
    """

    def __init__(self, rows: Sequence[Node], lines: Sequence[Wire], legend: Legend) -> None:
        self._rows, self._wires, self._legend = rows, lines, legend
        letters = max((len(shown(node.name)) + len(_shape(node)) for node in rows), default=10)
        lanes = max((wire.lane + 1 for wire in lines), default=0)
        self._pitch = min(11.0, max(4.5, 220 / max(lanes, 1)))
        self.tops = list(accumulate((_height(node) + _GAP for node in rows), initial=_TOP))
        self.right = _LEFT + 28 + LETTER * letters
        self.end = self._lane(lanes) + 28

    def marks(self) -> Iterator[Markup]:
        """Draw everything, what lies below first."""
        yield from self._blocks()
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
                yield rectangle(6, top, self.end - 20, bottom - top, _SHADE)
            if length > 1 and LETTER * len(name) < bottom - top:
                turned = Markup('<g transform="translate(19 {}) rotate(-90)">{}</g>')
                yield turned.format(pixels((top + bottom) / 2), text(0, 0, name, fill=FAINT, anchor="middle"))

    def _box(self, node: Node, top: float) -> Markup:
        left, width = self._sides(node)
        size, ink, outline = (9.0, FAINT, _SLIM_OUTLINE) if node.slim else (10.5, INK, _OUTLINE)
        line = top + (8.5 if node.slim else 16)
        return Markup("<g>{}</g>").format(
            joined(
                [
                    hint(_hints(node)),
                    rectangle(left, top, width, _height(node), "#ffffff", outline),
                    text(left + 6, line, shown(node.name), size=size, fill=ink),
                    text(left + width - 6, line, _shape(node), size=size, fill=FAINT, anchor="end"),
                ]
            )
        )

    def _edges(self) -> Iterator[Markup]:
        """Draw the coloured edges of all boxes: one path for each group, which says on hover whose it is."""
        paths: dict[str | None, list[str]] = defaultdict(list)
        for node, top in zip(self._rows, self.tops, strict=False):
            left, width = self._sides(node)
            thick = _edge(node)
            for stripes, y in ((node.inputs, top), (node.outputs, top + _height(node) - thick)):
                whole, begin = sum(stripe.share for stripe in stripes), left
                for stripe in () if node.slim and y == top else stripes:
                    length = width * stripe.share / whole
                    stroke = f"M{pixels(begin)} {pixels(y)}h{pixels(length)}v{thick}h-{pixels(length)}z"
                    paths[stripe.group].append(stroke)
                    begin += length
        for group, path in paths.items():
            mark = Markup('<path fill="{}" d="{}">{}</path>')
            yield mark.format(self._legend.fill(group), "".join(path), hint([group or "frozen"]))

    def _sides(self, node: Node) -> tuple[float, float]:
        """Give the left edge and the width of a box."""
        indent = 10 if node.slim else 0
        return _LEFT + indent, self.right - _LEFT - 2 * indent

    # -- wires

    def _lane(self, number: int) -> float:
        return self.right + 20 + self._pitch * number

    def _meets(self, tap: Tap) -> float:
        """Give the height at which a wire meets a box: the middle of an edge."""
        node, top = self._rows[tap.row], self.tops[tap.row]
        return top + (_edge(node) / 2 if tap.side == "input" else _height(node) - _edge(node) / 2)

    def _wire(self, wire: Wire) -> Markup:
        """Draw the vertical of a group, and the horizontals to boxes on whose side it is alone."""
        across, colour = pixels(self._lane(wire.lane)), self._legend.colour[wire.group]
        heights = [self._meets(tap) for tap in wire.taps]
        alone = [tap for tap in wire.taps if len(self._rows[tap.row].groups(tap.side)) == 1]
        path = f"M{across} {pixels(min(heights))}V{pixels(max(heights))}"
        path += "".join(f"M{pixels(self.right)} {pixels(self._meets(tap))}H{across}" for tap in alone)
        dashes = Markup(' stroke-dasharray="5 2.5"') if wire.group in self._legend.inexact else ""
        line = Markup('<path d="{}" fill="none" stroke="{}" stroke-width="1.8"{}>{}</path>{}')
        return line.format(path, colour, dashes, hint([wire.group]), self._ends(alone, colour))

    def _bundles(self) -> Iterator[Markup]:
        """Draw one grey line where several groups live on one side of a box, out to the farthest of their wires."""
        outward = sorted(self._wires, key=lambda wire: wire.lane)
        far = {tap: self._lane(wire.lane) for wire in outward for tap in wire.taps}
        many = [tap for tap in sorted(far) if len(self._rows[tap.row].groups(tap.side)) > 1]
        path = "".join(f"M{pixels(self.right)} {pixels(self._meets(tap))}H{pixels(far[tap])}" for tap in many)
        yield Markup('<path d="{}" stroke="{}" stroke-width="1.2"/>{}').format(path, FAINT, self._ends(many, FAINT))

    def _ends(self, taps: Iterable[Tap], colour: str) -> Markup:
        """Draw an arrow into every input and a dot at every output."""
        arrow, dot = "M{0} {1}l8 -3.6v7.2z", "M{0} {1}a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z"
        marks = (
            (arrow if tap.side == "input" else dot).format(pixels(self.right), pixels(self._meets(tap))) for tap in taps
        )
        return Markup('<path d="{}" fill="{}"/>').format("".join(marks), colour)

    def _dots(self, wire: Wire) -> Markup:
        """Draw where a wire is met: a line without length and with round ends is a dot."""
        across = pixels(self._lane(wire.lane))
        dots = "".join(f"M{across} {pixels(self._meets(tap))}h0" for tap in wire.taps)
        mark = Markup('<path d="{}" stroke="{}" stroke-width="4.4" stroke-linecap="round"/>')
        return mark.format(dots, self._legend.colour[wire.group])


def _hints(node: Node) -> list[str]:
    """Give what a box says on hover."""
    sides = {"channels": node.outputs} if node.slim else {"output": node.outputs, "input": node.inputs}
    lived = [f"{side}: {', '.join(_lives(stripe) for stripe in stripes)}" for side, stripes in sides.items()]
    frozen = [f"{each.tensor} dimension {each.dim} is frozen: {each.reason}" for each in node.frozen]
    return [f"{node.name} {_shape(node)}", *lived, *frozen, f"tensors: {', '.join(node.tensors)}"]


def _lives(stripe: Stripe) -> str:
    return f"{stripe.share} of {stripe.group}" if stripe.group else f"{stripe.share} frozen"


def _height(node: Node) -> int:
    return 14 if node.slim else 25


def _edge(node: Node) -> int:
    """Give how thick the coloured edges are."""
    return 3 if node.slim else 4


def _shape(node: Node) -> str:
    return "×".join(map(str, node.shape))
