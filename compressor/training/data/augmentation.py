"""Images that differ a little every time: moved, cut out, mirrored, of other colours.

Whatever is drawn depends on the generator alone, and is drawn for the whole batch: an image looks alike whoever of
several processes reads it. Shape letters: B images of a batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Rows = Callable[[Tensor], Tensor]  # of a tensor with a row for every image of a batch, those that are wanted


@dataclass(frozen=True)
class Augmentation:
    """How much images may differ.

    Attributes:
        crop: the smallest share of the area that a random part has, which is resized to the whole (Szegedy et al.,
            arXiv 1409.4842; 0.08 is usual for photographs); 0 moves the image instead, by a few pixels.
        jitter: the largest change of brightness, contrast and saturation: 0.4 draws factors from 0.6 to 1.4.
    """

    crop: float = 0.0
    jitter: float = 0.0

    def __call__(
        self, pixels: Tensor, rows: Rows, count: int, shift: int, mirror: bool, draw: torch.Generator
    ) -> Tensor:
        """Return the wanted images of a batch, augmented.

        Args:
            pixels: `(B, C, H, W)` uint8, the wanted ones.
            rows: which of the batch they are.
            count: images of the whole batch.
            shift: how far an image is moved each way at most, in pixels.
            mirror: whether every other image is mirrored.
            draw: CPU generator.
        """
        if not self.crop:
            pixels = _moved(pixels, shift, *map(rows, _drawn_moves(count, shift, mirror, draw)))
        if not self.crop and not self.jitter:
            return pixels
        seeds = rows(torch.randint(2**31, (count,), generator=draw))
        return self._by_torchvision(pixels, seeds, mirror and self.crop > 0)

    def _by_torchvision(self, pixels: Tensor, seeds: Tensor, mirror: bool) -> Tensor:
        from torchvision.transforms import v2

        size = pixels.shape[-2:]
        steps = [v2.RandomResizedCrop(size, (self.crop, 1.0), antialias=True)] if self.crop else []
        steps += [v2.RandomHorizontalFlip()] if mirror else []
        steps += [v2.ColorJitter(self.jitter, self.jitter, self.jitter)] if self.jitter else []
        transform = v2.Compose(steps)
        made = []
        # NOTE: torchvision draws from the global generator, which hooks draw from as well: it is put back.
        with torch.random.fork_rng(devices=[]):
            for image, seed in zip(pixels, seeds.tolist(), strict=True):
                torch.default_generator.manual_seed(seed)
                made.append(transform(image))
        return torch.stack(made)


def _drawn_moves(count: int, shift: int, mirror: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return for every image the offsets of its rows and columns, and whether it is mirrored, `(B, 1)` each."""
    # Drawn on the CPU whatever the device is: a run on a GPU sees the images that a run on the CPU sees.
    down, right = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
    return down, right, torch.randint(0, 1 + mirror, (count, 1), generator=generator).bool()


def _moved(pixels: Tensor, shift: int, down: Tensor, right: Tensor, mirrored: Tensor) -> Tensor:
    """Move every image by its own offset over a black border, and mirror some: one gather.

    A worked example: one row `a b c d` and shift 1 has the border `0 a b c d 0`. Offset 0 reads it from its first
    place on, `0 a b c`; offset 1 is the image itself; offset 2 is `b c d 0`, and mirrored `0 d c b`.
    """
    count, _, height, width = pixels.shape
    rows = torch.arange(height) + down
    columns = torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width)) + right
    images, rows, columns = (index.to(pixels.device) for index in (torch.arange(count), rows, columns))
    padded = F.pad(pixels, [shift] * 4)
    picked = padded[images[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return picked.permute(0, 3, 1, 2).contiguous()
