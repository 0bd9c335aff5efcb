"""Decoded images in one file, so that each is decoded once, by whichever run comes first.

    PATHS-AND-SIZE.pixels    (N, C, H, W) bytes, a hole where an image was not decoded yet
    PATHS-AND-SIZE.stamps    (N, 2) numbers: size and time of change that an image file had when it was decoded

Several processes may read and write it at once: what two of them write at one place is the same.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.training.data.images import OnDisk


class Kept:
    """Images on disk whose pixels are kept in a folder.

    Args:
        images: where they come from the first time, and again after a file has changed.
        folder: where the two files are; made if need be.

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
            self._pixels = _file(folder / f"{name}.pixels", np.uint8, (len(images), *self.shape))
            self._stamps = _file(folder / f"{name}.stamps", np.int64, self._now.shape)
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


def _file(path: Path, kind: type, shape: tuple[int, ...]) -> np.memmap:
    """Return an array in a file, of zeros where nothing was written yet."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    if not path.exists() or path.stat().st_size != size:
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(f"{size / 2**30:.1f} GiB are needed, and the disk has less")
        with path.open("wb") as file:
            file.truncate(size)
    return np.memmap(path, kind, "r+", shape=shape)
