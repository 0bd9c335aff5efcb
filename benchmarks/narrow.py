"""ResNet-18 and VGG-16 for 32 x 32 pixels at a quarter of the width: what a CPU can train from nothing.

Factories for `compress --model`; the comparison of criteria that begin with random weights is

compress compare --model benchmarks/narrow.py:resnet18 --data cifar10 --epochs 20 --sparsity 0.6 --seeds 4 \
    --criteria relevance,l1,euclidean,random --first-cut 0.1 --out runs/narrow-resnet18 [--time-limit 170]
"""

from __future__ import annotations

from torch import nn
from torchvision.models import VGG, ResNet
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import cfgs, make_layers

CLASSES = 10


def resnet18(width: float = 0.25) -> nn.Module:
    """Return a ResNet-18 whose first layer sees every pixel, with `round(64 * width)` channels in the first stage."""
    model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=CLASSES)
    first = model.inplanes = round(64 * width)
    model.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(first)
    model.maxpool = nn.Identity()  # type: ignore[assignment]
    for stage in range(4):
        layer = model._make_layer(BasicBlock, first << stage, 2, stride=1 + (stage > 0))
        setattr(model, f"layer{stage + 1}", layer)
    model.fc = nn.Linear(first << 3, CLASSES)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's own
    return model


def vgg16(width: float = 0.25) -> nn.Module:
    """Return a VGG-16 with BatchNorm and its three linear layers, every width of both times `width`.

    The last pixel goes in once, and not 49 times as under torchvision's pooling to 7 x 7.
    """
    scaled = [each if isinstance(each, str) else round(each * width) for each in cfgs["D"]]
    model = VGG(make_layers(scaled, batch_norm=True), num_classes=CLASSES, init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    last, hidden = round(512 * width), round(4096 * width)
    model.classifier = nn.Sequential(
        nn.Linear(last, hidden), nn.ReLU(inplace=True), nn.Dropout(),
        nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(),
        nn.Linear(hidden, CLASSES),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
