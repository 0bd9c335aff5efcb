"""Pixels in, probabilities out: normalisation and softmax as a part of the network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compressor.errors import InputError


class WithPreprocessing(nn.Module):
    """A classifier that takes images as they lie in memory, and says how likely each class is.

    Args:
        model: takes normalised images `(B, C, H, W)`, returns scores `(B, classes)`.
        mean, std: per channel, of pixel values from 0 to 255.

    Raises:
        InputError: not one mean and one deviation above zero for each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not mean or len(mean) != len(std) or min(std) <= 0:
            raise InputError(
                f"mean {list(mean)} and std {list(std)}: give one number for each channel, in pixel values from 0 to "
                "255, deviations above 0"
            )
        self.model = model
        dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
        self.register_buffer("mean", torch.tensor(mean, dtype=dtype).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=dtype).view(-1, 1, 1), persistent=False)
        self.to(next((each.device for each in model.parameters()), torch.device("cpu")))

    def forward(self, images: Tensor) -> Tensor:
        """Take `(B, H, W, C)` uint8, return `(B, classes)` that sum to 1."""
        pixels = images.permute(0, 3, 1, 2).to(self.mean.dtype)
        scores: Tensor = self.model((pixels - self.mean) / self.std)
        return scores.softmax(1)
