"""SVG marks, for pictures that stand on their own and for those that a page's style sheet colours.

How a mark looks is the caller's: attributes by keyword, `_` for `-`, and `class_` where a style sheet says it.

    line(0, 4, 10, 4, class_="grid")            <line class="grid" x1="0" y1="4" x2="10" y2="4"/>
    line(0, 4, 10, 4, stroke="#1c2330")         <line stroke="#1c2330" x1="0" y1="4" x2="10" y2="4"/>

Everything that is given as a plain text is escaped, so that no name of a module can become markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from markupsafe import Markup

Value = str | float

# Control characters and lone surrogates: no escape makes them legal in XML.
_NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def element(tag: str, *children: str, **attributes: Value) -> Markup:
    """Return one element with its attributes in the order in which they were given, and its children inside."""
    # `Markup.format` escapes what it is given, be it an attribute's value or a text.
    written = Markup("").join(
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), _value(value))
        for name, value in attributes.items()
    )
    if not children:
        return Markup("<{}{}/>").format(tag, written)
    return Markup("<{}{}>{}</{}>").format(tag, written, join(children), tag)


def line(x1: float, y1: float, x2: float, y2: float, *children: Markup, **style: Value) -> Markup:
    """Draw a straight line."""
    return element("line", *children, **style, x1=x1, y1=y1, x2=x2, y2=y2)


def polyline(points: Sequence[tuple[float, float]], **style: Value) -> Markup:
    """Draw a line through points."""
    return element("polyline", **style, points=" ".join(f"{pixels(x)},{pixels(y)}" for x, y in points))


def rectangle(x: float, y: float, width: float, height: float, **style: Value) -> Markup:
    """Draw a rectangle."""
    return element("rect", **style, x=x, y=y, width=max(width, 0.0), height=height)


def circle(x: float, y: float, radius: float, *children: Markup, **style: Value) -> Markup:
    """Draw a circle around a point."""
    return element("circle", *children, **style, cx=x, cy=y, r=radius)


def path(commands: str, *children: Markup, **style: Value) -> Markup:
    """Draw whatever the path commands say."""
    return element("path", *children, **style, d=commands)


def text(x: float, y: float, words: str, anchor: str = "start", **style: Value) -> Markup:
    """Write words that begin, end or have their middle there."""
    return element("text", words, **style, x=x, y=y, text_anchor=anchor)


def group(*marks: Markup, **style: Value) -> Markup:
    """Put marks together; a `hint` among them is that of all."""
    return element("g", *marks, **style)


def hint(words: str) -> Markup:
    """Return what a browser shows while the pointer rests on the mark around it."""
    return element("title", words)


def join(marks: Iterable[str]) -> Markup:
    """Put marks one behind the other; what is no markup yet is escaped."""
    return Markup("").join(mark if isinstance(mark, Markup) else _NOT_XML.sub("\ufffd", mark) for mark in marks)


def pixels(length: float) -> str:
    """Return a length with one decimal, or none: a picture with thousands of marks is half as large for it."""
    return f"{length:.1f}".removesuffix(".0")


def _value(value: Value) -> str:
    return _NOT_XML.sub("\ufffd", value) if isinstance(value, str) else pixels(value)
