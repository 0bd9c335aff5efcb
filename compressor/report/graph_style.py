"""How a channel graph's picture looks: colours and type, written on every mark.

The picture is a file of its own and may also stand in a page: a style sheet of its own would colour that page as well.
"""

from __future__ import annotations

import colorsys
from typing import Any

INK, FAINT = "#1c2330", "#6b7280"
FROZEN = "#b4b4b4"
LETTER = 6.3  # width of one letter of the typeface, at 10.5 pixels

PLAIN: dict[str, Any] = {"font_size": 10.5, "fill": INK}
QUIET: dict[str, Any] = {"font_size": 10.5, "fill": FAINT}

_TONES = ((0.45, 0.75), (0.56, 0.60), (0.33, 0.80), (0.47, 0.90))  # lightness, saturation


def colours(number: int) -> list[str]:
    """Return that many different colours, legible on white; neighbours are far apart.

    Each hue is the golden angle on from the one before: 0.58, 0.96, 0.34, 0.73, ... of the circle. However many there
    are, the next falls into the widest gap left, and no number of groups has to be known beforehand.
    """
    return [_hex(0.58 + index * 0.381966, *_TONES[index % len(_TONES)]) for index in range(number)]


def _hex(hue: float, lightness: float, saturation: float) -> str:
    red, green, blue = colorsys.hls_to_rgb(hue % 1, lightness, saturation)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
