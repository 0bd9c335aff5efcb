"""A trace, a cut and a check leave no mark: what a model keeps of a run, its hooks, its inputs, all random states."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compressor

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Grid(nn.Module):
    """Keeps a grid for the last image size, as the heads of YOLO detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.shape: torch.Size | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.relu(self.a(x)))
        if self.shape != y.shape:
            self.shape = y.shape
            self.grid = y.new_full(y.shape, 2.0)
        return y + self.grid


class Cached(nn.Module):
    """Makes a table once and keeps it in a cache that no module owns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.table = functools.lru_cache(lambda height, width: torch.arange(height * width).view(height, width) / 9.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.relu(self.a(x)))
        return y * self.table(*y.shape[2:])


class Hooked(nn.Module):
    """Installs a hook in its first run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(self, "ready", False):
            self.ready = True
            self.a.register_forward_hook(lambda module, inputs, output: self.kept.append(output))
        self.kept.clear()
        y = self.b(self.a(x))
        assert len(self.kept) == 1, len(self.kept)
        return y


class FrozenDict(dict):  # type: ignore[type-arg]
    """A dict whose own methods refuse to write, as the configuration of diffusers' models."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("You cannot use ``update`` on a FrozenDict instance.")

    clear = __setitem__ = pop = update


class Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.config = FrozenDict({"width": 8})

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class Scale(nn.Module):
    """Writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x *= 255.0
        return self.b(F.relu(self.a(x))) / 255


class Flagged(nn.Module):
    """Takes what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor, flag: bool = False, mask: Tensor | None = None) -> Tensor:
        return self.b(F.relu(self.a(x))) * (2.0 if flag else 1.0)


class Drawing(nn.Module):
    """Draws from Python, numpy and torch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * (random.random() + np.random.rand() + torch.rand(()))


@pytest.mark.parametrize("kind", [Grid, Cached])
def test_a_model_that_keeps_something_of_a_run_is_cut_and_verified(kind: type[nn.Module]) -> None:
    result = compressor.prune(kind().eval(), X, "l1", 0.3, verify=True)
    assert result.reached
    assert result.notes == ()


@pytest.mark.parametrize("kind", [Grid, Cached])
def test_a_graph_is_traced_anew_where_the_model_ran_in_between(kind: type[nn.Module], caplog: Any) -> None:
    caplog.set_level("INFO", "compressor")
    model = kind().eval()
    graph = compressor.trace(model, X)
    model(X)
    compressor.cut(graph, {"a": range(8)})
    assert graph.sizes() == {"a": 8}
    assert model(X).shape == (2, 4, 16, 16)
    assert any("so it is traced anew" in message for message in caplog.messages) == (kind is Grid)
    compressor.cut(graph, {"a": range(4)})
    assert model.a.weight.shape[0] == 4


def test_groups_that_were_frozen_stay_so_in_a_new_trace() -> None:
    model = nn.Sequential(Grid(), nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    graph = compressor.trace(model, X)
    graph.freeze(["0.a"], "a test")
    model(X)
    compressor.cut(graph, {"1": range(4)})
    assert graph.sizes() == {"1": 4}  # and the grid, a constant now, holds the channels that it is added to
    assert model[0].a.out_channels == 16
    assert graph.notes == (
        "group 0.a stays as it is: a test",
        "group 0.b stays as it is: the model, traced anew, ties these channels otherwise",
    )


def test_a_pruner_goes_on_after_an_evaluation_of_another_batch_size() -> None:
    model = Grid()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = compressor.Pruner(model, X, "l1", 0.4, optimizer=optimizer, total_steps=8, prune_every=1, verify=True)
    for _ in range(8):
        model.train()
        pruner.loss(X, torch.zeros(2, 16, 16, dtype=torch.long), F.cross_entropy).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        model.eval()
        model(X[:1])
    assert pruner.result().reached


def test_hooks_that_a_first_run_installs_are_not_there_twice() -> None:
    model = Hooked().eval()
    compressor.trace(model, X)
    assert not hasattr(model, "ready")
    model(X)
    assert compressor.prune(model, X, "l1", 0.3, verify=True).reached
    model(X)


def test_a_dict_that_forbids_writing_is_left_alone() -> None:
    model = Configured().eval()
    assert compressor.prune(model, X, "l1", 0.3, verify=True).reached
    assert model.config == {"width": 8}


def test_inputs_that_a_model_writes_into_are_those_of_a_copy() -> None:
    x = X.clone()
    assert compressor.prune(Scale(), x, "l1", 0.3, calibration=[x, x], verify=True).reached
    assert torch.equal(x, X)


@pytest.mark.parametrize("more", [{"flag": False}, {"flag": True, "mask": None}])
def test_inputs_may_hold_what_is_no_tensor(more: dict[str, Any]) -> None:
    assert compressor.prune(Flagged(), {"x": X, **more}, "l1", 0.3, verify=True).reached


def test_no_random_state_changes() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    compressor.trace(Drawing(), X)
    compressor.prune(Drawing(), X, "l1", 0.3)
    torch.manual_seed(1)  # making a model draws its weights
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
