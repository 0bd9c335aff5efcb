"""Relevance of trained networks: gates against gradients by hand, and planted channels that no other criterion sees."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import relative_error, shake
from test_surgery import same, small
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor.errors import IdleArgumentError, InputError, RangeError
from compressor.relevance import gate_relevance
from compressor.surgery import Moments, input_means, input_moments


def pairs(count: int = 3, size: int = 20) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, 8, 8, dtype=torch.float64, generator=generator), torch.arange(size) % 3)
        for _ in range(count)
    ]


X = pairs()[0][0]


def inputs(batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [x for x, _ in batches]


class Planted(nn.Module):
    """Eight channels that a Linear reads after pooling: 5 copies 0, 6 is 1 + 2, 7 is read by nobody."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.write, self.read = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        with torch.no_grad():
            for tensor in (self.write.weight, self.write.bias):
                tensor[5] = tensor[0]
                tensor[6] = tensor[1] + tensor[2]
            self.read.weight[:, 7] = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.write(x).square().mean((2, 3)) if self.squared else self.write(x).mean((2, 3)))

    squared = False


def by_hand(model: nn.Module, x: Tensor, y: Tensor, mean: Tensor) -> Tensor:
    """Return the slope of every sample's loss by gates `z` at 1, with `h <- mu + z (h - mu)`, `(B, C)`."""
    gates = torch.ones(len(x), 8, dtype=torch.float64, requires_grad=True)
    h = model.write(x).mean((2, 3)).detach()
    losses = F.cross_entropy(model.read(mean + gates * (h - mean)), y, reduction="none")
    return torch.autograd.grad(losses.sum(), gates)[0]


@pytest.mark.parametrize("towards_mean", [False, True])
def test_gates_are_those_by_hand(towards_mean: bool) -> None:
    model, batches = Planted(), pairs()
    graph = compressor.trace(model, batches[0][0])
    means = input_means(graph, inputs(batches)) if towards_mean else {}
    found = gate_relevance(graph, batches, F.cross_entropy, Moments.of(means))["write"]
    mean = means.get("read.weight", torch.zeros(8, dtype=torch.float64))
    slopes = torch.cat([by_hand(model, x, y, mean) for x, y in batches])
    torch.testing.assert_close(found, slopes.square().mean(0) / 2)


def test_what_the_others_predict_is_worth_nothing() -> None:
    model, batches = Planted(), pairs()
    graph = compressor.trace(model, batches[0][0])
    moments = input_moments(graph, inputs(batches))
    plain = gate_relevance(graph, batches, F.cross_entropy, Moments(moments.means))["write"]
    found = gate_relevance(graph, batches, F.cross_entropy, moments)["write"]
    copied, alone = [0, 5, 1, 2, 6], [3, 4]
    assert plain[copied].min() > 0.01 * plain.max()  # by themselves they all matter
    assert found[copied].max() < 1e-6 * found[alone].min()
    assert found[7] < 1e-20


def test_residual_readers_add_up() -> None:
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.write, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.write(x)
            return (self.a(h) - self.b(h)).mean((2, 3))

    model = Two().double()
    with torch.no_grad():
        model.b.weight[:, 3] = model.a.weight[:, 3]  # what one makes of channel 3 the other takes back
    batches = pairs()
    found = gate_relevance(compressor.trace(model, batches[0][0]), batches, F.cross_entropy, Moments({}))["write"]
    assert found[3] < 1e-20
    assert found[[0, 1, 2, 4, 5, 6, 7]].min() > 1e-6


def test_judging_changes_nothing() -> None:
    model = shake(small()).train()
    model(pairs()[0][0]).sum().backward()
    graph = compressor.trace(model, pairs()[0][0])
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    gradients = [parameter.grad for parameter in model.parameters()]
    gate_relevance(graph, pairs(), F.cross_entropy, input_moments(graph, inputs(pairs())))
    assert same(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(now.grad is then for now, then in zip(model.parameters(), gradients, strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


# -- in prune


def test_planted_copies_go_first_and_nothing_is_lost() -> None:
    model, batches = Planted(), pairs()
    with torch.no_grad():
        expected = model(batches[0][0])
    result = compressor.prune(
        model, batches[0][0], "relevance", compressor.Budget(0.375, "channels"), rounds=3, calibration=batches,
        loss_fn=F.cross_entropy, verify=True, round_to=1,
    )  # fmt: skip
    assert result.reached
    assert model.write.out_channels == 5
    with torch.no_grad():
        assert relative_error(model(batches[0][0]), expected) < 1e-6  # its ridge tells copies from noise
    other = Planted()
    compressor.prune(other, batches[0][0], "l1", compressor.Budget(0.375, "channels"), calibration=inputs(batches))
    with torch.no_grad():
        assert relative_error(other(batches[0][0]), expected) > 1e-3  # a budget spent on small channels is not


def test_widths_by_relevance_and_channels_by_the_criterion() -> None:
    batches = pairs()
    budget = compressor.Budget(0.4, "macs")
    common = {"calibration": batches, "loss_fn": F.cross_entropy, "round_to": 1, "reconstruct": False}
    original = shake(small())
    by_itself, by_size = copy.deepcopy(original), copy.deepcopy(original)
    compressor.prune(by_itself, batches[0][0], "relevance", budget, **common)
    compressor.prune(by_size, batches[0][0], "l1", budget, allocate="relevance", **common)
    assert [tuple(each.shape) for each in by_itself.parameters()] == [
        tuple(each.shape) for each in by_size.parameters()
    ]
    sizes = original[0].weight.detach().flatten(1).abs().sum(1)
    kept = sizes.argsort(descending=True)[: by_size[0].out_channels].sort().values
    assert torch.equal(by_size[0].weight, original[0].weight[kept])


def test_gradients_are_gathered_from_the_calibration_and_taken_away_again() -> None:
    batches = pairs()
    here = shake(small())
    there = copy.deepcopy(here)
    for x, y in batches:
        F.cross_entropy(there.eval()(x), y, reduction="sum").backward()
    there.train()
    for model, settings in ((here, {"calibration": batches, "loss_fn": F.cross_entropy}), (there, {})):
        compressor.prune(model, batches[0][0], "taylor", 0.4, compensate="none", **settings)
    assert torch.equal(here[0].weight, there[0].weight)
    assert all(parameter.grad is None for parameter in here.parameters())


@pytest.mark.parametrize("criterion", ["l1", "random", "euclidean", "relevance"])
def test_in_rounds_a_budget_is_met_as_at_once(criterion: str) -> None:
    batches = pairs()
    settings = {"calibration": batches, "loss_fn": F.cross_entropy} if criterion == "relevance" else {}
    model = shake(small())
    result = compressor.prune(model, batches[0][0], criterion, 0.5, rounds=4, round_to=1, **settings)
    assert result.reached
    assert 0.5 <= result.removed < 0.62


def test_relevance_without_compensation_still_reads_its_calibration() -> None:
    model, batches = shake(small()), pairs()
    result = compressor.prune(
        model, batches[0][0], "relevance", 0.4, calibration=batches, loss_fn=F.cross_entropy, compensate="none"
    )
    assert result.reached


def test_a_fixed_kernel_that_reads_channels_can_be_judged() -> None:
    class Blur(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(5, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight)

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Blur(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    graph = compressor.trace(model, pairs()[0][0])
    found = gate_relevance(graph, pairs(), F.cross_entropy, Moments({}))
    assert found.keys() == graph.sizes().keys()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"criterion": "relevance"}, InputError, "relevance needs losses: pass calibration="),
        (
            {"allocate": "relevance", "calibration": inputs(pairs())},
            InputError,
            "relevance needs losses: pass calibration=",
        ),
        ({"loss_fn": F.cross_entropy, "calibration": pairs()}, IdleArgumentError, "loss_fn"),
        ({"criterion": "relevance", "loss_fn": F.cross_entropy}, InputError, "with loss_fn, calibration is pairs"),
        (
            {"criterion": "relevance", "loss_fn": F.cross_entropy, "calibration": inputs(pairs())},
            InputError,
            "with loss_fn, calibration is pairs",
        ),
        ({"calibration": pairs()}, InputError, r"calibration\[0\] is a pair, and targets are read by a loss_fn alone"),
        ({"calibration": [*inputs(pairs()), X[:0]]}, InputError, r"calibration\[3\] has no samples: leave it out"),
        (
            {"criterion": "relevance", "loss_fn": F.cross_entropy, "calibration": [(X[:0], torch.arange(0))]},
            InputError,
            r"calibration\[0\] has no samples",
        ),
        ({"rounds": 0}, RangeError, "rounds = 0 is out of range: give rounds in 1 to 1000"),
        ({"rounds": 2.5}, RangeError, "rounds = 2.5 is out of range: give rounds in 1 to 1000, whole numbers"),
        (
            {"calibration": [X.to(torch.uint8)]},
            InputError,
            r"Sequential does not run on a batch of calibration \(torch.uint8 \(.*: RuntimeError: .*same kind as",
        ),
        (
            {"calibration": [X.to(torch.uint8)], "compensate": "none", "reconstruct": True},
            InputError,
            "does not run on a batch of calibration",
        ),
        (
            {
                "criterion": "taylor",
                "compensate": "none",
                "loss_fn": F.cross_entropy,
                "calibration": [(X[:, :1], pairs()[0][1])],
            },
            InputError,
            "does not run on a batch of calibration",
        ),
        (
            {"criterion": "relevance", "loss_fn": lambda x, y: F.cross_entropy(x, y), "calibration": pairs()},
            InputError,
            r"loss_fn must take outputs, targets and reduction=, which may be left out \(got an unexpected keyword",
        ),
        (
            {"criterion": "taylor", "loss_fn": nn.CrossEntropyLoss(), "calibration": pairs()},
            InputError,
            "loss_fn must take outputs, targets and reduction=",
        ),
        (
            {
                "criterion": "relevance",
                "loss_fn": lambda x, y, reduction: F.cross_entropy(x, y),
                "calibration": pairs(),
            },
            InputError,
            "which may be left out .missing a required argument: 'reduction'",
        ),
    ],
)
def test_what_it_needs_is_said_and_nothing_is_cut(settings: dict, error: type[Exception], message: str) -> None:
    model = shake(small())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        compressor.prune(model, pairs()[0][0], **settings)
    assert same(model.state_dict(), before)


def test_inside_inference_mode_it_cuts_as_outside() -> None:
    inside = shake(small())
    outside = copy.deepcopy(inside)
    settings = {"criterion": "relevance", "budget": 0.4, "calibration": pairs(), "loss_fn": F.cross_entropy}
    with torch.inference_mode():
        compressor.prune(inside, pairs()[0][0], **settings)
    compressor.prune(outside, pairs()[0][0], **settings)
    assert same(inside.state_dict(), outside.state_dict())
    assert not any(parameter.is_inference() for parameter in inside.parameters())


def test_a_model_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = small()
    with pytest.raises(InputError, match=r"was made inside torch.inference_mode\(\).*make or load it outside"):
        compressor.prune(model, pairs()[0][0], "l1", 0.4)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model, batches = Planted(), pairs()
    graph = compressor.trace(model, batches[0][0])
    batches[1][0][0, 0, 0, 0] = float("inf")
    with pytest.raises(InputError, match="the loss on the calibration inputs is not finite"):
        gate_relevance(graph, batches, F.cross_entropy, Moments({}))


def test_a_pruner_cannot_allocate_by_relevance_that_it_does_not_observe() -> None:
    model = shake(small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="allocate='relevance' with criterion 'l1' needs losses of a trained model"):
        compressor.Pruner(model, pairs()[0][0], "l1", optimizer=optimizer, total_steps=10, allocate="relevance")


def test_a_depthwise_convolution_on_the_way_does_not_count_twice() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).double()  # fmt: skip
    x, y = pairs()[0]
    found = gate_relevance(compressor.trace(model, x), [(x, y)], F.cross_entropy, Moments({}))
    h = model[:4](x).detach().requires_grad_()
    F.cross_entropy(model[4:](h), y, reduction="sum").backward()
    torch.testing.assert_close(found["0"], 0.5 * (h * h.grad).sum((2, 3)).square().mean(0).detach())


def test_a_loss_that_was_asked_for_can_be_left_to_its_mean() -> None:
    """What the message of a refused loss says to write works in both places that read losses."""
    model, (x, y) = small().double().train(), pairs()[0]

    def loss_fn(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(outputs, targets, reduction=reduction)

    compressor.prune(small().double(), x, "relevance", 0.3, calibration=[(x, y)], loss_fn=loss_fn)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = compressor.Pruner(model, x, "relevance", 0.3, optimizer=optimizer, total_steps=4000)
    assert pruner.loss(x, y, loss_fn).isfinite()
