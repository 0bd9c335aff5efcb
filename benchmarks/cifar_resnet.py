"""The ResNets for 32x32 images of He et al. 2015 (arXiv 1512.03385, section 4.2), and trained weights for them.

Weights are not shipped: those of Yerlan Idelbayev's pytorch_resnet_cifar10 (BSD 2-clause) have these tensor names.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.training import Data, load_data, load_weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # with which they were trained


class Block(nn.Module):
    """Two convolutions beside a shortcut, which takes every second pixel and pads zero channels where width doubles."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.padding = stride, (after - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, after, H / stride, W / stride)`."""
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(h + x)


class CifarResNet(nn.Module):
    """Three stages of `blocks` blocks with 16, 32 and 64 channels; 6 * blocks + 2 layers."""

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (before, after, stride) in enumerate(((16, 16, 1), (16, 32, 2), (32, 64, 2)), 1):
            first = Block(before, after, stride)
            setattr(self, f"layer{stage}", nn.Sequential(first, *(Block(after, after, 1) for _ in range(blocks - 1))))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores `(B, num_classes)`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20(num_classes: int = 10) -> nn.Module:
    """Return ResNet-20."""
    return CifarResNet(3, num_classes)


def resnet32(num_classes: int = 10) -> nn.Module:
    """Return ResNet-32."""
    return CifarResNet(5, num_classes)


NETWORKS = {"resnet20": resnet20, "resnet32": resnet32}


def trained(name: str, weights: Path) -> nn.Module:
    """Return a network with the weights in `weights/NAME-cifar10.safetensors`, in evaluation mode."""
    model = NETWORKS[name]()
    load_weights(model, weights / f"{name}-cifar10.safetensors")
    return model.eval()


def data(source: str, held_out: float = 0.1) -> Data:
    """Return CIFAR-10, normalised as the weights expect it, with a share of the training images for validation."""
    found = load_data(source, seed=0, validation=held_out)
    mean, std = (tuple(255 * each for each in values) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return found.normalised(mean, std)


def first_batches(found: Data, images: int, batch: int = 100) -> list[tuple[Tensor, Tensor]]:
    """Return images of the training part in a fixed random order, with their classes."""
    batches = found.train.batches(batch, shuffle=torch.Generator().manual_seed(0))
    return [pair for pair, _ in zip(batches, range(images // batch), strict=False)]
