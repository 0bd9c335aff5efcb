"""Thresholds: what goes by its own score, whatever that comes to."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import shake
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

import compressor
from compressor import Threshold, job
from compressor.errors import IdleArgumentError, InputError, RangeError
from compressor.job import Settings

X = torch.randn(4, 3, 8, 8, dtype=torch.float64)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return shake(
        nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 20, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 16, 5)
        )
    )


def norms(weight: Tensor) -> Tensor:
    return weight.detach().flatten(1).abs().sum(1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 100), value=st.floats(0, 6))
def test_filters_below_an_l1_norm_go_and_no_others(seed: int, value: float) -> None:
    model = network(seed)
    before = [norms(layer.weight) for layer in (model[0], model[2])]
    result = compressor.prune(model, X, "l1", Threshold(value), round_to=1)
    for layer, each in zip((model[0], model[2]), before, strict=True):
        least = -(-len(each) // 10)  # the floor
        assert layer.out_channels == max(int((each >= value).sum()), least)
    gone = 12 + 20 - model[0].out_channels - model[2].out_channels
    assert result.channels == (32, 32 - gone)
    assert (result.reached, result.threshold, result.blocked) == (True, value, ())


def test_of_every_pair_of_filters_closer_than_the_threshold_one_goes() -> None:
    model = network()
    rows = model[0].weight.detach().flatten(1)
    apart = torch.cdist(rows, rows)[torch.triu_indices(12, 12, 1).unbind()]
    value = float(apart.median())
    compressor.prune(model, X, "euclidean", Threshold(value), round_to=1)
    left = model[0].weight.detach().flatten(1)
    assert 1 < len(left) < 12
    assert (torch.cdist(left, left) + 1e9 * torch.eye(len(left)) >= value).all()
    for row in rows:  # whoever went had somebody nearer than that, at that time
        near = torch.cdist(row.unsqueeze(0), rows).flatten().sort().values[1]
        assert any(torch.equal(row, kept) for kept in left) or near < value


def test_the_floor_keeps_some_and_the_result_says_so() -> None:
    model = network()
    result = compressor.prune(model, X, "l1", Threshold(1e6), round_to=1)
    assert (model[0].out_channels, model[2].out_channels) == (2, 2)
    assert [note for note in result.notes if "below the threshold" in note] == [
        "'0' keeps 2 of 12 channels, its floor: some are below the threshold",
        "'2' keeps 2 of 20 channels, its floor: some are below the threshold",
    ]


@pytest.mark.parametrize("quantile", [0.1, 0.33, 0.5, 0.9])
def test_in_wide_groups_nothing_goes_for_the_sake_of_rounding(quantile: float) -> None:
    model = shake(nn.Sequential(nn.Conv2d(3, 67, 3), nn.ReLU(), nn.Conv2d(67, 4, 3)))
    each = norms(model[0].weight)
    value = float(each.quantile(quantile))
    compressor.prune(model, X, "l1", Threshold(value))
    assert model[0].out_channels == int((each >= value).sum())


def test_counts_are_rounded_and_shares_of_single_groups_come_first() -> None:
    model = network()
    value = float(norms(model[2].weight).sort().values[7])  # 13 of 20 stay
    limits = compressor.Limits(sparsity={"0": 0.5})
    compressor.prune(model, X, "l1", Threshold(value), round_to=4, limits=limits)
    assert model[0].out_channels == 8  # 6 is as near to 4 as to 8
    assert model[2].out_channels == 12


def trained(threshold: float, criterion: str = "relevance") -> compressor.Pruner:
    model = network().train()
    optimizer = SGD(model.parameters(), 0.05)
    pruner = compressor.Pruner(
        model, X, criterion, Threshold(threshold), optimizer=optimizer, total_steps=60, prune_every=30, round_to=1,
        relevance=compressor.RelevanceConfig(observe_every=1, warmup=0, drop=0.2) if criterion == "relevance" else None,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        x = torch.randn(32, 3, 8, 8, generator=generator, dtype=torch.float64)
        pruner.loss(x, x.flatten(1).sum(1).gt(0).long(), F.cross_entropy).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    return pruner


def test_in_training_what_is_not_above_the_confidence_goes() -> None:
    widths = [trained(value).model[2].out_channels for value in (1e-9, 0.5, 1.0)]
    assert widths[0] == 20
    assert widths[2] == 2  # nothing is above certainty, so the floor alone stays
    assert widths[2] < widths[1] < widths[0]


def test_in_training_weights_are_looked_at_before_every_cut() -> None:
    pruner = trained(1e6, "l1")
    assert (pruner.model[0].out_channels, pruner.model[2].out_channels) == (2, 2)
    assert [note.partition(",")[0] for note in pruner.result().notes] == [
        "'0' keeps 2 of 12 channels",  # once, however many cuts
        "'2' keeps 2 of 20 channels",
    ]


@pytest.mark.parametrize(
    ("criterion", "how", "message"),
    [
        ("random", {}, "scores of 'random' have no unit, so no threshold fits them: give a budget"),
        ("tp:RandomImportance", {}, "scores of 'tp:RandomImportance' have no unit"),
        ("relevance", {}, "a threshold for relevance is a confidence, which a Pruner gathers in training"),
        ("l1", {"rounds": 2}, "rounds has no effect with a threshold"),
        ("l1", {"allocate": "global"}, "allocate has no effect with a threshold"),
    ],
)
def test_what_a_threshold_does_not_fit_is_refused(criterion: str, how: dict, message: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        compressor.prune(model, X, criterion, Threshold(0.5), **how)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(RangeError, match="threshold = nan is out of range"):
        Threshold(float("nan"))
    common = {"optimizer": SGD(network().parameters()), "total_steps": 100}
    with pytest.raises(RangeError, match=r"\(0, 1\]: it is a confidence"):
        compressor.Pruner(network(), X, "relevance", Threshold(1.5), **common)
    with pytest.raises(IdleArgumentError, match="allocate has no effect"):
        compressor.Pruner(network(), X, "l1", Threshold(1.5), allocate="global", **common)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": 0.5, "threshold": 1.0}, "--sparsity and --threshold both say how much goes: leave one of them"),
        ({"threshold": 0.9, "when": "after"}, "--threshold with --criterion relevance is a confidence"),
        ({"threshold": 0.9, "criterion": "rigl"}, "--threshold has no effect with --criterion rigl"),
        ({"threshold": 0.9, "criterion": "l1", "measure": "macs"}, "--measure has no effect with --threshold"),
        ({"threshold": 0.9, "criterion": "l1", "allocate": "global"}, "--allocate has no effect with --threshold"),
        ({"threshold": 0.9, "criterion": "l1", "rounds": 2}, "--rounds has no effect with --threshold"),
        (
            {"threshold": float("inf"), "criterion": "l1"},
            "threshold = inf is out of range: give threshold in (-inf, inf)",
        ),
    ],
)
def test_options_that_contradict_it_are_refused(given: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Settings.from_options(given)
    assert message in str(caught.value)


def test_settings_come_back_from_their_text() -> None:
    made = Settings(criterion="l1", threshold=2.5)
    assert made.sparsity is None
    assert made.out == "runs/resnet18-digits-l1-below2.5-seed0"
    assert made.command() == "compress --criterion l1 --model resnet18 --data digits --threshold 2.5"
    assert Settings.from_options(made.given()) == made


def test_a_run_says_what_went_below(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = {"criterion": "l1", "model": "user_models:tiny", "threshold": 2.0, "epochs": 1, "finetune-epochs": 0}
    settings |= {"compensate": "mean"}
    made = job.run(Settings.from_options({**settings, "out": str(out)}), timings=False)
    goal = json.loads((out / "report.json").read_text())["goal"]
    assert goal["threshold"] == 2.0
    assert 0 < made.goal.reached < 1
    assert "all below 2" in (out / "report.html").read_text()
