"""A part of a data set: its batches, normalised and augmented on the device, and how a part is split.

Shape letters: B images of a batch, C channels, H height, W width, N images of a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.errors import DataError, InputError
from compressor.training.data.images import CHUNK, Images, Progress, Resident


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a data set: images, what they show, and how they are normalised and augmented.

    Attributes:
        images: where the pixels are; parts of one data set may share them.
        indices: `(N,)` int64, which of those images belong to this part.
        targets: `(N,)` int64, class indices.
        mean, std: per channel, in pixel values from 0 to 255, of the training part: every part has the same.
        shift: augmentation moves an image by up to so many pixels each way.
        mirror: whether augmentation flips left and right.
    """

    images: Images
    indices: Tensor
    targets: Tensor
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    shift: int = 0
    mirror: bool = False

    @staticmethod
    def of(images: Images, targets: Tensor, start: int = 0) -> Part:
        """Give the part of consecutive images that begins at index `start`, not normalised yet."""
        return Part(images, torch.arange(start, start + len(targets)), targets.long())

    def __len__(self) -> int:
        """Give `N`, the number of images."""
        return len(self.indices)

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: torch.Generator | None = None,
        augment: bool = False,
        device: str | torch.device = "cpu",
        drop_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through the part once.

        Args:
            batch_size: images in a batch; the last batch may have fewer.
            shuffle: CPU generator of the order and of the augmentation; None keeps the order. Its state is all the
                randomness there is: the same state gives the same batches on every device.
            augment: move (and mirror) images at random; needs `shuffle`.
            device: where the batches are made.
            drop_last: leave an incomplete last batch out.

        Yields:
            Normalised images `(B, C, H, W)` float32, and class indices `(B,)` int64.

        Raises:
            InputError: augmentation without a generator.
            DataError: an image on disk that became unreadable.
        """
        if augment and shuffle is None:
            raise InputError("augment=True draws at random: pass shuffle=torch.Generator() as well")
        order = torch.arange(len(self)) if shuffle is None else torch.randperm(len(self), generator=shuffle)
        if drop_last:
            order = order[: len(self) - len(self) % batch_size]
        for chosen in torch.split(order, batch_size):
            pixels = self.images.take(self.indices[chosen], torch.device(device))
            if augment and shuffle is not None:
                pixels = _augmented(pixels, self.shift, self.mirror, shuffle)
            yield self._normalised(pixels), self.targets[chosen].to(device)

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(values, device=pixels.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return pixels.float().sub_(mean).div_(std)


def _augmented(pixels: Tensor, shift: int, mirror: bool, generator: torch.Generator) -> Tensor:
    """Move every image by its own random offset over a black border, and mirror every other one: one gather."""
    count, _, height, width = pixels.shape
    offsets = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
    mirrored = torch.randint(0, 1 + mirror, (count, 1), generator=generator).bool()
    rows = torch.arange(height) + offsets[0]
    columns = torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width)) + offsets[1]
    images, rows, columns = (index.to(pixels.device) for index in (torch.arange(count), rows, columns))
    padded = F.pad(pixels, [shift] * 4)
    picked = padded[images[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return picked.permute(0, 3, 1, 2).contiguous()


def split(part: Part, share: float, seed: int, classes: Sequence[str]) -> tuple[Part, Part]:
    """Split every class at random: what stays, and the share that is held out; each has at least one image."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(part), dtype=torch.bool)
    for target, name in enumerate(classes):
        members = (part.targets == target).nonzero().flatten()
        if len(members) < 2:
            raise DataError(f"class {name!r} has {len(members)} training image: it needs 2 or more, one is held out")
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    stay, out = (replace(part, indices=part.indices[mask], targets=part.targets[mask]) for mask in (~held, held))
    return stay, out


def moments(part: Part) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Give mean and standard deviation of each channel; of 2,000 images spread over the part if they are on disk."""
    stride = 1 if isinstance(part.images, Resident) else max(1, len(part) // 2000)
    counts = torch.zeros(part.images.shape[0], 256, dtype=torch.int64)
    for indices in torch.split(part.indices[::stride], CHUNK):
        pixels = part.images.take(indices, torch.device("cpu"))
        counts += torch.stack([channel.flatten().bincount(minlength=256) for channel in pixels.unbind(1)])
    weights, levels = counts.double() / counts.sum(1, keepdim=True), torch.arange(256, dtype=torch.float64)
    mean = weights @ levels
    variance = (weights * (levels - mean[:, None]) ** 2).sum(1)
    return tuple(mean.tolist()), tuple(variance.sqrt().clamp_min(1).tolist())


@dataclass(frozen=True)
class Request:
    """What a loader in `DATASETS` is told; see `load`."""

    path: str
    image_size: int | None
    root: Path
    download: bool
    on_progress: Progress


@dataclass(frozen=True, eq=False)
class Found:
    """What a loader in `DATASETS` gives: parts that are neither normalised nor augmented yet.

    Attributes:
        classes: their names.
        train, test: the parts.
        validation: None where it is still to be taken out of `train`.
        natural: whether a mirrored image, moved by an eighth of its size, is still of its class.
    """

    classes: tuple[str, ...]
    train: Part
    test: Part
    validation: Part | None = None
    natural: bool = True
