"""The legend of a channel graph's picture: every group with its colour, size and costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from compressor.report.graph_style import FROZEN, LETTER, PLAIN, QUIET, colours
from compressor.report.svg import element, group, hint, rectangle, text
from compressor.report.tables import count

LINE = 16  # height of a line
LONGEST = 46  # letters of a name that are shown
_COLUMNS = {"channels": 9, "exact": 16, "params each": 29, "MACs each": 41}  # where each ends, in letters


class Legend:
    """How each group looks, and the table that says so.

    Args:
        found: the graph's `compressor.report.inspect_graph`.

    Attributes:
        colour: by group name.
        inexact: groups for which masking a channel is not cutting it, each with its number.
        width: of the table, in pixels.
    """

    def __init__(self, found: Mapping[str, Any]) -> None:
        self._groups: Sequence[Mapping[str, Any]] = found["groups"]
        names = [group["name"] for group in self._groups]
        self.colour = dict(zip(names, colours(len(names)), strict=True))
        self.inexact = {group["name"]: number for number, group in enumerate(self._groups) if not group["exact"]}
        self._frozen = sum(each["count"] for each in found["frozen"])
        self._letters = max((len(shown(name)) for name in names), default=10)
        self.width = 30 + LETTER * (self._letters + 42)
        self.height = LINE * (len(names) + 2)

    def fill(self, group: str | None) -> str:
        """Return how a group's stripes are filled; None for what is frozen."""
        if group is None:
            return FROZEN
        return f"url(#inexact-{self.inexact[group]})" if group in self.inexact else self.colour[group]

    def patterns(self) -> Iterator[Markup]:
        """Define the hatching of the inexact groups."""
        turned = {"patternUnits": "userSpaceOnUse", "patternTransform": "rotate(45)"}
        for name, number in self.inexact.items():
            ground = element("rect", width=5, height=5, fill=self.colour[name])
            stripe = element("rect", width=2, height=5, fill="#ffffff")
            # By number: a group's name may hold what no id and no url(...) may.
            yield element("pattern", ground, stripe, id=f"inexact-{number}", width=5, height=5, **turned)

    def table(self, left: float, top: float) -> Iterator[Markup]:
        """Draw the table with its upper left corner there."""
        ends = [left + 20 + LETTER * (self._letters + letters) for letters in _COLUMNS.values()]
        yield text(left, top, "group", **QUIET)
        yield from (text(end, top, head, "end", **QUIET) for end, head in zip(ends, _COLUMNS, strict=True))
        for number, found in enumerate(self._groups):
            yield self._line(found, left, ends, top + LINE * (number + 1))
        last = top + LINE * (len(self._groups) + 1)
        note = f"frozen: {self._frozen:,} positions that cannot be cut" if self._frozen else "nothing is frozen"
        yield rectangle(left, last - 9, 12, 10, fill=FROZEN)
        yield text(left + 20, last, note, **PLAIN)

    def _line(self, found: Mapping[str, Any], left: float, ends: Sequence[float], down: float) -> Markup:
        costs = [count(found["params_per_channel"]), count(found["macs_per_channel"])]
        values = [str(found["channels"]), "yes" if found["exact"] else "no", *costs]
        return group(
            hint("\n".join([found["name"], *_cut_together(found)])),
            rectangle(left, down - 9, 12, 10, fill=self.fill(found["name"])),
            text(left + 20, down, shown(found["name"]), **PLAIN),
            *(text(end, down, value, "end", **PLAIN) for end, value in zip(ends, values, strict=True)),
        )


def shown(name: str) -> str:
    """Shorten a long name; its end tells more than its beginning."""
    return name if len(name) <= LONGEST else "…" + name[1 - LONGEST :]


def _cut_together(found: Mapping[str, Any]) -> Iterator[str]:
    for role, verb in (("producer", "written by"), ("consumer", "read by")):
        tensors = [member["tensor"] for member in found["members"] if member["role"] == role]
        if tensors:
            yield f"{verb} {', '.join(tensors)}"
