"""What one trace cannot see stays as it is, with a reason: hidden outputs, parts of training alone, nothing found."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compressor

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclass(slots=True)
class Slotted:
    scores: Tensor


class Hiding(nn.Module):
    """Returns its scores in some wrapping, or as what is no tensor."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 6, 1)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.b(F.relu(self.a(x))))


WRAPS: dict[str, Callable[[Tensor], Any]] = {
    "values of a dict": lambda y: {"y": y}.values(),
    "a set": lambda y: {y},
    "a frozenset in a list": lambda y: [frozenset([y])],
    "a generator": lambda y: (each for each in (y, y + 1)),
    "a mapping proxy": lambda y: MappingProxyType({"y": y}),
    "slots": Slotted,
    "a dict of slots": lambda y: {"out": Slotted(y)},
    "numpy": lambda y: y.detach().numpy(),
    "a list of numbers": lambda y: y.tolist(),
    "an array of an array": lambda y: [{"y": y.detach().numpy().mean(0)}],
}


@pytest.mark.parametrize("name", WRAPS)
def test_scores_are_outputs_however_they_are_returned(name: str) -> None:
    model = Hiding(WRAPS[name]).eval()
    result = compressor.prune(model, X, "l1", 0.4)
    assert model.b.out_channels == 6
    assert model.a.out_channels < 16
    assert result.reached


class Deep(nn.Module):
    """Deep supervision: `side` runs always, and only training returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.out, self.side = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
        self.aux: list[Tensor | None] = [None]

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        self.aux[0] = self.side(h)
        y = self.out(h)
        return torch.stack([y, self.aux[0]], 1) if self.training else y


class Aux(nn.Module):
    """An auxiliary classifier: it runs in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 1)
        self.out, self.aux = nn.Conv2d(12, 3, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        y = self.out(F.relu(self.b(F.relu(h))))
        return (y, self.aux(h)) if self.training else y


@pytest.mark.parametrize("kind", [Deep, Aux])
def test_what_only_training_uses_can_still_be_trained(kind: type[nn.Module]) -> None:
    model = kind()
    outputs = [tuple(each.shape) for each in model.train()(X)]
    result = compressor.prune(model, X, "l1", 0.2, verify=True)
    assert result.params[1] < result.params[0]
    assert [tuple(each.shape) for each in model.train()(X)] == outputs
    assert any("training" in note or "evaluation mode" in note for note in result.notes)


def test_a_channel_that_an_auxiliary_part_reads_stays_and_says_why() -> None:
    graph = compressor.trace(Aux(), X)
    assert graph.sizes() == {"b": 12}
    assert any("in training these channels reach parameters" in each.reason for each in graph.frozen)


def test_a_training_mode_that_does_not_run_is_said() -> None:
    class Refusing(Aux):
        def forward(self, x: Tensor) -> Any:
            if self.training:
                raise RuntimeError("no training today")
            return super().forward(x)

    (note,) = compressor.trace(Refusing(), X).notes
    assert "does not run: RuntimeError: no training today" in note


class Finding(nn.Module):
    """Looks at the images in which there is something."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x[x.mean((1, 2, 3)) > 0]
        return self.c(F.relu(self.b(self.a(x))))


def test_what_met_nothing_stays() -> None:
    model = Finding().eval()
    result = compressor.prune(model, -torch.rand(2, 3, 8, 8), "l1", 0.3, verify=True)
    assert not result.reached
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 4, 8, 8)
    assert any("give an example on which the model finds something" in line for line in result.blocked)
    assert compressor.prune(model, torch.rand(2, 3, 8, 8), "l1", 0.3, verify=True).reached


@pytest.mark.parametrize("nested", [False, True])
def test_what_wraps_a_model_for_many_devices_is_refused_with_what_to_pass(nested: bool) -> None:
    model: nn.Module = nn.DataParallel(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)))
    model = nn.Sequential(model) if nested else model
    with pytest.raises(compressor.errors.InputError, match=r"is wrapped in DataParallel: give what is inside"):
        compressor.prune(model, X, "l1", 0.3)


class Describing(nn.Module):
    """Returns its hidden state beside its scores, as transformers and detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = F.relu(self.a(x))
        return {"scores": self.c(F.relu(self.b(h))), "hidden": h}


@pytest.mark.parametrize("verify", [False, True])
def test_what_does_not_count_of_an_output_may_lose_channels(verify: bool) -> None:
    model = Describing().eval()
    assert list(compressor.trace(model, X).sizes()) == ["b"]
    result = compressor.prune(model, X, "l1", 0.5, outputs=lambda out: out["scores"], verify=verify)
    assert result.reached
    assert model(X)["hidden"].shape[1] < 16
    assert model(X)["scores"].shape[1] == 4


@pytest.mark.filterwarnings("ignore:Using `torch.compile")  # torch's, about the hooks by which we name modules
def test_a_compiled_part_is_traced_as_what_it_is() -> None:
    part = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 16, 3), torch.compile(part), nn.Conv2d(16, 4, 1)).eval()
    graph = compressor.trace(model, X)
    assert graph.sizes() == {"0": 16}
    compressor.cut(graph, {"0": range(8)})
    assert part[0].num_features == 8


def test_the_first_trace_of_a_process_imports_no_compiler() -> None:
    code = "import sys, torch, compressor; from torch import nn; "
    code += "net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)); "
    code += (
        "compressor.prune(net, torch.zeros(1, 3, 8, 8), 'l1', 0.4); print(*{'sympy', 'torch._dynamo'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "\n"
