"""Mixup and CutMix, as torchvision has them: images mixed with others of their batch, and their classes with them.

A worked example: a share of 0.7 is drawn. Mixup makes 0.7 of one image and 0.3 of the one before it, pixel by pixel;
CutMix puts a box of 0.3 of the area of that one into it. Either counts 0.7 of the one class and 0.3 of the other.

Source: Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mix(
    images: Tensor, targets: Tensor, classes: int, *, mixup: float, cutmix: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return mixed images and the shares of their classes.

    Args:
        images: `(B, C, H, W)` float.
        targets: `(B,)` class indices.
        classes: how many there are.
        mixup, cutmix: alpha of the Beta distribution that each draws its shares from, not both 0. One with 0 is not
            used; of two, one is drawn for each batch.
        generator: what is drawn depends on it alone, and it moves on by one number.

    Returns:
        Images as given, and `(B, classes)` float shares that sum to 1.
    """
    from torchvision.transforms import v2

    ways = [
        way(alpha=alpha, num_classes=classes) for way, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 0
    ]
    seed = int(torch.randint(2**31, (), generator=generator))
    # NOTE: torchvision draws from the global generator, which hooks draw from as well: it is put back.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        mixed, shares = v2.RandomChoice(ways)(images, targets)
    return mixed, shares
