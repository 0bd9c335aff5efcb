"""Relevance where activations are thrown away and made again in the backward pass: the gates are met both times."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import compressor
from compressor.errors import InputError
from compressor.relevance import Relevance, RelevanceConfig

X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(4, (16,), generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """A stem that every gradient passes, and a body that may be run again."""

    def __init__(self, how: dict[str, bool] | None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1))
        self.head = nn.Linear(8, 4)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = checkpoint(self.body, h, **self.how) if self.how and self.training else self.body(h)
        return self.head(h.mean((2, 3)))


def observed(how: dict[str, bool] | None, estimator: str, batches: int = 1) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the scores after some steps, and the gradients of the last one."""
    torch.manual_seed(0)
    model = Net(how).train()
    relevance = Relevance(compressor.trace(model, X), RelevanceConfig(estimator=estimator, observe_every=1, warmup=0))
    for step in range(12):
        model.zero_grad()
        for _ in range(batches):
            relevance.loss(model, X + step, Y, F.cross_entropy).backward()
            with torch.no_grad():
                model.eval()(X)  # evaluation in between meets no gates
            model.train()
        relevance.step()
        assert not any(each._forward_pre_hooks or each._forward_hooks for each in model.modules())
    return relevance.scores(), [parameter.grad.clone() for parameter in model.parameters()]


WAYS = {"reentrant": {"use_reentrant": True}, "not reentrant": {"use_reentrant": False}}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # torch's, of a run without gradients
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("estimator", ["gate", "soft", "mixed", "loss", "source"])
@pytest.mark.parametrize("batches", [1, 2])
def test_scores_and_gradients_are_those_without_checkpointing(way: str, estimator: str, batches: int) -> None:
    expected, wanted = observed(None, estimator, batches)
    scores, gradients = observed(WAYS[way], estimator, batches)
    assert scores.keys() == expected.keys()
    for name, each in scores.items():
        torch.testing.assert_close(each, expected[name], rtol=1e-4, atol=1e-6)
        assert each.abs().max() > 0
    for found, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_second_batch_before_the_backward_pass_is_refused(way: str) -> None:
    model = Net(WAYS[way]).train()
    relevance = Relevance(compressor.trace(model, X), RelevanceConfig(estimator="gate", observe_every=1, warmup=0))
    relevance.loss(model, X, Y, F.cross_entropy)
    with pytest.raises(InputError, match=r"call backward\(\) after every batch"):
        relevance.loss(model, X, Y, F.cross_entropy)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return self.c(F.relu(self.a(x) + self.b(y) * scale).mean((2, 3)))


INPUTS: dict[str, Callable[[], object]] = {
    "a tuple": lambda: (X, X + 1),
    "a dict": lambda: {"x": X, "y": X + 1, "scale": 2.0},
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("criterion", ["relevance", "l1", "rigl"])
@pytest.mark.parametrize("own_loop", [True, False])
def test_several_inputs_go_through_the_loop(kind: str, criterion: str, own_loop: bool) -> None:
    torch.manual_seed(0)
    model, inputs = TwoInputs().train(), INPUTS[kind]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    make = compressor.SparseTraining if criterion == "rigl" else compressor.Pruner
    steps = 800
    pruner = make(model, copy.deepcopy(inputs), criterion, 0.4, optimizer=optimizer, total_steps=steps)
    for _ in range(steps):
        if own_loop:
            with pruner.observe(inputs) as mean:
                out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
                loss = mean(F.cross_entropy(out, Y, reduction="none"))
        else:
            loss = pruner.loss(inputs, Y, F.cross_entropy)
        loss.backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert pruner.result().reached
