"""Promise 1: a cut model equals the original with the same channels masked, to 1e-12 in double precision.

The oracle never sees the surgery: it zeroes the consumers' weights in a copy of the whole model.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from conftest import masked, random_keep, relative_error, shake
from torch import Tensor, nn
from torch.nn import functional as F

import compressor


class Net(nn.Module):
    """A module whose forward is a function of it and its input."""

    def __init__(self, forward, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def head(channels: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


def conv(i: int, o: int, **kw) -> nn.Module:
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, **kw), nn.BatchNorm2d(o), nn.ReLU())


def option_a(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
    return m.head(F.relu(m.b(x)[:, :, ::2, ::2] + short))


def shuffle_by_hand(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    b, c, h, w = x.shape
    return m.head(m.b(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)))


def halves(m: Net, x: Tensor) -> Tensor:
    first, second = m.a(x).chunk(2, dim=1)
    return m.head(torch.cat([m.b(first), second], dim=1))


def squeeze_excite(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    gate = torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3))))))
    return m.head(x * gate[:, :, None, None])


NETS = {
    "chain": Net(lambda m, x: m.head(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 6), head=head(6)),
    "residual": Net(lambda m, x: m.head(m.a(x) + m.b(m.a(x))), a=conv(3, 8), b=conv(8, 8), head=head(8)),
    "flatten": Net(
        lambda m, x: m.fc(m.a(x).view(x.size(0), -1)),
        a=conv(3, 4), fc=nn.Sequential(nn.Linear(256, 9), nn.Linear(9, 3)),
    ),
    "concat": Net(
        lambda m, x: m.head(torch.cat([m.a(x), m.b(m.a(x))], 1)), a=conv(3, 4), b=conv(4, 6), head=head(10)
    ),
    "depthwise": Net(
        lambda m, x: m.head(m.c(m.b(m.a(x)))), a=conv(3, 8), b=conv(8, 8, groups=8), c=conv(8, 6), head=head(6)
    ),
    "multiplier": Net(lambda m, x: m.head(m.b(m.a(x))), a=conv(3, 4), b=conv(4, 12, groups=4), head=head(12)),
    "grouped": Net(lambda m, x: m.head(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 12, groups=2), head=head(12)),
    "transposed": Net(
        lambda m, x: m.head(m.b(m.a(x))), a=conv(3, 8), b=nn.ConvTranspose2d(8, 6, 3, groups=2), head=head(6)
    ),
    "option_a": Net(option_a, a=conv(3, 4), b=conv(4, 8), head=head(8)),
    "shuffle": Net(shuffle_by_hand, a=conv(3, 8), b=conv(8, 6), head=head(6)),
    "channel_shuffle": Net(
        lambda m, x: m.head(m.b(m.s(m.a(x)))), a=conv(3, 8), s=nn.ChannelShuffle(4), b=conv(8, 6), head=head(6)
    ),
    "halves": Net(halves, a=conv(3, 8), b=conv(4, 6), head=head(10)),
    "every_second": Net(lambda m, x: m.head(m.b(m.a(x)[:, ::2])), a=conv(3, 8), b=conv(4, 6), head=head(6)),
    "flip": Net(lambda m, x: m.head(m.a(x) + m.a(x).flip(1)), a=conv(3, 8), head=head(8)),
    "glu": Net(lambda m, x: m.head(F.glu(m.a(x), dim=1)), a=conv(3, 8), head=head(4)),
    "squeeze_excite": Net(squeeze_excite, a=conv(3, 8), down=nn.Linear(8, 4), up=nn.Linear(4, 8), head=head(8)),
    "twice": Net(lambda m, x: m.head(m.b(m.b(m.a(x)))), a=conv(3, 8), b=conv(8, 8), head=head(8)),
    "pixel_shuffle": Net(
        lambda m, x: m.head(m.b(F.pixel_shuffle(m.a(x), 2))), a=conv(3, 16), b=conv(4, 6), head=head(6)
    ),
    "repeat": Net(lambda m, x: m.head(m.a(x).repeat(1, 2, 1, 1)), a=conv(3, 4), head=head(8)),
    "in_place": Net(lambda m, x: m.head(m.a(x).mul_(2).add_(m.b(x))), a=conv(3, 8), b=conv(3, 8), head=head(8)),
    "einsum": Net(
        lambda m, x: m.head(torch.einsum("bchw,dc->bdhw", m.a(x), m.mix.weight)),
        a=conv(3, 8), mix=nn.Linear(8, 6, bias=False), head=head(6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("batch", [1, 2])
def test_masked_is_cut(name: str, batch: int) -> None:
    model = shake(copy.deepcopy(NETS[name]))
    x = torch.randn(batch, 3, 8, 8, dtype=torch.float64)
    graph = compressor.trace(model, x)
    assert graph.groups
    assert all(group.exact for group in graph.groups)
    keep = random_keep(graph)
    with torch.no_grad():
        expected = masked(graph, keep)(x)
        compressor.cut(graph, keep)
        assert relative_error(model(x), expected) <= 1e-12


def reference(name: str) -> tuple[nn.Module, Tensor]:
    extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    size = 32 if name in ("resnet18", "mobilenet_v2", "vgg11", "vgg11_bn") else 64
    return shake(torchvision.models.get_model(name, weights=None, num_classes=10, **extra)), torch.randn(
        1, 3, size, size, dtype=torch.float64
    )


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "vgg11_bn", "mobilenet_v2", "densenet121", "googlenet"])
def test_reference_models_cut_right_twice(name: str) -> None:
    """The smaller VGGs stand here for VGG-16; `benchmarks/promise.py` cuts the six models of the table in full."""
    model, x = reference(name)
    graph = compressor.trace(model, x)
    for seed, share in ((0, 0.5), (1, 0.7)):
        keep = random_keep(graph, share, seed)
        with torch.no_grad():
            expected = masked(graph, keep)(x)
            compressor.cut(graph, keep)
            assert relative_error(model(x), expected) <= 1e-12
    assert compressor.trace(model, x).sizes() == graph.sizes()
