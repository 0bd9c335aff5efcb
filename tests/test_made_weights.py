"""Weights that are made of others when a model runs: by masks, norms, or because two modules share one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import relative_error, shake
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import compressor
from compressor.errors import BudgetError, InputError
from compressor.surgery import input_means

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def chain(wrap: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older weight_norm is deprecated, and in use
        convs = [wrap(nn.Conv2d(i, o, 3, padding=1)) for i, o in ((3, 16), (16, 8), (8, 4))]
    return shake(nn.Sequential(convs[0], nn.BatchNorm2d(16), nn.ReLU(), convs[1], nn.ReLU(), convs[2]))


def masked_by_hand(model: nn.Module, channels: dict[str, Tensor]) -> Tensor:
    """Return the output with the activations of these channels at zero, where the next convolution reads them."""
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, gone=gone: (a[0].index_fill(1, gone, 0),))
        for name, gone in channels.items()
    ]
    with torch.no_grad():
        result = model(X)
    for hook in hooks:
        hook.remove()
    return result


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "older weight_norm": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "older spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_over_removed_channels_is_not_exact_and_the_cut_model_trains(name: str) -> None:
    model = chain(NORMS[name]).eval()
    graph = compressor.trace(model, X)
    assert {group.name: group.exact for group in graph.groups} == {"0": False, "3": False}
    gone = torch.arange(0, 16, 2)
    expected = masked_by_hand(model, {"3": gone})
    compressor.cut(graph, {"0": range(1, 16, 2)})
    assert (model[0].out_channels, model[1].num_features, model[3].in_channels) == (8, 8, 8)
    assert model[3].weight.shape == (8, 8, 3, 3)
    with torch.no_grad():
        assert relative_error(model(X), expected) > 1e-3  # why it is not exact
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    model(X).square().mean().backward()
    optimizer.step()
    assert model.eval()(X).isfinite().all()


@pytest.mark.parametrize("name", NORMS)
def test_relevance_sees_the_inputs_of_normalised_weights(name: str) -> None:
    model = chain(NORMS[name]).float().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = compressor.Pruner(model, X.float(), "relevance", 0.3, optimizer=optimizer, total_steps=400)
    for _ in range(400):
        pruner.loss(X.float(), torch.zeros(4, 8, 8, dtype=torch.long), F.cross_entropy).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert pruner.result().reached


def test_attached_masks_are_cut_along() -> None:
    model = chain(lambda conv: prune.l1_unstructured(conv, "weight", 0.5)).eval()
    graph = compressor.trace(model, X)
    assert {group.name: group.exact for group in graph.groups} == {"0": True, "3": True}
    gone = torch.arange(0, 16, 2)
    expected = masked_by_hand(model, {"3": gone})
    compressor.cut(graph, {"0": range(1, 16, 2)})
    assert (model[0].out_channels, model[3].in_channels) == (8, 8)
    shapes = [(8, 3, 3, 3), (8, 8, 3, 3)]
    for part, shape in zip((model[0], model[3]), shapes, strict=True):
        assert [part.weight.shape, part.weight_orig.shape, part.weight_mask.shape] == [shape] * 3
    with torch.no_grad():
        assert relative_error(model(X), expected) <= 1e-12
        prune.remove(model[0], "weight")
        assert relative_error(model(X), expected) <= 1e-12


def test_a_refused_cut_leaves_masked_weights_as_they_were() -> None:
    model = chain(lambda conv: prune.l1_unstructured(conv, "weight", 0.5)).eval()
    graph, before = compressor.trace(model, X), copy.deepcopy(model[0].weight.detach())

    def refuse() -> None:
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        compressor.cut(graph, {"0": range(8)}, check=refuse)
    assert torch.equal(model[0].weight, before)


class Shared(nn.Module):
    """Two convolutions with one weight, each with a bias and an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.c, self.d = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.d.weight = self.c.weight

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x) + self.b(x))
        return self.c(h) + self.d(h * h + 1)


def test_no_mean_is_folded_behind_a_weight_with_two_inputs() -> None:
    model = shake(Shared())
    graph = compressor.trace(model, X)
    before = [model.c.bias.detach().clone(), model.d.bias.detach().clone()]
    (group,) = graph.groups
    compressor.cut(graph, {group.name: range(4)}, means=input_means(graph, [X]))
    assert model.c.weight.shape == (4, 4, 1, 1)
    assert torch.equal(model.c.bias, before[0])
    assert torch.equal(model.d.bias, before[1])


class TwoSizes(nn.Conv2d):
    """A convolution with a size of its own that is another of its sizes before, and not after."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 1)
        self.half = channels // 2

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat([y[:, : self.half] * y[:, self.half :], y[:, self.half :]], 1)


def test_a_size_of_torchs_own_is_not_renamed_twice() -> None:
    model = shake(nn.Sequential(nn.Conv2d(3, 32, 1), TwoSizes(32), nn.Conv2d(32, 4, 1)))
    graph = compressor.trace(model, X)
    compressor.cut(graph, {name: range(0, size, 2) for name, size in graph.sizes().items()})
    assert model[1].weight.shape == (16, 16, 1, 1)
    assert (model[1].in_channels, model[1].out_channels, model[1].half) == (16, 16, 8)


@pytest.mark.parametrize("criterion", ["l1", "random", "bn_scale", "geometric_median"])
def test_weights_and_calibration_that_are_not_numbers_are_refused(criterion: str) -> None:
    model = chain(lambda conv: conv)
    with pytest.raises(InputError, match=r"the input of '0\.weight' is not finite|the input of '3\.weight'"):
        compressor.prune(model, X, criterion, 0.3, calibration=[torch.full_like(X, torch.nan)])
    model[3].weight.data[0, 0, 0, 0] = torch.inf
    with pytest.raises(InputError, match=r"'3\.weight' holds NaN or inf"):
        compressor.prune(model, X, criterion, 0.3)


def test_masks_on_weights_count_the_weights_that_they_cannot_mask() -> None:
    model = chain(lambda conv: conv).float()
    model[5].weight.requires_grad_(False)
    parametrizations.weight_norm(model[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    how = {"optimizer": optimizer, "total_steps": 10, "prune_every": 2}
    total = sum(model[index].weight.numel() for index in (0, 3, 5))
    training = compressor.SparseTraining(model, X.float(), "rigl", 0.4, **how)
    training.loss(X.float(), torch.zeros(4, 8, 8, dtype=torch.long), F.cross_entropy).backward()
    zeros = sum(int((model[index].weight == 0).sum()) for index in (0, 3, 5))
    assert training.result().removed == pytest.approx(zeros / total)
    assert zeros / total == pytest.approx(0.4, abs=1 / total)
    training = compressor.SparseTraining(model, X.float(), "rigl", 0.9, **how)
    with pytest.raises(BudgetError, match="weights do not train, or are made of others"):
        training.loss(X.float(), torch.zeros(4, 8, 8, dtype=torch.long), F.cross_entropy)


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=["weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_layers_are_fitted_behind_weights_that_have_a_history(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = chain(wrap), torch.randn(64, 3, 8, 8, dtype=torch.float64)
    assert compressor.prune(model, x[:2], "l1", 0.3, round_to=1, calibration=[x]).reached
