"""Promises 2 and 4: all or nothing; parameters stay the same objects and optimizer state is sliced along."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import random_keep, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor.errors import CutError, InputError, UnknownNameError
from compressor.graph import restore_shapes


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 4),
    )


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=generator)
    y = torch.randint(4, (5,), generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(model.train()(x), y).backward()
    optimizer.step()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {f"model.{k}": v.clone() for k, v in model.state_dict().items()}
    for name, p in model.named_parameters():
        if p.grad is not None:
            state[f"grad.{name}"] = p.grad.clone()
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                state[f"opt.{name}.{key}"] = value.clone()
    return state


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0.2, 0.9))
def test_a_step_after_a_cut_is_the_step_of_a_model_built_small(kind: str, seed: int, share: float) -> None:
    """The oracle is built from slices of the state dicts, never by surgery."""
    torch.manual_seed(seed)
    model = shake(small(), seed)
    optimizer = OPTIMIZERS[kind](model.parameters())
    for step in range(3):
        train_step(model, optimizer, step)
    graph = compressor.trace(model, torch.randn(1, 3, 8, 8, dtype=torch.float64))
    keep = {name: kept.sort().values for name, kept in random_keep(graph, share, seed).items()}
    oracle, oracle_optimizer = built_small(model, optimizer, keep["0"], keep["3"], OPTIMIZERS[kind])
    identities = [id(p) for p in model.parameters()]
    compressor.cut(graph, keep, optimizer)
    assert [id(p) for p in model.parameters()] == identities
    for step in range(10, 12):
        train_step(model, optimizer, step)
        train_step(oracle, oracle_optimizer, step)
    assert same(everything(model, optimizer), everything(oracle, oracle_optimizer))


def built_small(model, optimizer, first, second, make):
    """Write the small network by hand, and copy slices of weights and optimizer state into it."""
    a, b = len(first), len(second)
    oracle = nn.Sequential(
        *[nn.Conv2d(3, a, 3, bias=False), nn.BatchNorm2d(a), nn.ReLU()],
        *[nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()],
        *[nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * b, 4)],
    ).double()
    columns = (second[:, None] * 4 + torch.arange(4)).flatten()

    def sliced(name: str, value: Tensor) -> Tensor:
        if value.dim() == 0:
            return value.clone()
        layer = int(name.split(".")[0])
        rows = {0: first, 1: first, 3: second, 4: second}.get(layer)
        value = value if rows is None else value[rows]
        if name == "3.weight":
            value = value[:, first]
        return value[:, columns].clone() if name == "8.weight" else value.clone()

    oracle.load_state_dict({name: sliced(name, value) for name, value in model.state_dict().items()})
    small_optimizer = make(oracle.parameters())
    old = dict(model.named_parameters())
    for name, p in oracle.named_parameters():
        small_optimizer.state[p] = {
            key: sliced(name, value) if isinstance(value, Tensor) else value
            for key, value in optimizer.state[old[name]].items()
        }
    return oracle, small_optimizer


def test_every_live_parameter_moves_after_a_cut() -> None:
    model = shake(small())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train_step(model, optimizer, 0)
    graph = compressor.trace(model, torch.randn(1, 3, 8, 8, dtype=torch.float64))
    compressor.cut(graph, random_keep(graph), optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    train_step(model, optimizer, 1)
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_that_is_still_held_does_not_keep_the_old_shapes(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    x, y = torch.randn(5, 3, 8, 8, dtype=dtype), torch.randint(4, (5,))
    held = F.cross_entropy(model(x), y)
    held.backward()
    graph = compressor.trace(model, x)
    compressor.cut(graph, {"0": [0, 3, 4], "3": [1, 2]})
    assert all(p.dtype == dtype and p.grad.shape == p.shape for p in model.parameters())
    F.cross_entropy(model(x), y).backward()
    assert held.grad_fn is not None


class Baked(nn.Module):
    """Says the number of its channels in Python code, where no trace can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x.view(x.shape[0], 8, -1).view(x.shape[0], 8, *x.shape[2:])
        return self.fc(self.b(x).mean((2, 3)))


def test_a_size_in_python_code_is_refused_and_nothing_is_changed() -> None:
    model = Baked().double()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train_step(model, optimizer, 0)
    graph = compressor.trace(model, torch.randn(1, 3, 8, 8, dtype=torch.float64))
    before, groups = everything(model, optimizer), graph.groups
    with pytest.raises(
        CutError, match=r"aten.view in the model does not follow the cut.*nothing was changed"
    ) as caught:
        compressor.cut(graph, {"a": [0, 1, 2], "b": [0, 1]}, optimizer)
    assert caught.value.groups == ("a",)
    assert same(everything(model, optimizer), before)
    assert graph.groups is groups
    assert model.a.out_channels == 8
    compressor.cut(graph, {"b": [0, 1]}, optimizer)
    assert model.fc.in_features == 2


class Factored(torch.optim.SGD):
    """Keeps one number per row, which does not say what belongs to an input channel."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["row"] = p.detach().flatten(1).sum(1) if p.dim() > 1 else p.detach().clone()


def test_an_optimizer_whose_state_cannot_follow_is_refused() -> None:
    model = shake(small())
    optimizer = Factored(model.parameters(), lr=0.1)
    optimizer.step()
    before = everything(model, optimizer)
    graph = compressor.trace(model, torch.randn(1, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(CutError, match=r"Factored keeps 'row' of shape \(8,\) for '0.weight'"):
        compressor.cut(graph, {"0": [1, 2]}, optimizer)
    assert same(everything(model, optimizer), before)


class Wrapping(torch.optim.Optimizer):
    """A base optimizer inside, and a copy of every weight, as SAM has them."""

    def __init__(self, params, base, **how):
        super().__init__(params, how)
        self.base = base(self.param_groups, **how)
        self.param_groups = self.base.param_groups

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.detach().clone()
        self.base.step()


def test_the_optimizer_inside_another_is_cut_along() -> None:
    model = shake(small()).train()
    optimizer = Wrapping(model.parameters(), torch.optim.Adam, lr=0.1)
    for keep in (None, {"0": [1, 2]}, {"0": [0]}):
        if keep:
            compressor.cut(compressor.trace(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64)), keep, optimizer)
        model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weight = model[0].weight
    assert {optimizer.state[weight]["old"].shape, optimizer.base.state[weight]["exp_avg"].shape} == {weight.shape}


class Listing(torch.optim.SGD):
    """Keeps a list of tensors for a weight, as preconditioned optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["factors"] = [torch.eye(size) for size in p.shape]


HOPELESS = {
    "LBFGS": (torch.optim.LBFGS, "LBFGS keeps '"),
    "Adafactor": (torch.optim.Adafactor, "Adafactor keeps 'row_var' of shape"),
    "a list": (Listing, "Listing keeps 'factors', a list of tensors, for a weight"),
}


@pytest.mark.parametrize("name", HOPELESS)
@pytest.mark.parametrize("criterion", ["l1", "rigl"])
def test_an_optimizer_that_no_cut_can_follow_is_refused_before_the_first_step(name: str, criterion: str) -> None:
    model = small().double()
    kind, message = HOPELESS[name]
    optimizer = kind(model.parameters(), lr=0.1)
    make = compressor.Pruner if criterion == "l1" else compressor.SparseTraining
    with pytest.raises(InputError, match=message):
        make(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64), criterion, 0.3, optimizer=optimizer, total_steps=1000)


def test_a_list_in_the_state_is_refused_by_a_single_cut() -> None:
    model = small().double()
    optimizer = Listing(model.parameters(), lr=0.1)
    optimizer.step()
    graph = compressor.trace(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(CutError, match="Listing keeps 'factors', a list of tensors, for"):
        compressor.cut(graph, {"0": [1, 2]}, optimizer)


@pytest.mark.parametrize("mode", [torch.inference_mode(), torch.autocast("cpu"), torch.no_grad()])
def test_a_cut_inside_of_other_modes_leaves_parameters_that_train(mode) -> None:
    model, x = small().float(), torch.randn(2, 3, 8, 8)
    with mode:
        assert compressor.prune(model, x, "l1", 0.4, verify=True).reached
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model.train()(x).sum().backward()


def test_the_order_in_memory_stays() -> None:
    model = small().double().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model(x).sum().backward()
    optimizer.step()
    graph = compressor.trace(model, x)
    compressor.cut(graph, {name: range(1, size, 2) for name, size in graph.sizes().items()}, optimizer)
    convs = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    for weight in convs:
        for each in (weight, weight.grad, optimizer.state[weight]["momentum_buffer"]):
            assert each.is_contiguous(memory_format=torch.channels_last)
    assert any(not weight.is_contiguous() for weight in convs)


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ({"1": [0]}, UnknownNameError, "unknown group '1'"),
        ({"0": []}, InputError, "at least one of its 8 channels must stay"),
        ({"0": [0, 8]}, InputError, "holds index 8: give 0 to 7"),
        ({"0": [-1]}, InputError, "holds index -1: give 0 to 7"),
        ({"0": [1, 1]}, InputError, "names a channel twice"),
        ({"0": torch.ones(8, dtype=torch.bool)}, InputError, "give the channel indices that stay, as integers"),
        ({"3": [0, 1], "0": [9]}, InputError, "holds index 9"),
    ],
)
def test_bad_keeps_say_what_to_type_and_change_nothing(keep, error, message) -> None:
    model = shake(small())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    before = everything(model, optimizer)
    graph = compressor.trace(model, torch.randn(1, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(error, match=message.replace("(", r"\(")):
        compressor.cut(graph, keep, optimizer)
    assert same(everything(model, optimizer), before)


def test_keeping_everything_changes_nothing() -> None:
    model = shake(small())
    graph = compressor.trace(model, torch.randn(1, 3, 8, 8, dtype=torch.float64))
    data = [p.data_ptr() for p in model.parameters()]
    compressor.cut(graph, {group.name: torch.arange(group.size) for group in graph.groups})
    assert [p.data_ptr() for p in model.parameters()] == data


def test_folding_a_constant_channel_changes_nothing() -> None:
    """A channel that always has its mean is replaced by it exactly: no padding, so no border effects."""
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    shake(model)
    with torch.no_grad():
        model[0].weight[1] = 0
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = model(x)
    graph = compressor.trace(model, x)
    means = {"1.weight": model[0].bias.detach().clone()}
    compressor.cut(graph, {"0": [0, 2, 3, 4]}, means=means)
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_folding_reaches_the_bias_or_the_running_mean(bias: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1, bias=bias), nn.BatchNorm2d(4), nn.ReLU())
    model.append(nn.Flatten()).append(nn.Linear(256, 2))
    shake(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = compressor.trace(model, x)
    mean = model[0](x).mean((0, 2, 3)).detach()
    oracle = copy.deepcopy(model)

    def replaced(module, args):
        h = args[0].clone()
        h[:, 2] = mean[2]
        return (h,)

    oracle[1].register_forward_pre_hook(replaced)
    compressor.cut(graph, {"0": [0, 1, 3, 4]}, means={"1.weight": mean})
    assert torch.allclose(model(x), oracle(x), rtol=0, atol=1e-12)


def test_restore_shapes_gives_the_structure_of_a_cut_model() -> None:
    model = shake(small())
    graph = compressor.trace(model, torch.randn(1, 3, 8, 8, dtype=torch.float64))
    compressor.cut(graph, random_keep(graph))
    other = small().double().eval()
    restore_shapes(other, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(model(x), other(x))
    assert str(model) == str(other)
    with pytest.raises(InputError, match=r"belong to another model: .0\.weight. is only in one"):
        restore_shapes(other, dict.fromkeys(list(model.state_dict())[1:], (1,)))


def test_a_copy_follows_and_stays_a_copy_of_its_own() -> None:
    """The oracle: cutting the copy by itself."""
    model = shake(small())
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        for parameter in average.module.parameters():
            parameter.mul_(0.9)
    alone = copy.deepcopy(average.module)
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    graph, other = compressor.trace(model, x), compressor.trace(alone, x)
    keep = random_keep(graph)
    compressor.cut(graph, keep, copies=[average.module])
    compressor.cut(other, keep)
    assert same(dict(average.module.state_dict()), dict(alone.state_dict()))
    assert str(average.module) == str(model)
    train_step(model, OPTIMIZERS["sgd"](model.parameters()), 0)
    average.update_parameters(model)
    assert average.module.train()(x.repeat(2, 1, 1, 1)).shape == (2, 4)


def test_a_refused_cut_leaves_the_copy_alone_and_a_stranger_is_refused() -> None:
    model = Baked().double()
    graph = compressor.trace(model, torch.randn(1, 3, 8, 8, dtype=torch.float64))
    average = copy.deepcopy(model)
    before = copy.deepcopy(average.state_dict())
    with pytest.raises(CutError):
        compressor.cut(graph, {"a": [0, 1]}, copies=[average])
    assert same(dict(average.state_dict()), dict(before))
    with pytest.raises(InputError, match=r"Sequential is no copy of the model: '0.weight' is \(8, 3, 3, 3\) there"):
        compressor.cut(graph, {"b": [0, 1]}, copies=[small()])


def test_numbers_of_a_copy_that_are_no_sizes_are_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(0.5), nn.Conv2d(8, 2, 1))
    average = copy.deepcopy(model)
    average[1].p = 0.0
    graph = compressor.trace(model, torch.randn(1, 3, 2, 2))
    compressor.cut(graph, {"0": torch.arange(2)}, copies=[average])
    assert (average[1].p, average[0].out_channels, average[2].in_channels) == (0.0, 2, 2)
