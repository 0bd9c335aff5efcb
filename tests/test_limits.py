"""Limits: patterns name groups by the layers that write them; what matches nothing, or is contradictory, is refused."""

from __future__ import annotations

import pytest
import torch
import torchvision
from conftest import shake
from torch import nn

import compressor
from compressor.budget import Limits
from compressor.errors import InputError, RangeError, UnknownNameError

X = torch.randn(1, 3, 32, 32)


@pytest.fixture(scope="module")
def resnet() -> compressor.ChannelGraph:
    return compressor.trace(torchvision.models.resnet18(num_classes=10).eval(), X)


INSIDE = ("layer1.0.conv1", "layer1.1.conv1")  # groups within blocks; the stream is named after the stem


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("layer1.0.conv1", ["layer1.0.conv1"]),
        ("layer1.?.conv1", INSIDE),
        ("layer1.[01].bn1", INSIDE),
        ("layer1.0.bn1.running_mean", ["layer1.0.conv1"]),
        ("layer1.1.conv2", ["conv1"]),
        ("layer1.*", ["conv1", *INSIDE]),
        ("conv1", ["conv1"]),
        ("*.downsample.*", ["layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"]),
    ],
)
def test_a_layer_names_the_group_that_it_writes(resnet, pattern: str, names: list[str]) -> None:
    assert Limits(keep=[pattern]).shares(resnet) == dict.fromkeys(names, 0.0)
    assert Limits(sparsity={pattern: 0.3}).shares(resnet) == dict.fromkeys(names, 0.3)
    others = resnet.sizes().keys() - set(names)
    assert Limits(only=[pattern]).shares(resnet) == dict.fromkeys(others, 0.0)


def test_no_limits_settle_nothing(resnet) -> None:
    assert Limits().shares(resnet) == {}


def test_limits_work_together(resnet) -> None:
    found = Limits(only=["layer[12].*"], keep=["layer1.0.*1"], sparsity={"layer2.0.conv1": 0.25}).shares(resnet)
    free = {"conv1", "layer1.1.conv1", "layer2.0.conv2", "layer2.1.conv1"}
    assert found == dict.fromkeys(resnet.sizes().keys() - free, 0.0) | {"layer2.0.conv1": 0.25}


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"keep": ["layer1.0.conv9"]}, "unknown group for keep 'layer1.0.conv9': did you mean 'layer1.0.conv"),
        ({"only": ["laier2.0.conv1"]}, "unknown group for only 'laier2.0.conv1': did you mean 'layer2.0.conv1'"),
        ({"sparsity": {"Conv1": 0.3}}, "unknown group for sparsity 'Conv1': did you mean 'conv1'"),
        ({"keep": ["fc"]}, r"unknown group for keep 'fc': .*; it only reads the channels of group 'layer4.0.conv2'"),
        ({"keep": ["fc.bias"]}, r"unknown group for keep 'fc.bias': .*; 'fc.bias' is frozen: .*output"),
    ],
)
def test_a_pattern_that_matches_nothing_says_what_is_close(resnet, limits: dict, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        Limits(**limits).shares(resnet)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"keep": ["layer1.*"], "sparsity": {"layer1.0.conv1": 0.3}},
            "sparsity layer1.0.conv1=0.3 and keep layer1.* contradict each other at group 'layer1.0.conv1'",
        ),
        (
            {"only": ["layer2.*"], "sparsity": {"layer1.0.conv1": 0.3}},
            "sparsity layer1.0.conv1=0.3 and only contradict each other at group 'layer1.0.conv1'",
        ),
        (
            {"sparsity": {"layer1.0.*": 0.3, "layer1.0.conv1": 0.5}},
            "sparsity layer1.0.*=0.3 and sparsity layer1.0.conv1=0.5 contradict each other at group",
        ),
        (
            {"only": ["layer2.*"], "keep": ["layer1.0.conv1"]},
            "keep 'layer1.0.conv1' has no effect: only leaves its groups whole anyway",
        ),
        ({"keep": ["*"]}, "keep and only leave no group that may lose channels"),
    ],
)
def test_contradictions_are_refused(resnet, limits: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Limits(**limits).shares(resnet)
    assert str(caught.value).startswith(message)


def test_patterns_that_agree_do_not_contradict_each_other(resnet) -> None:
    found = Limits(sparsity={"layer1.0.conv1": 0.3, "layer1.0.bn1": 0.3}).shares(resnet)
    assert found == {"layer1.0.conv1": 0.3}


@pytest.mark.parametrize("share", [1.0, -0.1, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(RangeError, match=r"sparsity of 'conv1' = .* is out of range"):
        Limits(sparsity={"conv1": share})


# -- what a pruning makes of them


def net() -> nn.Module:
    return shake(torchvision.models.resnet18(num_classes=10))


def test_prune_keeps_to_the_limits_and_reaches_the_budget_elsewhere() -> None:
    limits = Limits(keep=["conv1"], sparsity={"layer4.?.conv1": 0.25})
    result = compressor.prune(net(), X.double(), budget=0.4, limits=limits, round_to=1)
    assert result.reached
    assert result.removed < 0.401
    assert result.widths["conv1"] == (64, 64)
    assert result.widths["layer4.0.conv1"] == result.widths["layer4.1.conv1"] == (512, 384)


def test_a_share_of_its_own_is_taken_also_where_the_budget_asks_for_nothing() -> None:
    result = compressor.prune(net(), X.double(), budget=0.0, limits=Limits(sparsity={"layer1.0.conv1": 0.5}))
    changed = {name: pair for name, pair in result.widths.items() if pair[0] != pair[1]}
    assert changed == {"layer1.0.conv1": (64, 32)}


def test_what_the_limits_forbid_is_named_where_the_target_is_missed() -> None:
    result = compressor.prune(net(), X.double(), budget=0.5, limits=Limits(only=["layer1.*"]))
    assert not result.reached
    assert {name for name, pair in result.widths.items() if pair[0] != pair[1]} == {"conv1", *INSIDE}
    assert any(line.startswith("groups that keep or only leaves whole: 'layer4.0.conv2'") for line in result.blocked)


def test_shares_follow_the_schedule_while_training() -> None:
    model = nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = compressor.Pruner(
        model,
        torch.randn(2, 3),
        "l1",
        compressor.Budget(0.0),
        compressor.Linear(0.0, 1.0),
        optimizer=optimizer,
        total_steps=10,
        prune_every=5,
        round_to=1,
        limits=Limits(keep=["0"], sparsity={"2": 0.5}),
    )
    widths = []
    for _ in range(10):
        pruner.loss(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]), nn.functional.cross_entropy).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        widths.append((model[0].out_features, model[2].out_features))
    assert widths == [(40, 40)] * 4 + [(40, 30)] * 5 + [(40, 20)]
