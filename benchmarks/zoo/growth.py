"""How time grows with depth: a chain and a DenseNet-like net of 100 to 800 layers; DenseNet-201, and a second cut.

A *channel-member* is one channel on one tensor dimension: the amount of work that a graph holds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import log
from statistics import linear_regression, median

import torch
from torch import Tensor, nn

import compressor
from zoo.check import Row
from zoo.models import image, seeded
from zoo.peer import build_and_cut, cut_half, timed

LAYERS = (100, 200, 400, 800)
ROUNDS = 5


class Chain(nn.Module):
    """Convolution, BatchNorm, ReLU, as often as asked for."""

    def __init__(self, layers: int, width: int = 16) -> None:
        super().__init__()
        widths = [3, *[width] * layers]
        self.layers = nn.Sequential(*[_layer(i, o) for i, o in pairwise(widths)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, `(B, 10)`."""
        return self.head(self.layers(x).mean((2, 3)))


class Dense(nn.Module):
    """Every layer sees what all layers before it made, as in one block of a DenseNet."""

    def __init__(self, layers: int, growth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, growth, 3, padding=1)
        self.layers = nn.ModuleList(_norm_first(growth * (index + 1), growth) for index in range(layers))
        self.head = nn.Linear(growth * (layers + 1), 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, `(B, 10)`."""
        made = [self.stem(x)]
        for layer in self.layers:
            made.append(layer(torch.cat(made, 1)))
        return self.head(torch.cat(made, 1).mean((2, 3)))


def _layer(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def _norm_first(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))


MEASURES: dict[str, Callable[[Row], None]] = {}


def _grown(make: Callable[[int], nn.Module], layers: int, row: Row) -> None:
    """Time trace and cut of one net, whole and by channel-member."""
    template, x = seeded(make, layers).eval(), image(1, 3, 8, 8)
    members = sum(group.size * len(group.members) for group in compressor.trace(template, x).groups)
    samples_ms = [timed(build_and_cut, copy.deepcopy(template), x) for _ in range(ROUNDS)]
    row |= _spread("build + cut", samples_ms)
    row |= {"channel-members": members, "us by channel-member": 1e3 * median(samples_ms) / members}


def _densenet201(row: Row) -> None:
    """Time trace + cut of DenseNet-201, and a second cut on the same graph."""
    from torchvision.models import densenet201

    template, x = seeded(densenet201).eval(), image(1, 3, 224, 224)
    first: list[float] = []
    second: list[float] = []
    for _ in range(ROUNDS):
        graphs: list[compressor.ChannelGraph] = []
        model = copy.deepcopy(template)
        first.append(timed(lambda: graphs.append(build_and_cut(model, x))))  # noqa: B023
        second.append(timed(cut_half, graphs[0]))
    row |= _spread("build + cut", first) | _spread("second cut", second)


def _spread(what: str, samples_ms: Sequence[float]) -> Row:
    spread = f"{min(samples_ms):.4g} to {max(samples_ms):.4g}"
    return {f"{what} ms": median(samples_ms), f"{what} range ms": spread, "n": len(samples_ms)}


for _make in (Chain, Dense):
    for _layers in LAYERS:
        MEASURES[f"{_make.__name__.lower()} {_layers}"] = partial(_grown, _make, _layers)
MEASURES["densenet201"] = _densenet201


def exponent(rows: Sequence[Row], net: str) -> float | None:
    """Give e of the fit `time = constant * channel-members ** e`, by least squares in logarithms."""
    points = [(log(row["channel-members"]), log(row["build + cut ms"])) for row in rows if row["model"].startswith(net)]
    return linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else None
