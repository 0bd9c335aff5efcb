"""Heads and width that the code ties by a number: refused alone, cut in proportion, and the cut is the mask."""

from __future__ import annotations

import pytest
import torch
from conftest import masked, relative_error, shake
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor import Budget
from compressor.budget import CostModel
from compressor.errors import CutError
from compressor.surgery import couple_blocks, try_cut

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Attention(nn.Module):
    """Computes the width of a head from the width of its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.window = heads, [heads, heads]  # a list of the same number that has nothing to do with heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        assert self.window == [self.window[0]] * 2
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (q @ k.transpose(-2, -1) / 4).tanh() @ v
        return self.proj(mixed.transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    """Attention and a perceptron on one stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 20), nn.Linear(20, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.down(F.gelu(self.up(x)))


class Transformer(nn.Module):
    """A stem, blocks that share a stream, and a head."""

    def __init__(self, width: int = 24, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 1), nn.Linear(width, 5)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).flatten(2).transpose(1, 2)).tanh())


def coupled(heads: int = 4, width: int = 24) -> tuple[nn.Module, compressor.ChannelGraph]:
    model = shake(Transformer(width, heads)).eval()
    graph = compressor.trace(model, X)
    couple_blocks(graph)
    return model, graph


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_heads_and_width_are_cut_in_proportion_and_the_cut_is_the_mask(kept: int) -> None:
    model, graph = coupled()
    assert list(graph.coupled) == ["blocks.0.attn.qkv"]
    assert graph.sizes() == {"blocks.0.attn.qkv": 4, "blocks.0.up": 20, "blocks.1.up": 20}
    keep = {"blocks.0.attn.qkv": torch.arange(4)[-kept:], "blocks.1.up": torch.arange(7)}
    expected = masked(graph, keep)(X)
    compressor.cut(graph, keep)
    assert relative_error(model(X), expected) <= 1e-12
    assert [block.attn.heads for block in model.blocks] == [kept, kept]
    assert model.stem.out_channels == 6 * kept
    assert model.blocks[0].attn.window == [4, 4]
    assert graph.sizes() == {"blocks.0.attn.qkv": kept, "blocks.0.up": 20, "blocks.1.up": 7}


def test_each_alone_is_refused_without_coupling() -> None:
    graph = compressor.trace(shake(Transformer()).eval(), X)
    assert set(graph.blocks) == {"blocks.0.attn.qkv", "blocks.1.attn.qkv"}
    for name in ("stem", "blocks.0.attn.qkv"):
        with pytest.raises(CutError, match="does not follow the cut"):
            try_cut(graph, {name: torch.arange(graph[name].size // 2)})
    assert graph.coupled == {}


def test_a_second_cut_goes_on_and_costs_stay_true() -> None:
    model, graph = coupled()
    for left in (3, 2):
        compressor.cut(graph, {"blocks.0.attn.qkv": torch.arange(left)})
        costs, sizes = CostModel(graph), graph.sizes()
        assert costs.params(sizes) == sum(parameter.numel() for parameter in model.parameters())
        fresh = CostModel(compressor.trace(model, X)).dense
        assert (costs.params(sizes), costs.macs(sizes)) == (fresh["params"], fresh["macs"])


def test_every_criterion_prunes_it_and_the_model_trains() -> None:
    for criterion in ("l1", "euclidean", "random"):
        model = shake(Transformer()).eval()
        result = compressor.prune(model, X, criterion, Budget(0.5, "params"), round_to=1, verify=True)
        assert result.reached
        model.train()(X).sum().backward()


def test_relevance_and_masks_prune_it_in_training() -> None:
    torch.manual_seed(0)
    for criterion in ("relevance", "rigl"):
        model, x = Transformer(), X.float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        make = compressor.SparseTraining if criterion == "rigl" else compressor.Pruner
        how = {"config": compressor.SparseConfig("channel")} if criterion == "rigl" else {}
        steps = 200 if criterion == "rigl" else 500
        pruner = make(model, x.repeat(4, 1, 1, 1), criterion, 0.3, optimizer=optimizer, total_steps=steps, **how)
        for _ in range(steps):
            pruner.loss(x.repeat(4, 1, 1, 1), torch.zeros(8, 16, dtype=torch.long), tokenwise).backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
        assert pruner.result().reached, pruner.result().blocked


def tokenwise(out: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(out.mT, targets, reduction=reduction)


def test_a_model_without_heads_is_not_tried() -> None:
    graph = compressor.trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)), X.float())
    assert graph.blocks == ()


def test_what_is_coupled_stands_in_the_result() -> None:
    result = compressor.prune(shake(Transformer()).eval(), X, "l1", 0.3, round_to=1)
    assert any("stem" in note and "lose channels in proportion" in note for note in result.notes)
