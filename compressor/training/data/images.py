"""Where the pixels of a data set are: in memory, or in files that are decoded when asked for.

Shape letters: B images of a batch, C channels, H height, W width.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from compressor._utils import decode

Progress = Callable[[int, int], None]  # done, total
RESIDENT_BYTES = 2 * 2**30  # a larger data set stays on disk and is decoded batch by batch
CHUNK = 256  # images handled at once where all of them are gone through
_AHEAD = 2  # batches that wait, decoded, while one is used


class Images(Protocol):
    """Images of one size, wherever they are.

    Attributes:
        shape: of each, `(C, H, W)`.
        is_slow: whether it takes long to take some, so that it is worth while to do so ahead of time.
    """

    shape: tuple[int, int, int]
    is_slow: bool

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def take(self, indices: Tensor, device: torch.device) -> Tensor:
        """Return the images `indices` `(B,)` as `(B, C, H, W)` uint8 on the device."""
        ...


def take_ahead(images: Images, batches: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Take one batch after the other; slow ones while those before them are used."""
    if not images.is_slow:
        yield from (images.take(indices, device) for indices in batches)
        return
    with ThreadPoolExecutor(1) as reader:
        waiting = deque[Future[Tensor]]()
        try:
            for indices in batches:
                waiting.append(reader.submit(images.take, indices, device))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:  # whoever goes through some batches only waits for no more than one
                each.cancel()


class Resident:
    """Images in memory; they move to the device that asks for them and stay there."""

    is_slow = False

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

    is_slow = True

    def __init__(self, paths: Sequence[Path], size: tuple[int, int]) -> None:
        self.paths = paths
        self.shape = (3, *size)
        # Threads do: PIL lets go of Python's lock while it decodes, and nothing has to be copied between processes.
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count())
        self.transparent: Path | None = None  # one of those that were put on white, if there are any

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def unread(self) -> Tensor:
        """Return the indices of the images that nobody has decoded: all."""
        return torch.arange(len(self))

    def take(self, indices: Tensor, device: torch.device) -> Tensor:
        """Return the images `indices` `(B,)` as `(B, C, H, W)` uint8 on the device; DataError names a broken one."""
        paths = [self.paths[index] for index in indices.tolist()]
        decoded = list(self._pool.map(partial(decode, size=self.shape[1:]), paths))
        for path, (_, is_transparent) in zip(paths, decoded, strict=True):
            self.transparent = self.transparent or (path if is_transparent else None)
        return torch.stack([torch.from_numpy(pixels).permute(2, 0, 1) for pixels, _ in decoded]).to(device)
