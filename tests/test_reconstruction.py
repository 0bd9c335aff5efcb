"""Reconstruction: layers compute again what they did in the whole model, as far as what they read allows."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import relative_error, shake
from test_surgery import same
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor.errors import InputError
from compressor.surgery import Reference, reconstruct

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 5)),
    "Linear over space": lambda: nn.Linear(6, 5),
    "1x1": lambda: nn.Conv2d(4, 6, 1),
    "padded": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "no bias": lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False),
    "same": lambda: nn.Conv2d(4, 6, (2, 3), padding="same"),
    "strided, dilated": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(0, 1)),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, padding=2),
    "1d": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 6, 5, stride=2, padding=1)),
    "3d": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 6, (1, 3, 2), padding=(1, 0, 1), dilation=1)),
    "BatchNorm": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)),
    "BatchNorm and bias": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
    "two in a row": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3)),
}


def batches(count: int = 5, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(20, 4, 6, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


def smooth(count: int = 5, seed: int = 0) -> list[Tensor]:
    """Return images whose neighbouring pixels are alike, as in photographs."""
    return [F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="circular"), 5, 1) for x in batches(count, seed)]


def made(layer: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return shake(nn.Sequential(layer()).double()).eval()


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_weights_that_were_disturbed_are_found_again(kind: str) -> None:
    """What a layer reads says all about it, so that least squares leaves nothing."""
    model = made(LAYERS[kind])
    reference = Reference(compressor.trace(model, batches()[0]))
    expected = [model(x) for x in batches()]
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(module, nn.BatchNorm2d):
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    assert relative_error(model(batches()[0]), expected[0]) > 0.05
    fitted = reconstruct(compressor.trace(model, batches()[0]), reference, batches())
    assert len(fitted) == sum(isinstance(each, nn.Linear | nn.modules.conv._ConvNd) for each in model.modules())
    for x, whole in zip(batches(), expected, strict=True):
        assert relative_error(model(x), whole) < 1e-4  # the least ridge is 1e-6 of what it is added to


class Net(nn.Module):
    """A stem, a residual block and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(4, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.a, self.a_norm = nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.b_norm = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        h = F.relu(self.a_norm(self.a(x)))
        return self.head(F.relu(x + self.b_norm(self.b(h))).mean((2, 3)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return shake(Net().double()).eval()


@torch.no_grad()
def left(model: nn.Module, whole: nn.Module, inputs: list[Tensor]) -> float:
    """Return the mean square of the difference of two models."""
    return float(torch.stack([(model(x) - whole(x)).square().mean() for x in inputs]).mean())


@pytest.mark.parametrize("criterion", ["l1", "random"])
@pytest.mark.parametrize("compensate", ["none", "mean", "linear"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_smaller_model_comes_nearer_to_the_whole_one(criterion: str, compensate: str, rounds: int) -> None:
    whole, errors = network(), []
    for fit in (False, True):
        model = copy.deepcopy(whole)
        settings = {} if compensate == "none" and not fit else {"calibration": smooth()}
        compressor.prune(
            model, smooth()[0], criterion, 0.4, rounds=rounds, round_to=1, compensate=compensate, reconstruct=fit,
            **settings,
        )  # fmt: skip
        errors.append(left(model, whole, smooth(4, seed=9)))  # of inputs that it has not seen
    assert errors[1] < errors[0]


def test_by_default_it_comes_with_linear_compensation_alone() -> None:
    whole = network()
    for compensate, fits in (("linear", True), ("mean", False)):
        usual, asked = copy.deepcopy(whole), copy.deepcopy(whole)
        for model, how in ((usual, {}), (asked, {"reconstruct": fits})):
            compressor.prune(model, batches()[0], "l1", 0.4, calibration=batches(), compensate=compensate, **how)
        assert same(usual.state_dict(), asked.state_dict())


def test_batchnorm_says_the_same_in_the_statistics_of_what_it_reads_now() -> None:
    model = network()
    compressor.prune(model, batches()[0], "l1", 0.4, calibration=batches())
    x = torch.cat(batches())
    with torch.no_grad():
        expected = model(x)
        assert relative_error(copy.deepcopy(model).train()(x), expected) < 1e-3  # statistics of this very batch


@pytest.mark.parametrize("scale", [1e-3, 1e-2])
@torch.no_grad()
def test_a_weight_does_not_grow_beyond_what_can_be_trained(scale: float) -> None:
    """Four channels say all about the image; one of them hardly varies, and it would take weights of hundreds."""
    whole = made(lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 5, 1)))
    whole[0][0].weight[0] *= scale
    whole[0][0].bias[0] *= scale
    errors = []
    for fit in (False, True):
        model = copy.deepcopy(whole)
        usual = {"calibration": batches(), "compensate": "mean", "round_to": 1}
        compressor.prune(model, batches()[0], lambda *_: torch.arange(8) % 2 == 0, 0.45, reconstruct=fit, **usual)
        errors.append(left(model, whole, batches()))
        assert model[0][0].out_channels == 4
    assert errors[1] < 0.9 * errors[0]
    assert model[0][1].weight.norm() < 4 * whole[0][1].weight[:, ::2].norm()


def test_all_or_nothing() -> None:
    model = network()
    reference = Reference(compressor.trace(model, batches()[0]))
    with torch.no_grad():
        model.b.weight.mul_(0.5)
    before = copy.deepcopy(model.state_dict())
    model.train()
    broken = [x.clone() for x in batches()]
    broken[-1][0, 0, 0, 0] = torch.nan
    graph = compressor.trace(model, batches()[0])
    for inputs, message in ((broken, "what 'stem' reads is not finite"), ([], "no batch to reconstruct layers on")):
        with pytest.raises(InputError, match=message):
            reconstruct(graph, reference, inputs)
        assert same(model.state_dict(), before)
        assert model.training
        assert not any(module._forward_hooks for module in model.modules())


def test_a_failure_in_a_later_layer_takes_back_the_earlier_ones() -> None:
    model = network()
    graph = compressor.trace(model, batches()[0])
    reference = Reference(graph)
    with torch.no_grad():
        model.a.weight.mul_(0.5)
        reference.model.head.weight.fill_(torch.inf)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="what 'head' reads is not finite"):
        reconstruct(graph, reference, batches())
    assert same(model.state_dict(), before)


class Odd(nn.Module):
    """Layers that no fit may touch: tied, run twice, under a parametrization; and one that may."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.twin = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.twin.weight = self.tied.weight
        self.twice = nn.Conv2d(4, 4, 1)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.plain = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.normed(self.twice(self.twice(self.twin(self.tied(x))))))


def test_what_is_tied_or_runs_twice_or_is_computed_keeps_its_weights() -> None:
    torch.manual_seed(0)
    model = Odd().double()
    graph = compressor.trace(model, batches()[0])
    reference = Reference(graph)
    with torch.no_grad():
        model.tied.weight.mul_(0.9)
        model.plain.weight.mul_(0.5)
    before = copy.deepcopy(model.state_dict())
    assert reconstruct(graph, reference, batches()) == ["plain"]
    after = model.state_dict()
    assert {name for name, each in after.items() if not torch.equal(each, before[name])} == {
        "plain.weight",
        "plain.bias",
    }


def test_weights_that_predict_best_already_stay_as_they_are() -> None:
    """The targets are noise to what the layer reads: every other solution is worse on held-out rows."""
    model = made(LAYERS["Linear"])
    graph = compressor.trace(model, batches()[0])
    reference = Reference(graph)
    few = [batches()[0][:5]]  # 144 inputs from 4 rows
    before = copy.deepcopy(model.state_dict())
    assert reconstruct(graph, reference, few) == []
    assert same(model.state_dict(), before)


def test_without_inputs_it_is_refused() -> None:
    with pytest.raises(InputError, match=r"reconstruct=True needs real inputs: pass calibration=\[inputs, ...\]"):
        compressor.prune(network(), batches()[0], "l1", 0.4, reconstruct=True)


@torch.no_grad()
def test_the_sizes_of_the_batches_do_not_decide() -> None:
    """Held out is one sample in five, of all batches together."""
    x = torch.cat(batches(4))
    weights = []
    for size in (20, 1):
        model = made(lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 1)))
        graph = compressor.trace(model, x[:2])
        reference, table, keep = Reference(graph), graph.table, {"0.0": torch.arange(4)}
        compressor.cut(graph, keep)
        reference.follow(table, keep)
        assert "0.2" in reconstruct(graph, reference, list(x.split(size)))
        weights.append(model[0][2].weight)
    torch.testing.assert_close(*weights, rtol=1e-8, atol=1e-8)
