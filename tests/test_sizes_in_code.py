"""Sizes that stand in a model's code: they follow a cut, or the cut is refused; what moves with the image is frozen."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import masked, relative_error, shake
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor.errors import CutError

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Listed(nn.Module):
    """Splits its channels by a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(4, 3, 1)
        self.pieces = [4, 8]

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.a(x).split(self.pieces, 1)
        return self.b(first) + second.mean()


class Configured(nn.Module):
    """Reads a width off a configuration that the next block shares."""

    def __init__(self, config: Any, inputs: int) -> None:
        super().__init__()
        self.config = config
        self.a, self.b = nn.Conv2d(inputs, config.width, 1), nn.Conv2d(config.width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h.flatten(2).view(len(h), self.config.width, *x.shape[2:]))


class Asserting(nn.Module):
    """Checks the width of its input, which nothing else in its own code depends on, as diffusers' blocks do."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.inner = nn.Conv2d(channels, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return self.inner(x)


def two_blocks() -> nn.Sequential:
    config = SimpleNamespace(width=8, name="blocks", eps=1e-6)
    return nn.Sequential(Configured(config, 3), Configured(config, 5))


MODELS = {
    "a list": Listed,
    "a shared configuration": two_blocks,
    "an assertion": lambda: nn.Sequential(nn.Conv2d(3, 16, 1), Asserting(16)),
}


def widths(model: nn.Module) -> list[Any]:
    if isinstance(model, Listed):
        return [model.pieces]
    return [part.config.width if isinstance(part, Configured) else getattr(part, "channels", None) for part in model]


@pytest.mark.parametrize("name", MODELS)
def test_numbers_follow_a_cut_and_the_model_is_saved_with_them(name: str, tmp_path) -> None:
    model = shake(MODELS[name]()).eval()
    graph = compressor.trace(model, X)
    keep = {group.name: torch.arange(0, group.size, 2) for group in graph.groups[:1]}
    expected = masked(graph, keep)(X)
    compressor.cut(graph, keep)
    assert relative_error(model(X), expected) <= 1e-12
    assert widths(model) == {"a list": [[2, 8]], "a shared configuration": [4, 8], "an assertion": [None, 8]}[name]
    compressor.save(model, tmp_path / "m.safetensors")
    loaded = compressor.load(tmp_path / "m.safetensors", factory=lambda: MODELS[name]().double())
    assert torch.equal(loaded(X), model(X))
    assert widths(loaded) == widths(model)


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_follows_and_a_refused_cut_leaves_the_numbers(name: str) -> None:
    model = shake(MODELS[name]()).eval()
    average = copy.deepcopy(model)
    graph = compressor.trace(model, X)
    keep = {graph.groups[0].name: range(0, graph.groups[0].size, 2)}
    before = copy.deepcopy(widths(model))

    def refuse() -> None:
        raise CutError("no", ())

    with pytest.raises(CutError, match="no"):
        compressor.cut(graph, keep, check=refuse, copies=[average])
    assert widths(model) == widths(average) == before
    compressor.cut(graph, keep, copies=[average])
    assert torch.equal(average(X), model(X))


class Mixing(nn.Module):
    """Reads tokens by channels as channels by space: which channel is where depends on the image's size."""

    def __init__(self, is_right: bool) -> None:
        super().__init__()
        self.is_right = is_right
        self.inp, self.v, self.out = nn.Conv2d(3, 64, 3, 2, 1), nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        v = self.v(h).flatten(2).transpose(1, 2)
        v = v.transpose(1, 2).reshape(h.shape) if self.is_right else v.reshape(h.shape)
        return self.out(h + v)


@pytest.mark.parametrize("is_right", [True, False])
def test_what_would_be_right_at_one_image_size_only_is_frozen(is_right: bool) -> None:
    model = shake(Mixing(is_right)).eval()
    graph = compressor.trace(model, X)
    assert [group.name for group in graph.groups] == (["inp"] if is_right else [])
    if not is_right:
        (reason,) = {each.reason for each in graph.frozen if each.tensor == "v.weight" and each.dim == 0}
        assert "a view splits channels from where space ends" in reason
        return
    keep = {"inp": torch.arange(0, 64, 2)}
    larger = torch.randn(1, 3, 24, 16, dtype=torch.float64)
    expected = masked(graph, keep)(larger)
    compressor.cut(graph, keep)
    assert relative_error(model(larger), expected) <= 1e-12


class Repeating(nn.Module):
    """Takes one learned position for all, which is no channel of anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(16, 4)
        self.tokens = nn.Parameter(torch.randn(1, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) + self.tokens[:, 1:]
        return self.b(torch.cat([h, self.tokens[:, :1].expand(len(x), 4, -1)], -1))


def test_one_position_that_is_expanded_is_frozen_and_the_width_is_cut() -> None:
    model = shake(Repeating()).eval()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    graph = compressor.trace(model, x)
    keep = {name: torch.arange(0, size, 2) for name, size in graph.sizes().items()}
    assert sum(graph.sizes().values()) == 8
    expected = masked(graph, keep)(x)
    compressor.cut(graph, keep)
    assert model.tokens.shape == (1, 5, 4)
    assert relative_error(model(x), expected) <= 1e-12


class Odd:
    """Holds a tensor, and cannot be iterated over although it says so."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def __iter__(self) -> Any:
        raise AttributeError("keys")


class Returning(nn.Sequential):
    def forward(self, x: Tensor) -> Odd:
        return Odd(super().forward(x))


def test_results_that_fail_when_they_are_iterated_over_are_outputs_by_their_attributes() -> None:
    model = Returning(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))
    graph = compressor.trace(model, X.float())
    assert [group.name for group in graph.groups] == ["0"]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_without_weights_follows_as_one_with_weights_of_one(norm: type, tmp_path) -> None:
    def make(has_weights: bool) -> nn.Sequential:
        torch.manual_seed(0)
        parts = [nn.Linear(5, 12), norm(12, elementwise_affine=has_weights), nn.Linear(12, 12), nn.ReLU()]
        return nn.Sequential(*parts, norm((12,), elementwise_affine=has_weights), nn.Linear(12, 3)).double()

    x = torch.randn(4, 5, dtype=torch.float64)
    without, with_ones = make(False), make(True)
    for model in (without, with_ones):
        graph = compressor.trace(model, x)
        compressor.cut(graph, {group.name: range(0, group.size, 1 + place) for place, group in enumerate(graph.groups)})
        compressor.cut(graph, {graph.groups[0].name: range(7)})
    assert (without[1].normalized_shape, without[4].normalized_shape) == ((7,), (6,))
    assert relative_error(without(x), with_ones(x)) <= 1e-12
    compressor.save(without, tmp_path / "m.safetensors")
    assert torch.equal(compressor.load(tmp_path / "m.safetensors", factory=lambda: make(False))(x), without(x))


@pytest.mark.parametrize("batch", [1, 3])
def test_an_instance_norm_without_weights_follows_without_a_warning(batch: int) -> None:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 12, 3), nn.InstanceNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.InstanceNorm2d(8)]
    model = nn.Sequential(*parts, nn.Conv2d(8, 2, 1)).double()
    x = torch.randn(batch, 3, 10, 10, dtype=torch.float64)
    graph = compressor.trace(model, x)
    keep = {group.name: torch.arange(0, group.size, 2) for group in graph.groups}
    expected = masked(graph, keep)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an error there would be a mismatch, which others follow too
        compressor.cut(graph, keep)
    assert (model[1].num_features, model[4].num_features) == (6, 4)
    assert relative_error(model(x), expected) <= 1e-12  # a warning is an error in tests
