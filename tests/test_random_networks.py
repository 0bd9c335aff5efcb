"""Hypothesis draws networks from blocks that move channels about; a cut is right, or refused and nothing is changed."""

from __future__ import annotations

import copy

import torch
from conftest import masked, relative_error, shake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor.errors import CutError

# Every block is (how many channels come out of `c`, how it is made, what it does); `c` is even throughout.
BLOCKS = {
    "conv": (lambda c: c + 2, lambda c: conv(c, c + 2), lambda m, x: m(x)),
    "residual": (lambda c: c, lambda c: conv(c, c), lambda m, x: x + m(x)),
    "dense": (lambda c: c + 4, lambda c: conv(c, 4), lambda m, x: torch.cat([x, m(x)], 1)),
    "depthwise": (lambda c: c, lambda c: conv(c, c, groups=c), lambda m, x: m(x)),
    "grouped": (lambda c: c, lambda c: conv(c, c, groups=2), lambda m, x: m(x)),
    "shuffle": (lambda c: c, lambda c: nn.ChannelShuffle(2), lambda m, x: m(x)),
    "by_hand": (lambda c: c, lambda c: nn.Identity(), lambda m, x: by_hand(x)),
    "flip": (lambda c: c, lambda c: nn.Identity(), lambda m, x: x.flip(1)),
    "halves": (lambda c: c, lambda c: conv(c // 2, c // 2), lambda m, x: halves(m, x)),
    "chunks": (lambda c: c // 2, lambda c: nn.Identity(), lambda m, x: torch.mul(*x.chunk(2, 1))),
    "glu": (lambda c: c // 2, lambda c: nn.Identity(), lambda m, x: F.glu(x, 1)),
    "gate": (lambda c: c, lambda c: nn.Linear(c, c), lambda m, x: gated(m, x)),
    "padded": (lambda c: c + 2, lambda c: conv(c, c + 2), lambda m, x: m(x) + F.pad(x, (0, 0, 0, 0, 1, 1))),
    "twice": (lambda c: c, lambda c: conv(c, c), lambda m, x: m(m(x))),
    "every_second": (lambda c: c // 2, lambda c: nn.Identity(), lambda m, x: x[:, ::2] + x[:, 1::2]),
    "tokens": (lambda c: c, lambda c: nn.Linear(c, c), lambda m, x: tokens(m, x)),
    "repeat": (lambda c: 2 * c, lambda c: nn.Identity(), lambda m, x: x.repeat(1, 2, 1, 1)),
    "prelu": (lambda c: c, lambda c: nn.PReLU(c), lambda m, x: m(x)),
    "transposed": (lambda c: c + 2, lambda c: nn.ConvTranspose2d(c, c + 2, 3, padding=1), lambda m, x: m(x)),
    "raised": (lambda c: c, lambda c: nn.ConvTranspose2d(c, c, 3, padding=1, groups=c), lambda m, x: m(x)),
    "attention": (lambda c: c, lambda c: nn.MultiheadAttention(c, c // 2), lambda m, x: attended(m, x)),
    "reordered": (lambda c: c, lambda c: Reordered(c), lambda m, x: m(x)),
    "parts": (lambda c: c, lambda c: Parts(c), lambda m, x: m(x)),
    "topk": (lambda c: c, lambda c: nn.Identity(), lambda m, x: x * x.topk(3, 2).values.mean(2, keepdim=True)),
    "ranked": (lambda c: c, lambda c: nn.Identity(), lambda m, x: x.gather(2, x.argsort(2))),
    "columns": (lambda c: c, lambda c: conv(3 * c, c), lambda m, x: m(windows(x))),
    "sampled": (lambda c: c, lambda c: nn.Identity(), lambda m, x: sampled(x)),
}  # fmt: skip


def conv(i: int, o: int, groups: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(o), nn.ReLU())


def halves(m: nn.Module, x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return torch.cat([x[:, half:], m(x[:, :half])], 1)


def tokens(m: nn.Module, x: Tensor) -> Tensor:
    return m(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


def gated(m: nn.Module, x: Tensor) -> Tensor:
    return x * torch.sigmoid(m(x.mean((2, 3))))[:, :, None, None]


def by_hand(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def attended(m: nn.Module, x: Tensor) -> Tensor:
    sequence = x.flatten(2).permute(2, 0, 1)
    return m(sequence, sequence, sequence, need_weights=False)[0].permute(1, 2, 0).unflatten(2, x.shape[2:])


def windows(x: Tensor) -> Tensor:
    return F.unfold(x, (1, 3), padding=(0, 1)).unflatten(2, x.shape[2:])


def sampled(x: Tensor) -> Tensor:
    theta = torch.tensor([[0.8, 0.1, 0.0], [-0.1, 0.9, 0.2]], dtype=x.dtype).expand(len(x), -1, -1)
    return F.grid_sample(x, F.affine_grid(theta, (len(x), 1, *x.shape[2:]), align_corners=False), align_corners=False)


class Reordered(nn.Module):
    """Channels in another order, which a buffer keeps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(channels, generator=torch.Generator().manual_seed(channels)))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.order]


class Parts(nn.Module):
    """Two parts of sizes that the module knows, of which one is worked on."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = channels // 4 + 1, channels - channels // 4 - 1
        self.inner = conv(self.second, self.second)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(x, [self.first, self.second], 1)
        return torch.cat([self.inner(second), first], 1)


class Drawn(nn.Module):
    """A stem, the drawn blocks in order, and a head that flattens or pools."""

    def __init__(self, names: list[str], flatten: bool) -> None:
        super().__init__()
        self.names, self.stem, width = names, conv(3, 8), 8
        self.parts = nn.ModuleList()
        for name in names:
            after, make, _ = BLOCKS[name]
            self.parts.append(make(width))
            width = after(width)
        self.pool = nn.AdaptiveAvgPool2d(2 if flatten else 1)
        self.head = nn.Linear(width * (4 if flatten else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for name, part in zip(self.names, self.parts, strict=True):
            x = BLOCKS[name][2](part, x)
        return self.head(self.pool(x).flatten(1))


def works(names: list[str]) -> bool:
    """Blocks that halve need an even number of channels, and something to halve."""
    width = 8
    for name in names:
        if width % 2 or width < 4 or width > 64:
            return False
        width = BLOCKS[name][0](width)
    return width >= 1


networks = st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=6).filter(works)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(networks, st.booleans(), st.integers(0, 10_000), st.floats(0.1, 0.9))
def test_a_masked_is_cut_or_refused(names: list[str], flatten: bool, seed: int, share: float) -> None:
    model = shake(Drawn(names, flatten), seed)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    graph = compressor.trace(model, x)
    generator = torch.Generator().manual_seed(seed)
    keep = {
        group.name: torch.randperm(group.size, generator=generator)[: max(1, round(group.size * share))]
        for group in graph.groups
        if group.exact and torch.rand((), generator=generator) < 0.8
    }
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = masked(graph, keep)(x)
        try:
            compressor.cut(graph, keep)
        except CutError as refusal:
            assert "aten." in str(refusal), "a refusal names the operation"  # noqa: PT017 (both outcomes are right)
            assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
            return
        assert relative_error(model(x), expected) <= 1e-12


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(networks, st.integers(0, 10_000))
def test_pruning_reaches_the_budget_or_says_why_not(names: list[str], seed: int) -> None:
    """`prune` goes around refusals: the budget is reached, or the result says what stands in the way."""
    model = shake(Drawn(names, False), seed)
    result = compressor.prune(
        model, torch.randn(1, 3, 4, 4, dtype=torch.float64), budget=compressor.Budget(0.3, "channels")
    )
    before, after = result.channels
    assert result.reached == (after <= before - 0.3 * before)
    assert result.reached == (not result.blocked)
    assert result.params[1] == sum(parameter.numel() for parameter in model.parameters())
    assert model(torch.randn(2, 3, 4, 4, dtype=torch.float64)).shape == (2, 3)
