"""Calibration: means against plain averages, and what folding them into the next layer is worth."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import masked, relative_error, shake
from test_surgery import same, small
from torch import Tensor, nn

import compressor
from compressor.errors import InputError, UnknownNameError
from compressor.relevance import RelevanceConfig
from compressor.surgery import input_means


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 3, 8, 8, dtype=torch.float64, generator=generator) for size in sizes]


def test_means_are_those_of_all_samples_and_positions() -> None:
    model = shake(small())
    found = input_means(compressor.trace(model, batches(1)[0]), batches(5, 2, 9))
    everything = torch.cat(batches(5, 2, 9))
    with torch.no_grad():
        torch.testing.assert_close(found["3.weight"], model[:3](everything).mean((0, 2, 3)), rtol=1e-12, atol=0)
        torch.testing.assert_close(found["8.weight"], model[:8](everything).mean(0), rtol=1e-12, atol=0)
    assert found.keys() == {"3.weight", "8.weight"}


def test_taking_means_changes_nothing() -> None:
    model = shake(small()).train()
    graph = compressor.trace(model, batches(1)[0])
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    input_means(graph, batches(3))
    assert same(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


def test_no_batch_has_no_mean() -> None:
    graph = compressor.trace(shake(small()), batches(1)[0])
    with pytest.raises(InputError, match="no batch to take means of: give at least one batch"):
        input_means(graph, [])


@pytest.mark.parametrize("seed", range(5))
def test_after_compensation_the_output_on_calibration_data_is_closer(seed: int) -> None:
    data = batches(32)
    errors = {}
    for compensate in ("none", "mean"):
        torch.manual_seed(seed)
        model = shake(small(), seed)
        with torch.no_grad():
            expected = model(data[0])
            how = {"calibration": data} if compensate == "mean" else {}
            compressor.prune(
                model, data[0], "random", compressor.Budget(0.5, "channels"), seed=seed, compensate=compensate, **how
            )
            errors[compensate] = float((model(data[0]) - expected).square().mean())
    assert errors["mean"] < errors["none"]


def constant_channels(chosen: list[int]) -> nn.Module:
    """Channels of the first convolution that are constant over space and samples, whatever comes in."""
    model = shake(small())
    with torch.no_grad():
        model[0].weight[chosen] = 0
        model[3].padding = (0, 0)
    return model


def test_a_model_whose_removed_channels_are_constant_is_unchanged() -> None:
    model = constant_channels([1, 4, 6])
    data = batches(4, 3)
    fresh = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = model(fresh)
        limits = compressor.Limits(only=["0"])
        assert relative_error(dropped(model, data[0], fresh), expected) > 1e-3
        result = compressor.prune(
            model,
            data[0],
            "l1",
            compressor.Budget(3 / 14 - 1e-9, "channels"),
            limits=limits,
            calibration=data,
            compensate="mean",
        )
        assert result.widths["0"] == (8, 5)
        assert relative_error(model(fresh), expected) < 1e-12


def dropped(model: nn.Module, x: Tensor, fresh: Tensor) -> Tensor:
    """The output without the fold."""
    other = copy.deepcopy(model)
    compressor.prune(other, x, "l1", compressor.Budget(3 / 14 - 1e-9, "channels"), limits=compressor.Limits(only=["0"]))
    return other(fresh)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"compensate": "mean"}, InputError, r"compensate='mean' needs real inputs: pass calibration=\[inputs, ...\]"),
        (
            {"calibration": batches(1), "compensate": "none"},
            InputError,
            "calibration has no effect with compensate='none' and verify=False",
        ),
        ({"compensate": "means"}, UnknownNameError, "unknown compensation 'means': did you mean 'mean'"),
    ],
)
def test_arguments_without_what_they_need_or_without_effect_are_refused(arguments, error, message) -> None:
    model = shake(small())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        compressor.prune(model, batches(1)[0], **arguments)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("criterion", ["l1", "relevance"])
@pytest.mark.parametrize("compensate", ["mean", "none"])
def test_compensation_while_training_keeps_the_mean_output(criterion: str, compensate: str) -> None:
    model = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 2)).double()
    x, y = torch.randn(64, 3, dtype=torch.float64), torch.randint(2, (64,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = compressor.Pruner(
        model,
        x,
        criterion,
        compressor.Budget(0.5, "channels"),
        compressor.OneShot(1.0),
        optimizer=optimizer,
        total_steps=4,
        prune_every=2,
        round_to=1,
        compensate=compensate,
        relevance=RelevanceConfig(drop=0.15) if criterion == "relevance" else None,
    )
    before = model(x).mean(0)
    for _ in range(4):
        pruner.loss(x, y, nn.functional.cross_entropy).backward()
        optimizer.step()
        pruner.step()
    assert model[0].out_features == 16
    assert torch.allclose(model(x).mean(0), before, atol=1e-6) == (compensate == "mean")


class FromTheLeft(nn.Module):
    """A dense layer as GPT-2 has it: its weight is `(in, out)`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


POOLED = (nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    "consumer",
    [
        # As wide as before, narrower, wider: a weight that is read the wrong way round fails, or is silently wrong.
        [nn.ConvTranspose2d(8, 8, 2, 2)],
        [nn.ConvTranspose2d(8, 6, 2, 2)],
        [nn.ConvTranspose2d(8, 12, 2, 2)],
        [nn.ConvTranspose2d(8, 8, 1, dilation=2)],
        [nn.ConvTranspose2d(8, 6, 4, 4, bias=False), nn.BatchNorm2d(6)],
        [nn.ConvTranspose2d(8, 8, (2, 3), (2, 3), bias=False), nn.BatchNorm2d(8)],
        [nn.Flatten(2), nn.ConvTranspose1d(8, 6, 2, 2)],
        [*POOLED, FromTheLeft(8, 8)],
        [*POOLED, FromTheLeft(8, 5)],
        [*POOLED, FromTheLeft(8, 13)],
    ],
    ids=str,
)
@pytest.mark.parametrize("compensate", ["mean", "linear"])
def test_constants_are_folded_whichever_way_a_weight_lies(consumer: list[nn.Module], compensate: str) -> None:
    """Where each place sees other taps of a transposed convolution, it is the mean over the places that stays."""
    chosen = [1, 4, 6]
    model = shake(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *copy.deepcopy(consumer)))
    with torch.no_grad():
        model[0].weight[chosen] = 0
        model[0].bias[chosen] = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    data, fresh = batches(40), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    without = copy.deepcopy(model)

    def smallest(group: compressor.Group, snapshot: compressor.Snapshot) -> Tensor:
        return torch.tensor([float(channel not in chosen) for channel in range(group.size)])

    def means(model: nn.Module) -> Tensor:
        with torch.no_grad():
            output = model(fresh)
        return output.flatten(2).mean(2) if output.dim() > 2 else output

    expected = means(model)
    how = {"limits": compressor.Limits(only=["0"]), "verify": True}
    budget = compressor.Budget(3 / 8 - 1e-9, "channels")
    compressor.prune(without, data[0], smallest, budget, limits=how["limits"])
    result = compressor.prune(
        model, data[0], smallest, budget, calibration=data, compensate=compensate, reconstruct=False, **how
    )
    assert result.widths["0"] == (8, 5)
    assert relative_error(means(without), expected) > 1e-2
    assert relative_error(means(model), expected) < 1e-12


@pytest.mark.parametrize(
    "consumer",
    [
        [nn.ConvTranspose2d(8, 8, 2, 2)],
        [nn.ConvTranspose2d(8, 6, 3, 2, padding=1, output_padding=1)],
        [nn.ConvTranspose2d(8, 12, 3, bias=False), nn.BatchNorm2d(12)],
        [*POOLED, FromTheLeft(8, 8)],
        [*POOLED, FromTheLeft(8, 13)],
    ],
    ids=str,
)
def test_what_others_determine_goes_without_a_trace_whichever_way_a_weight_lies(consumer: list[nn.Module]) -> None:
    chosen = [1, 4, 6]
    model = shake(nn.Sequential(nn.Conv2d(3, 8, 3), *copy.deepcopy(consumer)))
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[1] = 2 * tensor[0] - tensor[2]
            tensor[4] = tensor[3]
            tensor[6] = tensor[5] + 0.5 * tensor[7]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    data, fresh = batches(40), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    model(data[0]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        expected = model(fresh)

    def smallest(group: compressor.Group, snapshot: compressor.Snapshot) -> Tensor:
        return torch.tensor([float(channel not in chosen) for channel in range(group.size)])

    result = compressor.prune(
        model,
        data[0],
        smallest,
        compressor.Budget(3 / 8 - 1e-9, "channels"),
        calibration=data,
        compensate="linear",
        reconstruct=False,
        verify=True,
        optimizer=optimizer,
        limits=compressor.Limits(only=["0"]),
    )
    assert result.widths["0"] == (8, 5)
    with torch.no_grad():
        assert relative_error(model(fresh), expected) < 1e-10
    weight = model[3].weight if isinstance(model[-1], FromTheLeft) else model[1].weight
    assert optimizer.state[weight]["momentum_buffer"].shape == weight.shape


class Meeting(nn.Module):
    """Two convolutions with one BatchNorm, or one bias, behind both."""

    def __init__(self, shared: str) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.first, self.second = (nn.Conv2d(4, 5, 1, bias=shared == "bias") for _ in range(2))
        self.behind = nn.BatchNorm2d(5) if shared == "BatchNorm" else nn.Identity()
        self.head = nn.Conv2d(5, 2, 1)
        if shared == "bias":
            self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first(torch.relu(self.one(x))), self.second(torch.relu(self.other(x)))
        return self.head(self.behind(first)) + 2 * self.head(self.behind(second))


@pytest.mark.parametrize("shared", ["BatchNorm", "bias"])
@torch.no_grad()
def test_no_constant_is_put_where_two_layers_read_it(shared: str) -> None:
    torch.manual_seed(0)
    model, x = shake(Meeting(shared)).eval(), torch.randn(6, 3, 4, 4, dtype=torch.float64)
    model.one.weight[1], model.one.bias[1] = 0, 1.5  # a constant channel
    graph = compressor.trace(model, x)
    assert not {"first.weight", "second.weight"} & graph.offsets.keys()
    keep = {"one": torch.tensor([0, 2, 3])}
    expected = masked(graph, keep)(x)
    compressor.cut(graph, keep, means=input_means(graph, [x]))
    assert relative_error(model(x), expected) <= 1e-12
