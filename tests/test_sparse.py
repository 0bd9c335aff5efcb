"""Sparse training: masks hold through every optimizer step, the cut at the end changes nothing, a run can go on."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from conftest import relative_error, shake
from test_masks import Branches
from test_pruning import batches, wide
from test_surgery import everything, same
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor.errors import BudgetError, InputError, RangeError, UnknownNameError
from compressor.sparse import SparseConfig
from compressor.sparse.allocation import erdos_renyi
from compressor.sparse.empty import without_weight
from compressor.sparse.training import SparseTraining

X = torch.zeros(1, 3, 8, 8)
SHAPES = {"0.weight": (32, 3, 3, 3), "3.weight": (32, 32, 3, 3), "8.weight": (4, 128)}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.5, centered=True),
}
CRITERIA = ["magnitude", "set", "rigl"]
GRANULARITIES = ["weight", "channel"]


def made(
    criterion: str, granularity: str, model: nn.Module | None = None, kind: str = "sgd", **how
) -> tuple[nn.Module, torch.optim.Optimizer, SparseTraining]:
    model = model or wide()
    optimizer = OPTIMIZERS[kind](model.parameters())
    how = {"budget": compressor.Budget(0.6), "total_steps": 40, "prune_every": 5, **how}
    config = SparseConfig(granularity, how.pop("allocate", None))
    training = SparseTraining(model, X, criterion, optimizer=optimizer, config=config, **how)
    return model, optimizer, training


def steps(training: SparseTraining, optimizer: torch.optim.Optimizer, numbers: range) -> Iterator[dict | None]:
    """Take steps as a loop of one's own does; yields what every `step` returns, before gradients are cleared."""
    for number in numbers:
        x, y = batches(40)[number]
        training.loss(x, y, F.cross_entropy).backward()
        optimizer.step()
        yield training.step()
        optimizer.zero_grad()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, name: str) -> list[Tensor]:
    """The weight and everything of its shape that the optimizer keeps for it."""
    weight = dict(model.named_parameters())[name]
    kept = [each for each in optimizer.state.get(weight, {}).values() if isinstance(each, Tensor)]
    return [weight.detach(), *(each for each in kept if each.shape == weight.shape)]


# -- masks hold


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_masked_weights_and_their_state_are_zero_after_every_step(criterion: str, kind: str) -> None:
    model, optimizer, training = made(criterion, "weight", kind=kind)
    states = set()
    for _ in steps(training, optimizer, range(40)):
        for name, mask in training.masks.items():
            for value in state_of(model, optimizer, name):
                assert not value[~mask].any()
            states.add(len(state_of(model, optimizer, name)))
    assert min(states) > 1
    assert training.result().reached
    assert sum(int((~mask).sum()) for mask in training.masks.values()) == math.ceil(0.6 * 10592)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_masked_step_is_the_step_of_masked_gradients(criterion: str, granularity: str) -> None:
    """The oracle masks every gradient before the optimizer sees it, and never touches weights or state again."""
    model, optimizer, training = made(criterion, granularity, shake(wide()).float(), prune_every=4)
    list(steps(training, optimizer, range(4)))  # masks changed in the last of them
    oracle = copy.deepcopy(model)
    other = OPTIMIZERS["sgd"](oracle.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    zeros = training.units.zeros()
    for number, _ in zip(range(4, 7), steps(training, optimizer, range(4, 7)), strict=True):
        x, y = batches(40)[number]
        F.cross_entropy(oracle(x), y).backward()
        for name, parameter in oracle.named_parameters():
            if name in zeros:
                parameter.grad.masked_fill_(zeros[name], 0)
        other.step()
        other.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), oracle.parameters(), strict=True))


@pytest.mark.parametrize("criterion", ["set", "rigl"])
def test_rewiring_leaves_kept_weights_alone_and_begins_new_ones_at_zero(criterion: str, monkeypatch) -> None:
    model, optimizer, training = made(criterion, "weight")
    x = iter(steps(training, optimizer, range(40)))
    for _ in range(4):
        next(x)
    seen: dict[str, dict] = {}
    enforce = training.units.enforce

    def watched() -> None:
        enforce()
        if not seen:  # after the optimizer's step, before the masks change
            seen["masks"] = {name: mask.clone() for name, mask in training.masks.items()}
            seen["state"] = {name: [v.clone() for v in state_of(model, optimizer, name)] for name in training.masks}
            seen["grad"] = {n: p.grad.abs().clone() for n, p in model.named_parameters()}

    monkeypatch.setattr(training.units, "enforce", watched)
    event = next(x)
    assert event is not None
    assert event["changed"] > 0
    for name, after in training.masks.items():
        before, values = seen["masks"][name], state_of(model, optimizer, name)
        assert int(after.sum()) == int(before.sum())
        new, stays, lost = after & ~before, after & before, before & ~after
        for value, old in zip(values, seen["state"][name], strict=True):
            assert torch.equal(value[stays], old[stays])
            assert not value[new].any()
            assert not value[lost].any()
        if criterion == "rigl" and new.any():
            assert seen["grad"][name][new].min() >= seen["grad"][name][~after].max()
            weights = seen["state"][name][0].abs()
            assert weights[lost].max() <= weights[stays & ~new].max()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_magnitude_only_ever_switches_off_and_what_is_smallest(granularity: str) -> None:
    _, optimizer, training = made("magnitude", granularity)
    before = training.masks
    assert all(mask.all() for mask in before.values())
    shares = []
    for event in steps(training, optimizer, range(26)):
        if event and event["event"] == "masks":
            assert not any((mask & ~before[name]).any() for name, mask in training.masks.items())
            before = training.masks
            shares.append(event["off"])
    assert shares == sorted(shares)
    assert len(shares) > 3


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_a_weight_that_is_zero_but_on_does_not_change_places_with_one_that_is_off(allocation: str) -> None:
    model = wide()
    training = made("magnitude", "weight", model, allocate=allocation)[2]
    training.units.set_masks(training.units.dropped(0.5))
    before = training.masks
    for parameter in model.parameters():
        parameter.data.zero_()
    after = training.units.dropped(0.8)
    assert not any((after[name] & ~before[name]).any() for name in after)
    assert sum(int((~mask).sum()) for mask in after.values()) == math.ceil(0.6 * 0.8 * 10592)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_magnitude_switches_nothing_on_again_when_a_schedule_turns_back(granularity: str) -> None:
    training = made("magnitude", granularity)[2]
    training.units.set_masks(training.units.dropped(1.0))
    assert same(training.units.dropped(0.3), training.masks)


@pytest.mark.parametrize("allocation", ["global", "erk", "uniform"])
def test_magnitude_keeps_the_largest_weights_of_the_model_or_of_each_layer(allocation: str) -> None:
    model = wide()
    training = made("magnitude", "weight", model, allocate=allocation)[2]
    weights = {name: parameter.detach().abs() for name, parameter in model.named_parameters() if name in training.masks}
    masks = training.units.dropped(1.0)
    least = {name: float(weights[name][mask].min()) for name, mask in masks.items()}
    most = {name: float(weights[name][~mask].max()) for name, mask in masks.items() if not mask.all()}
    shares = [float((~mask).float().mean()) for mask in masks.values()]
    assert sum(int((~mask).sum()) for mask in masks.values()) == math.ceil(0.6 * 10592)
    assert all(most[name] <= least[name] for name in most)
    if allocation == "global":
        assert max(most.values()) <= min(least.values())
    elif allocation == "uniform":
        assert shares[0] == 0
        assert shares[1] == pytest.approx(shares[2], abs=0.002)
    else:
        assert shares == pytest.approx(list(erdos_renyi(SHAPES, 0.6).values()), abs=0.002)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_norms_biases_and_frozen_weights_are_never_masked(criterion: str) -> None:
    model = wide()
    model[3].weight.requires_grad_(False)
    _, optimizer, training = made(criterion, "weight", model, allocate="erk", budget=compressor.Budget(0.1))
    frozen = model[3].weight.clone()
    list(steps(training, optimizer, range(10)))
    assert list(training.masks) == ["0.weight", "8.weight"]
    assert torch.equal(model[3].weight, frozen)


def test_evaluation_in_the_middle_sees_the_same_weights_and_no_hook_is_left() -> None:
    model, optimizer, training = made("rigl", "channel")
    list(steps(training, optimizer, range(7)))
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(model.eval()(x), copy.deepcopy(model)(x))
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._backward_hooks for m in model.modules())
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())


# -- channels


@torch.no_grad()
@pytest.mark.parametrize("criterion", ["set", "rigl"])
def test_a_channel_that_is_off_is_a_channel_that_was_cut(criterion: str) -> None:
    model, optimizer, training = made(criterion, "channel", round_to=4)
    with torch.enable_grad():
        list(steps(training, optimizer, range(7)))
    model.double().eval()
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    graph = compressor.trace(copy.deepcopy(model), x[:1])
    compressor.cut(graph, {name: mask.nonzero().flatten() for name, mask in training.masks.items()})
    assert any(not mask.all() for mask in training.masks.values())
    assert relative_error(graph.model(x), model(x)) <= 1e-12


@torch.no_grad()
def test_channels_side_by_side_in_one_consumer_are_masked_each_for_itself() -> None:
    model = shake(Branches())
    x = torch.randn(5, 3, 9, 9, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters())
    training = SparseTraining(
        model,
        x[:1],
        "rigl",
        compressor.Budget(0.3),
        optimizer=optimizer,
        total_steps=400,
        config=SparseConfig(granularity="channel"),
    )
    off = {"a": [1, 2], "b": [0, 4], "c": [3], "fc": [5]}
    training.units.set_masks({name: _without(mask, off[name]) for name, mask in training.masks.items()})
    graph = compressor.trace(copy.deepcopy(model), x[:1])
    compressor.cut(graph, {name: mask.nonzero().flatten() for name, mask in training.masks.items()})
    assert relative_error(graph.model(x), model(x)) <= 1e-12


def _without(mask: Tensor, channels: list[int]) -> Tensor:
    return mask.index_fill(0, torch.tensor(channels), False)


def test_a_channel_that_grows_changes_nothing_at_first() -> None:
    model, optimizer, training = made("rigl", "channel", round_to=1)
    list(steps(training, optimizer, range(4)))
    masks, x = training.masks, torch.randn(4, 3, 8, 8)
    next(iter(steps(training, optimizer, range(4, 5))))
    new = {name: mask & ~masks[name] for name, mask in training.masks.items()}
    assert any(mask.any() for mask in new.values())
    expected = model.eval()(x)
    training.units.set_masks({name: mask & masks[name] for name, mask in training.masks.items()})
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("measure", ["params", "macs", "channels"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_channels_meet_the_budget_in_its_measure(criterion: str, measure: str) -> None:
    model, optimizer, training = made(
        criterion, "channel", budget=compressor.Budget(0.5, measure), round_to=1, allocate="uniform"
    )
    events = [event for event in steps(training, optimizer, range(40)) if event]
    result = training.result()
    assert (result.reached, result.measure, result.blocked) == (True, measure, ())
    assert 0.5 <= result.removed < 0.55
    assert result.params[1] == sum(p.numel() for p in model.parameters())
    assert [event["event"] for event in events] == ["masks"] * (len(events) - 1) + ["cut"]
    assert events[-1]["widths"] == {name: list(pair) for name, pair in result.widths.items()}
    assert {id(p) for p in model.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}


def test_a_group_whose_cut_is_refused_is_never_masked() -> None:
    from test_surgery import Baked

    model = Baked()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    training = SparseTraining(
        model,
        X,
        "rigl",
        compressor.Budget(0.2),
        optimizer=optimizer,
        total_steps=40,
        prune_every=5,
        round_to=1,
        config=SparseConfig(granularity="channel"),
    )
    next(steps(training, optimizer, range(1)))
    assert list(training.masks) == ["b"]
    list(steps(training, optimizer, range(1, 40)))
    result = training.result()
    assert result.reached
    assert result.widths["a"] == (8, 8)
    assert result.widths["b"][1] < 6


class Attending(nn.Module):
    """Queries and keys meet without a weight; a LayerNorm mixes the channels of `wide`; nobody looks at `idle`."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.idle = (nn.Linear(3, 6) for _ in range(4))
        self.wide, self.norm, self.out = nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        self.idle(x)
        seen = torch.tanh(self.q(x)) @ torch.tanh(self.k(x)).transpose(1, 2) @ self.v(x)
        return self.out(self.norm(self.wide(seen))).mean(1)


def test_groups_whose_channels_cannot_be_switched_are_frozen_with_the_reason() -> None:
    budget = compressor.Budget(0.1, "channels")
    _, optimizer, training = made("rigl", "channel", Attending(), round_to=1, budget=budget)
    list(steps(training, optimizer, range(40)))
    assert list(training.masks) == ["v"]
    reasons = {each.tensor: each.reason for each in training.graph.frozen}
    assert reasons["idle.weight"] == (
        "nothing reads these channels in evaluation mode, or what does is hidden from the trace"
    )
    for name in ("q.weight", "norm.weight"):
        assert reasons[name] == "a channel that is off is not one that was cut: others depend on it"


def test_masks_on_weights_leave_such_groups_whole_however_empty() -> None:
    _, _, training = made("rigl", "weight", Attending())
    masks = {name: mask.clone() for name, mask in training.masks.items()}
    for name in ("q", "k", "v", "wide", "idle"):
        masks[f"{name}.weight"][2] = False
    training.units.set_masks(masks)
    training.units.cut()
    assert {name: after for name, (_, after) in training.result().widths.items()} == {
        "q": 6, "v": 5, "wide": 10,
    }  # fmt: skip


def test_erk_on_channels_gives_every_group_a_density_in_proportion() -> None:
    model = nn.Sequential(
        *[nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 100, 3, padding=1), nn.ReLU()],
        *[nn.Conv2d(100, 120, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(120, 4)],
    )
    _, optimizer, training = made("set", "channel", model, round_to=1, budget=compressor.Budget(0.5, "channels"))
    next(steps(training, optimizer, range(1)))
    density = {name: float(mask.float().mean()) for name, mask in training.masks.items()}
    raw = {"2": (64 + 100 + 6) / (64 * 100 * 9), "4": (100 + 120 + 2) / (100 * 120)}
    assert density["0"] == 1
    assert sum(int(mask.sum()) for mask in training.masks.values()) == 142
    scale = {name: density[name] / raw[name] for name in raw}
    assert density["2"] == pytest.approx(0.1, abs=0.011)  # its share would be 0.09: the floor of every group
    assert scale["2"] == pytest.approx(scale["4"], rel=0.3)


def test_channels_refuse_a_budget_that_they_cannot_meet() -> None:
    _, optimizer, training = made("rigl", "channel", budget=compressor.Budget(0.99))
    with pytest.raises(BudgetError, match=r"cannot remove 99.0% of the params: at most"):
        next(steps(training, optimizer, range(1)))


# -- channels without weight


def plain(padding: int) -> nn.Sequential:
    """Biases and BatchNorm make a channel without weight a constant, not a zero."""
    return nn.Sequential(
        *[nn.Conv2d(3, 6, 3, padding=padding), nn.BatchNorm2d(6), nn.Sigmoid()],
        *[nn.Conv2d(6, 5, 3, padding=padding), nn.BatchNorm2d(5), nn.ReLU()],
        *[nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 7), nn.Tanh(), nn.Linear(7, 4)],
    )


def emptied(padding: int) -> tuple[nn.Module, SparseTraining]:
    """Channels 1 and 4 of group '0' have no reader and no writer; 0 of '8' loses its reader, and 2 of '3' its writers.

    Channel 3 of group '3' then has only channels without weight to read, and is a constant too.
    """
    model = shake(plain(padding))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = SparseTraining(
        model, X.double(), "magnitude", compressor.Budget(0.1), optimizer=optimizer, total_steps=20
    )
    masks = {name: mask.clone() for name, mask in training.masks.items()}
    masks["3.weight"][:, 1] = False
    masks["0.weight"][4] = False
    masks["10.weight"][:, 0] = False
    masks["3.weight"][2] = False
    masks["3.weight"][3, [0, 2, 3, 5]] = False
    training.units.set_masks(masks)
    return model, training


@torch.no_grad()
def test_channels_without_weight_are_cut_and_their_constants_folded_exactly() -> None:
    model, training = emptied(padding=0)
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    expected = model(x)
    training.units.cut()
    assert training.graph.sizes() == {"0": 4, "3": 3, "8": 6}
    assert relative_error(model(x), expected) <= 1e-12
    assert {name: tuple(mask.shape) for name, mask in training.masks.items()} == {
        name: tuple(p.shape) for name, p in model.named_parameters() if name in training.masks
    }
    assert all(mask.all() for mask in training.masks.values())


def test_what_an_empty_channel_alone_reads_is_empty_too() -> None:
    _, training = emptied(padding=0)
    masks = {name: torch.ones_like(mask) for name, mask in training.masks.items()}
    masks["10.weight"][:, 5] = False  # nobody reads channel 5 of '8' ...
    masks["8.weight"][[0, 1, 2, 3, 4, 6], 4:8] = False  # ... which alone reads channel 1 of '3' ...
    masks["3.weight"][[0, 2, 3, 4], 2] = False  # ... which alone reads channel 2 of '0'
    empty = without_weight(training.graph, masks)
    assert {name: gone.nonzero().flatten().tolist() for name, gone in empty.items()} == {"0": [2], "3": [1], "8": [5]}


@torch.no_grad()
def test_with_padding_a_constant_is_folded_but_for_the_border() -> None:
    model, training = emptied(padding=1)
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    kept, dense = [0, 1, 4], model[:5]
    expected = dense(x)[:, kept]
    training.units.cut()
    assert relative_error(dense(x)[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1]) <= 1e-12
    assert relative_error(dense(x), expected) > 1e-6


def test_the_last_channel_of_a_group_is_never_cut() -> None:
    model, training = emptied(padding=0)
    masks = {name: mask.clone() for name, mask in training.masks.items()}
    masks["0.weight"][:] = False
    training.units.set_masks(masks)
    training.units.cut()
    assert all(size >= 1 for size in training.graph.sizes().values())
    assert model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).shape == (2, 4)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_very_sparse_weights_empty_channels_that_are_cut_in_training(criterion: str) -> None:
    model, optimizer, training = made(criterion, "weight", budget=compressor.Budget(0.97), allocate="erk")
    events = [event for event in steps(training, optimizer, range(40)) if event]
    result = training.result()
    assert events[-1]["event"] == "cut"
    assert result.measure == "weights"
    assert result.reached
    assert result.channels[1] < 64
    assert result.params[1] == sum(p.numel() for p in model.parameters())
    assert f"{64 - result.channels[1]} of 64 channels ended without a weight and are cut" in result.notes[0]
    for name, mask in training.masks.items():
        assert not dict(model.named_parameters())[name][~mask].any()


# -- going on


@pytest.mark.parametrize("stop", [7, 37])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_run_that_is_taken_up_again_goes_on_as_if_nothing_had_happened(
    criterion: str, granularity: str, stop: int
) -> None:
    how = {"budget": compressor.Budget(0.97), "allocate": "erk"} if granularity == "weight" else {}
    model, optimizer, training = made(criterion, granularity, **how)
    list(steps(training, optimizer, range(stop)))
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), training.state_dict()))
    first = list(steps(training, optimizer, range(stop, 40)))
    again = wide()
    restore(again, kept[0])
    _, other, resumed = made(criterion, granularity, again, **how)
    other.load_state_dict(kept[1])
    resumed.load_state_dict(kept[2])
    assert list(steps(resumed, other, range(stop, 40))) == first
    assert same(everything(model, optimizer), everything(again, other))
    assert resumed.result() == training.result()
    assert same(resumed.masks, training.masks)


def restore(model: nn.Module, saved: dict[str, Tensor]) -> None:
    from test_surgery import restore_shapes

    restore_shapes(model, {name: tuple(tensor.shape) for name, tensor in saved.items()})
    model.load_state_dict(saved)


def test_the_state_is_plain_and_survives_a_file(tmp_path) -> None:
    _, optimizer, training = made("set", "weight")
    list(steps(training, optimizer, range(6)))
    torch.save(training.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert same(state["masks"], training.masks)


def test_a_state_of_another_method_or_model_is_refused() -> None:
    training = made("set", "weight")[2]
    with pytest.raises(InputError, match="this state is of criterion 'set', not 'rigl'"):
        made("rigl", "weight")[2].load_state_dict(training.state_dict())
    other = made("set", "weight", nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)))[2]
    with pytest.raises(InputError, match="this state is of another model"):
        other.load_state_dict(training.state_dict())


def test_the_same_seed_draws_the_same_and_another_seed_another() -> None:
    drawn = []
    for seed in (1, 1, 2):
        _, optimizer, training = made("set", "weight", seed=seed)
        list(steps(training, optimizer, range(6)))
        drawn.append(training.masks)
    assert same(drawn[0], drawn[1])
    assert not same(drawn[0], drawn[2])


# -- bad input


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"criterion": "rigel"}, UnknownNameError, "unknown criterion 'rigel': did you mean 'rigl'"),
        ({"granularity": "chanel"}, UnknownNameError, "unknown granularity 'chanel': did you mean 'channel'"),
        ({"allocate": "erc"}, UnknownNameError, "unknown allocation 'erc': did you mean 'erk'"),
        ({"allocate": "global"}, InputError, "rigl begins at random, so there is nothing to rank"),
        ({"round_to": 8}, InputError, "round_to has no effect with granularity 'weight'"),
        ({"budget": compressor.Budget(0.5, "macs")}, InputError, "a budget of macs cannot be met by single weights"),
        (
            {"schedule": compressor.OneShot(0.5)},
            InputError,
            "schedule has no effect with rigl, which is sparse from the beginning",
        ),
        ({"total_steps": 100, "prune_every": 80}, InputError, "rigl changes its masks every 80 steps until 75% of 100"),
        ({"total_steps": 0}, RangeError, "total_steps = 0 is out of range"),
        (
            {"criterion": "set", "prune_every": None},
            InputError,
            "set changes its masks once an epoch: give prune_every",
        ),
    ],
)
def test_bad_arguments_say_what_to_type(how: dict, error: type, message: str) -> None:
    how = {"criterion": "rigl", "granularity": "weight", **how}
    with pytest.raises(error, match=message):
        made(**how)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_an_optimizer_that_does_not_hold_the_weights_is_refused(granularity: str) -> None:
    model, other = wide(), wide()
    message = r"the optimizer does not hold '\d.weight'.*make it from model.parameters\(\) of the very model"
    with pytest.raises(InputError, match=message):
        SparseTraining(
            model,
            X,
            optimizer=torch.optim.SGD(other.parameters()),
            total_steps=400,
            config=SparseConfig(granularity=granularity),
        )


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_model_with_nothing_to_mask_is_refused(granularity: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())
    with pytest.raises(InputError, match=r"nothing to mask|no channel that can be switched off"):
        made("rigl", granularity, model)


def test_step_needs_the_gradients_of_the_step() -> None:
    _, optimizer, training = made("rigl", "weight", prune_every=1)
    training.loss(*batches(1)[0], F.cross_entropy).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(
        InputError, match=r"step\(\) found no gradients: call it after backward\(\) and before zero_grad"
    ):
        training.step()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_limits_say_which_groups_lose_channels(criterion: str) -> None:
    limits = compressor.Limits(keep=["0"])
    _, optimizer, training = made(criterion, "channel", limits=limits, round_to=1, budget=compressor.Budget(0.4))
    list(steps(training, optimizer, range(40)))
    assert training.result().reached
    assert training.result().widths["0"] == (32, 32)
    with pytest.raises(InputError, match="limits has no effect with granularity 'weight'"):
        made(criterion, "weight", limits=limits)


def test_a_buffer_that_is_not_saved_is_cut_along() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(3, 6), nn.Linear(4, 2)
            self.register_buffer("p", torch.randn(6, 4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.a(x)) @ self.p)

    torch.manual_seed(0)
    model, x, y = Projected(), torch.randn(8, 3), torch.arange(8) % 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = SparseTraining(model, x, "magnitude", 0.2, optimizer=optimizer, total_steps=20)
    for _ in range(20):
        training.loss(x, y, F.cross_entropy).backward()
        optimizer.step()
        training.step()
        optimizer.zero_grad()
    assert len(model.p) == model.a.out_features
