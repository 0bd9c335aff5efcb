"""Decoded images in one file, so that each is decoded once, by whichever run comes first.

    HASH.images    (N, 2) numbers: size and time of change that an image file had when it was decoded, 0 before;
                   behind them (N, C, H, W) bytes, a hole where an image was not decoded yet

One file, so that no stamp is ever left without its pixels. Several processes may read and write it at once: what two of
them write at one place is the same.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compressor._utils import atomic_write
from compressor.errors import InputError
from compressor.training.data.images import OnDisk


class Cached:
    """Images on disk whose pixels are kept in a folder.

    Args:
        images: where they come from the first time, and again after a file has changed.
        folder: where the file is; made if need be.

    Raises:
        InputError: the folder cannot be written, or the disk has no room for the pixels.
    """

    is_slow = True

    def __init__(self, images: OnDisk, folder: Path) -> None:
        self._images = images
        self.shape = images.shape
        listed = "\n".join([str(self.shape), *(str(path.resolve()) for path in images.paths)])
        name = hashlib.sha256(listed.encode()).hexdigest()[:20]
        found = [path.stat() for path in images.paths]
        self._now = np.array([[each.st_size, each.st_mtime_ns] for each in found], dtype=np.int64)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._stamps, self._pixels = _arrays(folder / f"{name}.images", self._now.shape, self.shape)
        except OSError as error:
            raise InputError(
                f"cannot keep images in {folder}: {error.strerror or error}; give --cache another folder"
            ) from error

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images)

    @property
    def transparent(self) -> Path | None:
        """One of the images that were put on white just now, if there are any."""
        return self._images.transparent

    def unread(self) -> Tensor:
        """Return the indices of the images that are not kept as they are now."""
        return torch.from_numpy((self._stamps != self._now).any(1).nonzero()[0])

    def take(self, indices: Tensor, device: torch.device) -> Tensor:
        """Return the images `indices` `(B,)` as `(B, C, H, W)` uint8 on the device; DataError names a broken one."""
        wanted = indices.numpy()
        missing = np.unique(wanted[(self._stamps[wanted] != self._now[wanted]).any(1)])
        if len(missing):
            self._pixels[missing] = self._images.take(torch.from_numpy(missing), torch.device("cpu")).numpy()
            self._stamps[missing] = self._now[missing]  # last: whoever sees it may read the pixels
        return torch.from_numpy(self._pixels[wanted]).to(device)


def _arrays(path: Path, stamps: tuple[int, ...], image: tuple[int, ...]) -> tuple[np.memmap, np.memmap]:
    """Return the stamps and the pixels in a file, of zeros where nothing was written yet."""
    pixels = (stamps[0], *image)
    offset = math.prod(stamps) * np.dtype(np.int64).itemsize
    size = offset + math.prod(pixels)
    if not path.exists() or path.stat().st_size != size:
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(f"{size / 2**30:.1f} GiB are needed, and the disk has less")
        # Renamed when it has its size: another process never finds a shorter one, nor loses the one that it has open.
        with atomic_write(path) as part, part.open("wb") as file:
            file.truncate(size)
    return np.memmap(path, np.int64, "r+", shape=stamps), np.memmap(path, np.uint8, "r+", offset, pixels)
