"""The legend of a channel graph's picture: every group with its colour, size and costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from compressor.report.svg import FAINT, LETTER, colours, hint, joined, rectangle, text
from compressor.report.tables import count

LINE = 16  # height of a line
LONGEST = 46  # letters of a name that are shown
_FROZEN = "#b4b4b4"
_COLUMNS = {"channels": 9, "exact": 16, "params each": 29, "MACs each": 41}  # where each ends, in letters


class Legend:
    """How each group looks, and the table that says so.

    Args:
        found: the graph's `compressor.report.inspection.inspection`.

    Attributes:
        colour: by group name.
        inexact: groups for which silencing a channel is not cutting it, each with its number.
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
        """Give how a group's stripes are filled; None for what is frozen."""
        if group is None:
            return _FROZEN
        return f"url(#inexact-{self.inexact[group]})" if group in self.inexact else self.colour[group]

    def patterns(self) -> Iterator[Markup]:
        """Define the hatching of the inexact groups."""
        hatch = Markup(
            '<pattern id="inexact-{}" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
            '<rect width="5" height="5" fill="{}"/><rect width="2" height="5" fill="#ffffff"/></pattern>'
        )
        for name, number in self.inexact.items():
            yield hatch.format(number, self.colour[name])

    def table(self, left: float, top: float) -> Iterator[Markup]:
        """Draw the table with its upper left corner there."""
        ends = [left + 20 + LETTER * (self._letters + letters) for letters in _COLUMNS.values()]
        yield text(left, top, "group", fill=FAINT)
        yield from (text(end, top, head, fill=FAINT, anchor="end") for end, head in zip(ends, _COLUMNS, strict=True))
        for number, group in enumerate(self._groups):
            yield self._line(group, left, ends, top + LINE * (number + 1))
        last = top + LINE * (len(self._groups) + 1)
        note = f"frozen: {self._frozen:,} positions that cannot be cut" if self._frozen else "nothing is frozen"
        yield rectangle(left, last - 9, 12, 10, _FROZEN) + text(left + 20, last, note)

    def _line(self, group: Mapping[str, Any], left: float, ends: Sequence[float], down: float) -> Markup:
        costs = [count(group["params_per_channel"]), count(group["macs_per_channel"])]
        values = [str(group["channels"]), "yes" if group["exact"] else "no", *costs]
        line = joined(
            [
                hint([group["name"], *_cut_together(group)]),
                rectangle(left, down - 9, 12, 10, self.fill(group["name"])),
                text(left + 20, down, shown(group["name"])),
                *(text(end, down, value, anchor="end") for end, value in zip(ends, values, strict=True)),
            ]
        )
        return Markup("<g>{}</g>").format(line)


def shown(name: str) -> str:
    """Shorten a long name; its end tells more than its beginning."""
    return name if len(name) <= LONGEST else "…" + name[1 - LONGEST :]


def _cut_together(group: Mapping[str, Any]) -> Iterator[str]:
    for role, verb in (("producer", "written by"), ("consumer", "read by")):
        tensors = [member["tensor"] for member in group["members"] if member["role"] == role]
        if tensors:
            yield f"{verb} {', '.join(tensors)}"
