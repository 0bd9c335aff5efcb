"""Marks of an SVG that stands on its own: every colour is written on the mark, so no page's style sheet is touched."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Iterable

from markupsafe import Markup

INK, FAINT = "#1c2330", "#6b7280"
LETTER = 6.3  # width of one letter of the typeface, at 10.5 pixels

_NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TONES = ((0.45, 0.75), (0.56, 0.60), (0.33, 0.80), (0.47, 0.90))  # lightness, saturation


def colours(number: int) -> list[str]:
    """Give that many different colours, legible on white; neighbours are far apart (their hues by the golden angle)."""
    return [_hex(0.58 + index * 0.381966, *_TONES[index % len(_TONES)]) for index in range(number)]


def _hex(hue: float, lightness: float, saturation: float) -> str:
    red, green, blue = colorsys.hls_to_rgb(hue % 1, lightness, saturation)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def pixels(length: float) -> str:
    """Give a length with one decimal, or none."""
    return f"{length:.1f}".removesuffix(".0")


def text(x: float, y: float, words: str, *, size: float = 10.5, fill: str = INK, anchor: str = "start") -> Markup:
    """Write words, with what no XML file may hold replaced."""
    mark = Markup('<text x="{}" y="{}" font-size="{}" fill="{}" text-anchor="{}">{}</text>')
    return mark.format(pixels(x), pixels(y), size, fill, anchor, _NOT_XML.sub("\ufffd", words))


def hint(lines: Iterable[str]) -> Markup:
    """Give what a browser shows while the pointer rests on the mark around it."""
    return Markup("<title>{}</title>").format(_NOT_XML.sub("\ufffd", "\n".join(lines)))


def rectangle(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> Markup:
    """Draw a filled rectangle, with or without an outline."""
    mark = Markup('<rect x="{}" y="{}" width="{}" height="{}" fill="{}" stroke="{}"/>')
    return mark.format(*map(pixels, (x, y, width, height)), fill, stroke)


def joined(marks: Iterable[Markup]) -> Markup:
    """Put marks one behind the other."""
    return Markup("").join(marks)
