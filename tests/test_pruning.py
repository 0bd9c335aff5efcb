"""Prune once and prune while training: budgets are met, refusals are gone around, a run can be taken up again."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
import torchvision
from conftest import shake
from test_surgery import Baked, everything, same, small
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
import compressor.graph
from compressor.errors import (
    BudgetError,
    IdleArgumentError,
    InputError,
    PeriodError,
    RangeError,
    ScoreError,
    UnknownNameError,
)
from compressor.relevance import RelevanceConfig

X = torch.randn(1, 3, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("criterion", sorted(set(compressor.CRITERIA) - {"taylor"}))
@pytest.mark.parametrize("measure", ["params", "macs", "channels"])
def test_every_criterion_reaches_the_budget_and_the_result_says_what_is_there(criterion: str, measure: str) -> None:
    model = shake(torchvision.models.resnet18(num_classes=10))
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    result = compressor.prune(model, x, criterion=criterion, budget=compressor.Budget(0.5, measure), round_to=8)
    assert result.reached
    assert 0.5 <= result.removed < 0.6
    assert result.params[1] == sum(p.numel() for p in model.parameters())
    assert result.blocked == ()
    assert all(after % 8 == 0 for _, after in result.widths.values())
    assert sum(after for _, after in result.widths.values()) == result.channels[1]
    assert model(x).shape == (1, 10)


def test_a_function_of_ones_own_is_a_criterion() -> None:
    model = shake(small())
    with torch.no_grad():
        model[0].weight[::2] *= 100

    def widest(group: compressor.Group, snapshot: compressor.Snapshot) -> Tensor:
        return group.rows(snapshot.values).abs().amax(dim=1)

    strong = model[0].weight[::2].clone()
    compressor.prune(model, X, criterion=widest, budget=compressor.Budget(0.5, "channels"), allocate="uniform")
    assert torch.equal(model[0].weight, strong)


def test_taylor_takes_the_gradients_that_are_there() -> None:
    model = shake(small())
    F.cross_entropy(model(X), torch.tensor([1])).backward()
    assert compressor.prune(model, X, criterion="taylor", budget=0.3).reached


def test_prune_goes_on_without_a_group_that_refuses_and_says_so() -> None:
    model = Baked().double()
    result = compressor.prune(model, X, budget=compressor.Budget(0.4, "params"))
    assert model.a.out_channels == 8
    assert model.b.out_channels < 6
    assert result.reached
    assert result.widths["a"] == (8, 8)
    result = compressor.prune(model, X, budget=compressor.Budget(0.9, "params"))
    assert not result.reached
    assert "a: its cut was refused" in result.blocked
    assert any("aten.view in the model does not follow the cut" in line for line in result.blocked)


@pytest.mark.parametrize("sparsity", [0.07, 0.08, 0.09, 0.5, 0.29])
def test_a_share_that_is_gone_to_the_digit_is_reached(sparsity: float) -> None:
    model = nn.Sequential(nn.Linear(3, 100), nn.ReLU(), nn.Linear(100, 2)).double()
    result = compressor.prune(
        model, torch.randn(1, 3, dtype=torch.float64), budget=compressor.Budget(sparsity, "channels"), round_to=1
    )
    assert result.reached
    assert result.channels == (100, 100 - round(100 * sparsity))


def test_the_share_is_of_the_whole_model_also_where_a_group_refuses() -> None:
    model = Baked().double()  # 8 channels that cannot go, 6 that can
    result = compressor.prune(model, X, budget=compressor.Budget(0.3, "channels"))
    assert (result.reached, result.channels) == (True, (14, 9))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"criterion": "l3"}, UnknownNameError, "unknown criterion 'l3': did you mean 'l"),
        ({"budget": 1.0}, RangeError, r"sparsity = 1.0 is out of range: give sparsity in \[0, 1\)"),
        ({"budget": -0.1}, RangeError, "sparsity = -0.1 is out of range"),
        ({"budget": "half"}, InputError, r"budget = 'half': give a share of the parameters, 0\.5 say, or Budget\(0\.5"),
        ({"budget": True}, InputError, "budget = True: give a share"),
        ({"allocate": "layer"}, UnknownNameError, "unknown allocation 'layer'"),
        ({"round_to": 0}, RangeError, "round_to = 0 is out of range"),
    ],
)
def test_bad_arguments_say_what_to_type_and_change_nothing(arguments, error, message) -> None:
    model = shake(small())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        compressor.prune(model, X, **arguments)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_every_group_is_scored_once_however_many_refuse() -> None:
    scored: list[str] = []

    def judge(group: compressor.Group, snapshot: compressor.Snapshot) -> Tensor:
        scored.append(group.name)
        return group.rows(snapshot.values).abs().sum(dim=1)

    model = Baked().double()
    result = compressor.prune(model, X, criterion=judge, budget=0.9)
    assert "a: its cut was refused" in result.blocked
    assert sorted(scored) == ["a", "b"]


def test_a_group_that_stays_whole_is_not_scored() -> None:
    def judge(group: compressor.Group, snapshot: compressor.Snapshot) -> Tensor:
        assert group.name == "3"
        return torch.arange(group.size).float()

    model = shake(small())
    limits = compressor.Limits(keep=["0"])
    assert compressor.prune(model, X, criterion=judge, budget=0.2, limits=limits).reached


def test_a_model_without_parameters_has_nothing_to_prune() -> None:
    with pytest.raises(InputError, match="ReLU has no parameters, so there is nothing to prune: pass the whole model"):
        compressor.prune(nn.ReLU(), X)


class Sorted(nn.Module):
    """Every channel reaches an operation that no cut can follow, the model's input, or its output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).sort(1).values.mean((2, 3)))


def test_where_everything_is_frozen_the_result_says_what_and_why() -> None:
    model = Sorted().double()
    before = copy.deepcopy(model.state_dict())
    result = compressor.prune(model, X)
    assert (result.reached, result.removed, result.widths) == (False, 0.0, {})
    assert result.blocked[0] == "242 of 242 params belong to no group"
    assert result.blocked[1].startswith("frozen: 'conv.weight': aten.sort in the model: ")
    assert "'head.bias': model output" in result.blocked[1] or "more" in result.blocked[1]
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("criterion", ["relevance", "l1"])
def test_where_everything_is_frozen_no_training_begins(criterion: str) -> None:
    model = Sorted()
    message = r"cannot remove 50.0% of the params: nothing can go. What blocks it:\n.*\n.*frozen: .*aten.sort"
    with pytest.raises(BudgetError, match=message):
        pruner_of(model, sgd(model), criterion)


# -- while training


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 3, 8, 8, generator=generator), torch.randint(4, (16,), generator=generator))
        for _ in range(count)
    ]


def wide() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        *[nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU()],
        *[nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()],
        *[nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 4)],
    )


def pruner_of(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: str, **extra) -> compressor.Pruner:
    if criterion == "relevance":
        extra = {"relevance": RelevanceConfig(drop=0.15), **extra}  # few steps: many channels in each
    return compressor.Pruner(
        model,
        torch.randn(1, 3, 8, 8),
        criterion,
        compressor.Budget(0.5),
        optimizer=optimizer,
        total_steps=40,
        prune_every=6,
        round_to=4,
        **extra,
    )


def train(pruner: compressor.Pruner, optimizer: torch.optim.Optimizer, steps: range) -> list[dict]:
    events = []
    for step in steps:
        x, y = batches(40)[step]
        pruner.loss(x, y, F.cross_entropy).backward()
        optimizer.step()
        events.append(pruner.step())
        optimizer.zero_grad()
    return [event for event in events if event]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("criterion", ["relevance", "l1", "random"])
def test_the_model_shrinks_on_schedule_and_reaches_the_budget(criterion: str) -> None:
    model = wide()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer, criterion)
    events = train(pruner, optimizer, range(40))
    removed = [event["removed"] for event in events]
    assert len(events) > 2
    assert removed == sorted(removed)
    assert all(event["removed"] >= event["target"] for event in events)
    assert max(event["step"] for event in events) <= 0.65 * 40
    result = pruner.result()
    assert result.reached
    assert result.params[1] == sum(p.numel() for p in model.parameters())
    assert {id(p) for p in model.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize(
    ("criterion", "extra"),
    [
        ("relevance", {}),
        ("relevance", {"relevance": RelevanceConfig(drop=0.15, confidence=1.0, observe_every=3)}),
        ("random", {}),
    ],
)
def test_a_run_that_is_taken_up_again_goes_on_as_if_nothing_had_happened(criterion: str, extra: dict) -> None:
    model = wide()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer, criterion, **extra)
    train(pruner, optimizer, range(17))
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
    first = train(pruner, optimizer, range(17, 40))
    again = wide()
    compressor.graph.restore_shapes(again, {name: tuple(t.shape) for name, t in kept[0].items()})
    again.load_state_dict(kept[0])
    other = sgd(again)
    other.load_state_dict(kept[1])
    resumed = pruner_of(again, other, criterion, **extra)
    resumed.load_state_dict(kept[2])
    assert train(resumed, other, range(17, 40)) == first
    assert same(everything(model, optimizer), everything(again, other))
    assert resumed.result() == pruner.result()


def own(group: compressor.Group, snapshot: compressor.Snapshot) -> Tensor:
    return group.rows(snapshot.values).abs().sum(dim=1)


@pytest.mark.parametrize(("before", "now"), [("l1", "relevance"), ("relevance", "l1"), ("l1", own)])
def test_the_state_of_another_criterion_is_refused(before: str, now: str) -> None:
    model = wide()
    optimizer = sgd(model)
    state = pruner_of(model, optimizer, before).state_dict()
    pruner = pruner_of(model, optimizer, now)
    kept = str(pruner.state_dict())
    with pytest.raises(InputError, match=f"is of criterion '{before}', and this Pruner's is .* make it with the same"):
        pruner.load_state_dict(state)
    assert str(pruner.state_dict()) == kept


def test_a_budget_that_cannot_be_reached_is_refused_at_the_first_step() -> None:
    model = wide()
    pruner = compressor.Pruner(
        model, torch.randn(1, 3, 8, 8), "l1", compressor.Budget(0.99), optimizer=sgd(model), total_steps=10
    )
    message = r"cannot remove 99.0% of the params: at most .*ask for a sparsity of 0\.\d+ or less"
    with pytest.raises(BudgetError, match=message):
        pruner.loss(*batches(1)[0], F.cross_entropy)


def observing(batch: int = 16, **extra) -> compressor.Pruner:
    model = wide()
    config = {name: extra.pop(name) for name in list(extra) if name in {each.name for each in fields(RelevanceConfig)}}
    pruner = compressor.Pruner(
        model,
        X.float(),
        "relevance",
        compressor.Budget(0.5),
        optimizer=sgd(model),
        relevance=RelevanceConfig(**{"drop": 0.15, **config}),
        **{"total_steps": 400, **extra},
    )
    x, y = torch.randn(batch, 3, 8, 8), torch.arange(batch) % 4
    pruner.loss(x, y, F.cross_entropy).backward()
    return pruner


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"prune_every": 5},
            "prune_every = 5 steps cannot resolve anything: with batches of 16 it takes 6 .*give prune_every = 6",
        ),
        ({"prune_every": 81, "estimator": "source"}, "prune_every = 81 steps cannot resolve anything.* it takes 82"),
        ({"total_steps": 7}, "the time until the whole budget is due = 5 steps cannot .*; train longer, or on larger"),
        ({"total_steps": 100, "estimator": "source"}, "the time until the whole budget is due = 65 steps"),
        ({"schedule": compressor.OneShot(0.1), "total_steps": 50}, "the time until the whole budget is due = 5 steps"),
    ],
)
def test_a_period_in_which_nothing_can_be_resolved_is_refused(extra: dict, message: str) -> None:
    pruner = observing(**extra)
    with pytest.raises(PeriodError, match=message):
        pruner.step()


@pytest.mark.parametrize(("estimator", "prune_every"), [("soft", 20), ("source", 82)])
def test_a_period_left_open_becomes_as_long_as_it_takes(estimator: str, prune_every: int) -> None:
    pruner = observing(estimator=estimator)
    pruner.step()
    assert pruner.state_dict()["prune_every"] == prune_every
    assert pruner.state_dict()["relevance"]["half_life"] == prune_every


@pytest.mark.parametrize(
    ("extra", "every", "prune_every", "half_life"),
    [
        ({}, 3, 20, 20),  # six batches of 16 resolve something
        ({"prune_every": 200}, 8, 200, 200),
        ({"prune_every": 6}, 1, 6, 6),
        ({"observe_every": 2}, 2, 20, 20),
        ({"observe_every": 8}, 8, 48, 48),  # what was given stays, and what was left open gives way
        ({"observe_every": 8, "half_life": 7.0}, 8, 48, 7.0),
        ({"estimator": "loss"}, 1, 20, 20),
    ],
)
def test_samples_draw_as_often_as_the_period_asks_for(
    extra: dict, every: int, prune_every: int, half_life: float
) -> None:
    pruner = observing(**extra)
    pruner.step()
    state = pruner.state_dict()
    assert (state["relevance"]["observe_every"], state["prune_every"]) == (every, prune_every)
    assert state["relevance"]["half_life"] == half_life


def test_a_schedule_that_was_given_and_resolves_nothing_is_refused() -> None:
    pruner = observing(observe_every=8, prune_every=20)
    with pytest.raises(
        PeriodError, match=r"prune_every = 20 steps cannot resolve .* it takes 48 .*give prune_every = 48"
    ):
        pruner.step()


def test_a_step_of_several_batches_has_the_samples_of_all() -> None:
    """Gradients of two batches of 16 add up: 24 steps resolve what 24 steps of 16 do not."""
    at_once = observing(32, observe_every=8, prune_every=24)
    at_once.step()
    pruner = observing(16, observe_every=8, prune_every=24)
    pruner.loss(torch.randn(16, 3, 8, 8), torch.arange(16) % 4, F.cross_entropy).backward()
    pruner.step()  # would be refused for 16 samples: it takes 48 steps then
    with pytest.raises(PeriodError, match="it takes 48"):
        observing(16, observe_every=8, prune_every=24).step()


def test_no_time_is_needed_by_criteria_that_do_not_observe() -> None:
    model = wide()
    pruner = compressor.Pruner(model, X.float(), "l1", optimizer=sgd(model), total_steps=3, prune_every=1, round_to=1)
    pruner.require_time(1)  # with relevance, batches of one sample need 41 steps at least
    for inputs, targets in batches(3):
        pruner.loss(inputs, targets, F.cross_entropy).backward()
        pruner.step()
    assert pruner.result().reached


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ({"schedule": lambda progress: progress / 2}, InputError, "after all 400 steps the schedule asks for 50% of"),
        ({"warmup": 260}, RangeError, r"warmup = 260 is out of range: give warmup in \[0, 260\): then the whole"),
        ({"confidence": 1.5}, RangeError, r"confidence = 1\.5 is out of range"),
        ({"drop": 0.7}, RangeError, r"drop = 0\.7 is out of range"),
        ({"prune_every": 0}, RangeError, "prune_every = 0 is out of range"),
    ],
)
def test_observing_out_of_range_is_refused(extra: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        observing(**extra)


def test_gradients_that_were_cleared_too_early_are_missed_by_a_criterion_that_needs_them() -> None:
    model = wide()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer, "taylor")
    for x, y in batches(5):
        pruner.loss(x, y, F.cross_entropy).backward()
        optimizer.zero_grad()
        pruner.step()
    pruner.loss(x, y, F.cross_entropy)
    with pytest.raises(ScoreError, match=r"taylor needs gradients.*run backward"):
        pruner.step()


def test_floors_are_a_share_of_the_whole_model_however_often_it_is_cut() -> None:
    model = wide()
    optimizer = sgd(model)
    pruner = compressor.Pruner(
        model,
        torch.randn(1, 3, 8, 8),
        "l1",
        compressor.Budget(0.85),
        optimizer=optimizer,
        total_steps=40,
        prune_every=2,
        round_to=1,
    )
    train(pruner, optimizer, range(40))
    assert pruner.result().reached
    assert all(after >= 0.1 * before for before, after in pruner.result().widths.values())


def test_evaluation_in_the_middle_of_training_sees_no_masks() -> None:
    model = wide()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer, "relevance")
    train(pruner, optimizer, range(3))
    x = torch.randn(4, 3, 8, 8)
    model.eval()
    assert torch.equal(model(x), copy.deepcopy(model)(x))
    assert all(not m._forward_pre_hooks for m in model.modules())


def test_relevance_goes_on_when_a_group_refuses() -> None:
    model = Baked()
    optimizer = sgd(model)
    pruner = compressor.Pruner(
        model,
        torch.randn(1, 3, 8, 8),
        "relevance",
        compressor.Budget(0.3, "channels"),
        optimizer=optimizer,
        total_steps=20,
        prune_every=6,
        round_to=1,
        verify=True,
        relevance=RelevanceConfig(drop=0.15),
    )
    train(pruner, optimizer, range(20))
    result = pruner.result()
    assert (result.reached, result.widths["a"]) == (True, (8, 8))
    assert model.b.out_channels < 6


@pytest.mark.parametrize("criterion", ["relevance", "l1"])
def test_verified_cuts_while_training_are_the_same_cuts(criterion: str) -> None:
    states = []
    for verify in (False, True):
        model = wide()
        optimizer = sgd(model)
        pruner = pruner_of(model, optimizer, criterion, verify=verify)
        events = train(pruner, optimizer, range(20))
        assert events
        states.append(everything(model, optimizer))
    assert same(*states)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rund_to": 4}, TypeError, "unexpected keyword argument 'rund_to'"),
        ({"relevance": RelevanceConfig()}, IdleArgumentError, "relevance has no effect with criterion 'l1': leave one"),
        ({"allocate": "globl"}, UnknownNameError, "unknown allocation 'globl': did you mean 'global'"),
        ({"round_to": 0}, RangeError, "round_to = 0 is out of range"),
        ({"compensate": "means"}, UnknownNameError, "unknown compensation 'means': did you mean 'mean'"),
    ],
)
def test_a_pruner_refuses_at_once_what_it_cannot_follow(arguments: dict, error: type, message: str) -> None:
    model = wide()
    with pytest.raises(error, match=message):
        compressor.Pruner(model, X.float(), "l1", optimizer=sgd(model), total_steps=9, **arguments)


def test_what_refused_its_cut_stands_in_the_notes_and_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "compressor")
    result = compressor.prune(Baked().double(), X, budget=0.9)
    (note,) = result.notes
    assert note.startswith("group a stays as it is: aten.view in the model does not follow the cut")
    assert note in caplog.messages
    assert any(message.startswith("the budget is not reached: ") for message in caplog.messages)
