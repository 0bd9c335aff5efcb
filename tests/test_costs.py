"""Costs: the closed form against networks that really are that small."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.budget import MEASURES, CostModel
from compressor.errors import RangeError, UnknownNameError
from compressor.graph import ChannelGraph, Extent, Term, trace

WIDTHS = {"stem": 6, "inner": 5, "branch": 4, "mix": 3, "hidden": 7}
X = torch.zeros(2, 3, 4, 4)


class Net(nn.Module):
    """A chain, a residual sum of two producers, a concatenation, and a flatten with K = 4."""

    def __init__(self, stem: int, inner: int, branch: int, mix: int, hidden: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem)
        self.inner = nn.Conv2d(stem, inner, 3, padding=1)
        self.outer = nn.Conv2d(inner, stem, 1)
        self.branch = nn.Conv2d(stem, branch, 1)
        self.mix = nn.Conv2d(stem + branch, mix, 3, stride=2, padding=1)
        self.hidden, self.head = nn.Linear(mix * 4, hidden), nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer(self.inner(x).relu())
        x = self.mix(torch.cat([x, self.branch(x)], dim=1)).relu()
        return self.head(self.hidden(x.flatten(1)).relu())


def count_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module) -> int:
    """Run the model, and count for every output value of a layer the length of the sum that it is."""
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module.weight, Tensor)
        total += output.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model(X)
    return total


GRAPH = trace(Net(**WIDTHS), X)
COSTS = CostModel(GRAPH)
KEPT = st.fixed_dictionaries({name: st.integers(1, width) for name, width in WIDTHS.items()})


def test_the_network_has_the_groups_that_these_tests_mean() -> None:
    assert GRAPH.sizes() == WIDTHS


@settings(deadline=None)
@given(kept=KEPT)
def test_counts_are_those_of_a_network_that_is_that_small(kept: dict[str, int]) -> None:
    small = Net(**kept)
    assert COSTS.params(kept) == COSTS.measure("params", kept) == count_params(small)
    assert COSTS.macs(kept) == COSTS.measure("macs", kept) == count_macs(small)
    assert COSTS.channels(kept) == COSTS.measure("channels", kept) == sum(kept.values())


def test_groups_that_are_not_named_stay_whole() -> None:
    dense = Net(**WIDTHS)
    assert COSTS.dense == {"params": count_params(dense), "macs": count_macs(dense), "channels": sum(WIDTHS.values())}
    assert COSTS.params({"inner": 2}) == count_params(Net(**{**WIDTHS, "inner": 2}))


@pytest.mark.parametrize("measure", MEASURES)
@settings(deadline=None)
@given(kept=KEPT)
def test_a_channel_costs_what_one_less_saves(measure: str, kept: dict[str, int]) -> None:
    def one_less(name: str) -> Mapping[str, int]:
        return {**kept, name: kept[name] - 1}

    saved = {name: COSTS.measure(measure, kept) - COSTS.measure(measure, one_less(name)) for name in WIDTHS}
    assert COSTS.per_channel(measure, kept) == saved


def test_a_channel_of_an_empty_group_costs_nothing() -> None:
    assert COSTS.per_channel("params", {"inner": 0})["inner"] == 0


def test_large_counts_are_exact() -> None:
    odd = 10**6 + 3
    graph = ChannelGraph(nn.Identity(), X, (), (), macs=(Term(odd, (Extent(odd), Extent(odd))), Term(1, ())))
    assert CostModel(graph).macs({}) == odd**3 + 1
    assert CostModel(graph).dense == {"params": 0, "macs": odd**3 + 1, "channels": 0}


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown measure 'parms': did you mean 'params'"):
        COSTS.measure("parms", {})
    with pytest.raises(UnknownNameError, match="unknown measure 'flops'"):
        COSTS.per_channel("flops", {})
    with pytest.raises(UnknownNameError, match="unknown group 'steem': did you mean 'stem'"):
        COSTS.params({"steem": 1})


@pytest.mark.parametrize("count", [-1, 7])
def test_more_channels_than_there_are_are_refused(count: int) -> None:
    with pytest.raises(RangeError, match=rf"^kept\['stem'\] = {count} is out of range: .* in \[0, 6\]$"):
        COSTS.macs({"stem": count})
