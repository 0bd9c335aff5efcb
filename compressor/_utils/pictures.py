"""Image files become pixels in one way, for training and for a deployed file: what differs there costs accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)  # of an animation the first picture
_EXIF_ORIENTATION = 0x0112


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open an image with PIL; whatever PIL cannot read, inside the block as well, becomes a DataError with its path."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    # SyntaxError is what PIL raises for a PNG whose blocks are broken.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, ImportError) as error:
        # Ultralytics puts an opener of its own in PIL's place, which looks for a plugin where PIL gives up.
        cause = error.__context__ if isinstance(error, ImportError) and error.__context__ else error
        raise DataError(f"cannot read image {path}: {cause}; repair or remove it") from error


def upright_size(image: Any) -> tuple[int, int]:
    """Return height and width of a PIL image as a viewer shows it: cameras store how they were held."""
    is_turned = image.getexif().get(_EXIF_ORIENTATION, 1) >= 5
    return (image.width, image.height) if is_turned else (image.height, image.width)


def decode(path: Path, size: tuple[int, int]) -> tuple[np.ndarray[Any, Any], bool]:
    """Read one image as `(H, W, 3)` uint8: upright, on white, short side to the size, then the centre.

    Returns:
        The pixels, and whether it has transparent parts.
    """
    from PIL import Image, ImageOps

    with opened(path) as image:
        # PIL's convert("RGB") would clip 16-bit values to 255: nearly every pixel white, and nothing said.
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{path} has more than 8 bits a channel (mode {image.mode}): convert it to 8 bits")
        image = ImageOps.exif_transpose(image)
        is_transparent = image.has_transparency_data
        # PIL would drop transparency, and the colours that it hides would appear.
        picture = _on_white(image) if is_transparent else image.convert("RGB")
    if picture.size != size[::-1]:
        picture = ImageOps.fit(picture, size[::-1], Image.Resampling.BILINEAR)
    return np.array(picture), is_transparent


def _on_white(image: Any) -> Any:
    from PIL import Image

    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
