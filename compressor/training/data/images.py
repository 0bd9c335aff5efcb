"""Where the pixels of a data set are: in memory, or in files that are decoded when asked for.

Shape letters: B images of a batch, C channels, H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from compressor.errors import DataError

Progress = Callable[[int, int], None]  # done, total
RESIDENT_BYTES = 2 * 2**30  # a larger data set stays on disk and is decoded batch by batch
CHUNK = 256  # images handled at once where all of them are gone through


class Images(Protocol):
    """Images of one size, wherever they are."""

    shape: tuple[int, int, int]

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def take(self, indices: Tensor, device: torch.device) -> Tensor:
        """Return the images `indices` `(B,)` as `(B, C, H, W)` uint8 on the device."""
        ...


class Resident:
    """Images in memory; they move to the device that asks for them and stay there."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels
        channels, height, width = pixels.shape[1:]
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.pixels)

    def take(self, indices: Tensor, device: torch.device) -> Tensor:
        """Return the images `indices` `(B,)` as `(B, C, H, W)` uint8 on the device."""
        self.pixels = self.pixels.to(device)  # once: afterwards no batch crosses the bus
        return self.pixels[indices.to(device)]


class OnDisk:
    """Image files, decoded by a few threads whenever they are asked for."""

    def __init__(self, paths: Sequence[Path], size: tuple[int, int]) -> None:
        self.paths = paths
        self.shape = (3, *size)
        # Threads do: PIL lets go of Python's lock while it decodes, and nothing has to be copied between processes.
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count())
        self.transparent: Path | None = None  # one of those that were put on white, if there are any

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def take(self, indices: Tensor, device: torch.device) -> Tensor:
        """Return the images `indices` `(B,)` as `(B, C, H, W)` uint8 on the device; DataError names a broken one."""
        paths = [self.paths[index] for index in indices.tolist()]
        decoded = list(self._pool.map(partial(decode, size=self.shape[1:]), paths))
        for path, (_, is_transparent) in zip(paths, decoded, strict=True):
            self.transparent = self.transparent or (path if is_transparent else None)
        return torch.stack([pixels for pixels, _ in decoded]).to(device)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open an image with PIL; whatever PIL cannot read, inside the block as well, becomes a DataError with its path."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    # SyntaxError is what PIL raises for a PNG whose blocks are broken.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read image {path}: {error}; repair or remove it") from error


def upright_size(image: Any) -> tuple[int, int]:
    """Return height and width of a PIL image as a viewer shows it: cameras store how they were held."""
    is_turned = image.getexif().get(_EXIF_ORIENTATION, 1) >= 5
    return (image.width, image.height) if is_turned else (image.height, image.width)


_EXIF_ORIENTATION = 0x0112


def decode(path: Path, size: tuple[int, int]) -> tuple[Tensor, bool]:
    """Read one image as `(3, H, W)` uint8: upright, on white, short side to the size, then the centre.

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
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1), is_transparent


def _on_white(image: Any) -> Any:
    from PIL import Image

    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
