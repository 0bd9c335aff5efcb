"""Verification: a wrong cut is seen on real inputs and taken back bit for bit; a right one leaves no trace."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torchvision
from conftest import random_keep, shake
from test_surgery import everything, same, small
from torch import Tensor, nn

import compressor
import compressor.surgery.verification
from compressor.errors import CutError, TraceError
from compressor.graph import ChannelGraph
from compressor.surgery import input_means, verified_cut

X = torch.randn(4, 3, 8, 8, dtype=torch.float64)


def sorted_keep(graph: ChannelGraph, share: float = 0.5) -> dict[str, Tensor]:
    return {name: kept.sort().values for name, kept in random_keep(graph, share).items()}


def tamper(monkeypatch, group: str, tensor: str) -> None:
    """Let every cut of a group leave the right number of channels of one tensor, and the wrong ones."""
    real = compressor.surgery.verification.cut

    def faulty(graph, keep, optimizer=None, means=None, check=None, copies=()) -> None:
        def check_the_wrong_one() -> None:
            if group in keep:
                wrong = {**dict(graph.model.named_parameters()), **dict(graph.model.named_buffers())}[tensor]
                wrong.data = wrong.data.flip(0)
            check()

        real(graph, keep, optimizer, means, check_the_wrong_one, copies)

    monkeypatch.setattr("compressor.surgery.verification.cut", faulty)


def grouped() -> nn.Module:
    """Grouped and depthwise convolutions, with biases and without, and a pooled end."""
    return nn.Sequential(
        *[nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()],
        *[nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()],
        *[nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
        *[nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4)],
    )


def normed() -> nn.Module:
    """A group behind a LayerNorm, which is not exact, and one that is."""
    return nn.Sequential(
        *[nn.Flatten(), nn.Linear(192, 10), nn.LayerNorm(10), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4)]
    )


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=4)


@pytest.mark.parametrize("make", [small, grouped, normed, resnet])
@pytest.mark.parametrize("folded", [False, True])
def test_a_right_cut_is_the_cut_without_verification(make, folded: bool) -> None:
    model = shake(make())
    plain = copy.deepcopy(model)
    graph, other = compressor.trace(model, X), compressor.trace(plain, X)
    means = input_means(graph, [X]) if folded else None
    keep = sorted_keep(graph)
    verified_cut(graph, keep, X, means=means)
    compressor.cut(other, keep, means=means)
    assert same(model.state_dict(), plain.state_dict())
    assert graph.sizes() == other.sizes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rounding_is_not_a_difference(dtype: torch.dtype) -> None:
    model = shake(resnet()).to(dtype)
    graph = compressor.trace(model, X.to(dtype))
    keep = sorted_keep(graph)
    verified_cut(graph, keep, X.to(dtype))
    assert graph.sizes() == {name: len(kept) for name, kept in keep.items()}


@pytest.mark.parametrize("tensor", ["1.running_mean", "1.weight", "0.weight", "3.weight"])
@pytest.mark.parametrize("folded", [False, True])
def test_a_wrong_cut_is_taken_back_bit_for_bit_and_names_the_group(monkeypatch, tensor: str, folded: bool) -> None:
    tamper(monkeypatch, "0", tensor)
    model = shake(small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(X).sum().backward()
    optimizer.step()
    graph = compressor.trace(model, X)
    before, memory = everything(model, optimizer), {name: p.data_ptr() for name, p in model.named_parameters()}
    means = input_means(graph, [X]) if folded else None
    with pytest.raises(CutError, match=r"on real inputs the output of the cut model .* nothing was changed") as caught:
        verified_cut(graph, {"0": torch.tensor([0, 1, 2]), "3": torch.tensor([0, 4])}, X, optimizer, means)
    assert caught.value.groups == ("0",)
    assert same(everything(model, optimizer), before)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == memory
    assert graph.sizes() == {"0": 8, "3": 6}


def test_the_exact_groups_beside_an_inexact_one_are_verified(monkeypatch) -> None:
    tamper(monkeypatch, "3", "3.bias")
    model = shake(normed())
    graph = compressor.trace(model, X)
    assert [group.exact for group in graph.groups] == [False, True]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CutError, match="differs") as caught:
        verified_cut(graph, sorted_keep(graph), X)
    assert caught.value.groups == ("3",)
    assert same(model.state_dict(), before)


def test_a_fold_with_the_wrong_sign_is_seen() -> None:
    model = shake(small())
    graph = compressor.trace(model, X)
    means = input_means(graph, [X])
    assert graph.offsets["3.weight"]
    graph.offsets = {name: replace(each, sign=-each.sign) for name, each in graph.offsets.items()}
    with pytest.raises(CutError, match="differs"):
        verified_cut(graph, sorted_keep(graph), X, means=means)


def test_verification_leaves_modes_hooks_and_randomness_as_they_were() -> None:
    model = shake(small()).train()
    model[2].eval()
    graph = compressor.trace(model, X)
    state, statistics = torch.get_rng_state(), model[1].running_mean.clone()
    verified_cut(graph, {"3": torch.tensor([0, 1])}, X, means=input_means(graph, [X]))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[1].running_mean, statistics)
    assert [module.training for module in model] == [True, True, False] + [True] * 6
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.backends.cudnn.allow_tf32


def test_prune_goes_on_without_a_group_whose_cut_differs_from_its_mask(monkeypatch) -> None:
    tamper(monkeypatch, "0", "1.bias")
    model = shake(small())
    result = compressor.prune(model, X, budget=compressor.Budget(0.3, "channels"), verify=True)
    assert (result.reached, result.widths["0"]) == (True, (8, 8))
    assert result.widths["3"][1] < 6
    missed = compressor.prune(shake(small()), X, budget=compressor.Budget(0.5, "channels"), verify=True)
    assert "0: its cut was refused" in missed.blocked
    assert any("differs from that of the masked one" in line for line in missed.blocked)


def test_inputs_that_do_not_fit_the_model_are_its_own_error() -> None:
    graph = compressor.trace(shake(small()), X)
    with pytest.raises(TraceError, match=r"Sequential does not run on the example inputs \(4, 5, 8, 8\)"):
        verified_cut(graph, {"0": torch.tensor([0])}, X.repeat(1, 2, 1, 1)[:, :5])


def test_products_in_full_whichever_way_tf32_was_allowed() -> None:
    """Once set by torch's newer names, `allow_tf32` cannot be read any more."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [place.fp32_precision for place in places]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    try:
        for place in places:
            place.fp32_precision = "tf32"
        assert compressor.prune(model, torch.randn(1, 3, 2, 2), "l1", 0.3, round_to=1, verify=True).reached
        assert [place.fp32_precision for place in places] == ["tf32", "tf32"]
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value
