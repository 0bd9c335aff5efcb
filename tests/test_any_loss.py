"""Relevance of losses that are no list of single ones: a detector's, say, in a loop that only calls `backward`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_loops import STEPS, Net, X, Y, made, nothing_left, sgd, shrunk
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor.errors import InputError
from compressor.pruning import Pruner
from compressor.relevance import Relevance, RelevanceConfig

READ_NO_LOSSES = ["gate", "soft"]


def finish_step(loss: Tensor, optimizer: torch.optim.Optimizer, pruner: Pruner) -> None:
    loss.backward()
    optimizer.step()
    pruner.step()
    optimizer.zero_grad()


def scores_after(estimator: Any, factor: float | None, steps: int = 4) -> dict[str, Tensor]:
    """Return what a few steps say, of the mean loss times a factor; by losses of single samples for None."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = RelevanceConfig(estimator, drop=0.15, observe_every=1, warmup=0)
    pruner = made(model, optimizer, "relevance", relevance=config)
    for _ in range(steps):
        with pruner.observe(X) as mean:
            losses = F.cross_entropy(model(X), Y, reduction="none")
            loss = mean(losses) if factor is None else factor * losses.mean()
        finish_step(loss, optimizer, pruner)
    assert pruner.relevance
    return pruner.relevance.scores()


@pytest.mark.parametrize("estimator", READ_NO_LOSSES)
def test_one_batch_says_the_same_with_and_without_losses_of_single_samples(estimator: str) -> None:
    """Each sample's gradient is in that of the mean: only the unit differs."""
    known, unknown = (torch.cat(list(scores_after(estimator, each, 1).values())) for each in (None, 1.0))
    scale = (known @ unknown) / (unknown @ unknown)
    assert scale > 0
    # "soft" is held against dummies with random signs, which are drawn alike.
    torch.testing.assert_close(unknown * scale, known, atol=1e-4 * float(known.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("estimator", READ_NO_LOSSES)
def test_a_gradient_scaler_changes_nothing(estimator: str) -> None:
    plain, scaled = (scores_after(estimator, factor) for factor in (1.0, 65536.0))
    for name, values in plain.items():
        torch.testing.assert_close(values, scaled[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("estimator", READ_NO_LOSSES)
def test_a_network_gets_smaller_by_any_loss(estimator: Any) -> None:
    model = Net()
    optimizer = sgd(model)
    pruner = made(model, optimizer, "relevance", relevance=RelevanceConfig(estimator, drop=0.15))
    for _ in range(STEPS):
        with pruner.observe(X):
            outputs = model(X)
            loss = F.cross_entropy(outputs, Y) + 0.1 * outputs.logsumexp(1).square().mean()  # of the batch as a whole
        finish_step(loss, optimizer, pruner)
        assert nothing_left(model)
    assert shrunk(pruner)


class Detector(nn.Module):
    """Two inputs, and a dictionary of boxes and classes; half of the stem's channels reach nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.neck = nn.Conv2d(16, 12, 3, padding=1)
        self.boxes, self.classes = nn.Conv2d(12, 4, 1), nn.Conv2d(12, 5, 1)
        with torch.no_grad():
            self.neck.weight[:, ::2] = 0.0

    def forward(self, images: Tensor, scale: Tensor) -> dict[str, Any]:
        h = F.relu(self.neck(F.relu(self.stem(images)))) * scale.view(-1, 1, 1, 1)
        return {"boxes": self.boxes(h), "classes": [self.classes(h)]}


def detection_loss(found: dict[str, Any], wanted: list[dict[str, Tensor]]) -> Tensor:
    """Return one number, over boxes whose number differs from image to image."""
    terms = [
        F.smooth_l1_loss(found["boxes"][index][:, : len(each["boxes"]), 0].T, each["boxes"])
        + F.cross_entropy(found["classes"][0][index][:, 0, : len(each["labels"])].T, each["labels"])
        for index, each in enumerate(wanted)
    ]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("passes", [1, 2])
def test_what_reaches_nothing_goes_first_in_a_detector(accumulated: int, passes: int) -> None:
    torch.manual_seed(0)
    model = Detector()
    images, scale = torch.randn(8, 3, 8, 8), torch.rand(8) + 0.5
    counts = [1 + index % 4 for index in range(8)]
    wanted = [{"boxes": torch.rand(n, 4), "labels": torch.randint(5, (n,))} for n in counts]
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if "neck.weight" not in name], lr=0.01)
    pruner = Pruner(
        model, (images, scale), "relevance", compressor.Budget(0.25, "channels"),
        optimizer=[optimizer, torch.optim.SGD([model.neck.weight], lr=0.0)], total_steps=40, prune_every=20, round_to=1,
        relevance=RelevanceConfig("gate", drop=0.2, observe_every=1), limits=compressor.Limits(only=("stem*",)),
        schedule=compressor.Linear(0.4, 0.6),
    )  # fmt: skip
    unread = model.stem.weight[::2].detach().clone()
    kept_at_first = model.stem.weight[1::2].detach().clone()
    for _ in range(40):
        for _ in range(accumulated):
            with pruner.observe((images, scale)):
                loss = sum(detection_loss(model(images, scale), wanted) for _ in range(passes)) / accumulated
            finish_step(loss, optimizer, pruner)
    assert model.stem.out_channels < 16
    # Whatever went is of those that nothing reads: their filters never moved, and each that stays is none too many.
    left = {tuple(row.flatten().tolist()) for row in model.stem.weight.detach()}
    still_there = sum(tuple(row.flatten().tolist()) in left for row in unread)
    assert model.stem.out_channels == len(kept_at_first) + still_there


@pytest.mark.parametrize("estimator", ["loss", "mixed"])
def test_estimators_that_read_losses_say_so(estimator: Any) -> None:
    model = Net()
    pruner = made(model, sgd(model), "relevance", relevance=RelevanceConfig(estimator, drop=0.15))
    with pruner.observe(X):
        loss = F.cross_entropy(model(X), Y)
    loss.backward()
    with pytest.raises(InputError, match="hand those of the samples"):
        pruner.step()


def test_a_step_without_a_backward_pass_is_refused() -> None:
    model = Net()
    pruner = made(model, sgd(model), "relevance")
    with pruner.observe(X):
        F.cross_entropy(model(X), Y)
    with pytest.raises(InputError, match="before backward"):
        pruner.step()


def test_a_loss_that_is_not_finite_says_nothing() -> None:
    torch.manual_seed(0)
    model = Net()
    pruner = made(model, torch.optim.SGD(model.parameters(), lr=0.0), "relevance")
    for factor in (1.0, math.inf, 1.0):
        with pruner.observe(X):
            loss = factor * F.cross_entropy(model(X), Y)
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
        pruner.step()
    assert pruner.relevance
    assert all(values.isfinite().all() for values in pruner.relevance.scores().values())


class Windows(nn.Module):
    """Quarters of images go through a layer of their own, four for each image: dimension 0 is not the batch there."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.stem, self.inner = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.local, self.head = nn.Conv2d(12, 10, 1), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.inner(F.relu(self.stem(x))))
        quarters = [part for half in h.chunk(2, 2) for part in half.chunk(2, 3)]
        if self.order == "none":  # the same without windows
            return self.head(F.relu(self.local(h)).mean((2, 3)))
        if self.order == "interleaved":
            windows = torch.stack(quarters, 1).flatten(0, 1)
            return self.head(F.relu(self.local(windows)).mean((2, 3)).view(len(x), 4, -1).mean(1))
        if self.order == "mixed":
            quarters[0] = quarters[0].flip(0)
        means = F.relu(self.local(torch.cat(quarters))).mean((2, 3)).view(4, len(x), -1)
        return self.head(torch.cat([means[:1].flip(1), means[1:]]).mean(0) if self.order == "mixed" else means.mean(0))


@pytest.mark.parametrize("order", ["interleaved", "tiled"])
@pytest.mark.parametrize("estimator", ["gate", "loss", "soft"])
def test_gates_reach_every_row_of_a_sample(order: str, estimator: str) -> None:
    scores = {}
    for which in ("none", order):
        torch.manual_seed(0)
        model = Windows(which).double()
        config = RelevanceConfig(estimator, drop=0.3, observe_every=1, warmup=0, exclude="zero")
        relevance = Relevance(compressor.trace(model, X[:1].double()), config, seed=3)
        for step in range(6):
            if step == 0 and which != "none":  # the batch that shows how rows lie; the draw is not that of the others
                state = relevance._sampler.generator.get_state()
                relevance.loss(model, X.double(), Y, F.cross_entropy).backward()
                relevance._sampler.generator.set_state(state)
                relevance._pending, relevance._left_out = [], False
                model.zero_grad()
            relevance.loss(model, X.double(), Y, F.cross_entropy).backward()
            relevance.step()
            model.zero_grad()
        scores[which] = relevance.scores()
    assert scores["none"].keys() == scores[order].keys() == {"stem", "inner", "local"}
    for name, expected in scores["none"].items():
        torch.testing.assert_close(scores[order][name], expected, rtol=1e-7, atol=1e-12)


def test_what_is_known_of_rows_is_kept_in_checkpoints_and_over_cuts() -> None:
    torch.manual_seed(0)
    model = Windows("tiled")
    graph = compressor.trace(model, X[:1])
    relevance = Relevance(graph, RelevanceConfig(drop=0.3, observe_every=1))
    relevance.loss(model, X, Y, F.cross_entropy).backward()
    relevance.step()
    again = Relevance(compressor.trace(model, X[:1]), RelevanceConfig(drop=0.3, observe_every=1))
    again.load_state_dict(relevance.state_dict())
    assert again._gates._sites["local"].layout == "tiled"
    keep = {"inner": torch.arange(9)}
    compressor.cut(graph, keep)
    relevance.narrow(keep, graph)
    assert relevance._gates._sites["local"].layout == "tiled"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_groups_that_no_sample_shows_stay_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Windows("mixed")
    optimizer = sgd(model)
    pruner = Pruner(
        model, X, "relevance", compressor.Budget(0.1, "channels"), optimizer=optimizer, total_steps=STEPS,
        prune_every=12, round_to=1, relevance=RelevanceConfig(drop=0.15), schedule=compressor.Linear(0.1, 0.8),
    )  # fmt: skip
    for _ in range(STEPS):
        pruner.loss(X, Y, F.cross_entropy).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    result = pruner.result()
    assert result.reached
    assert model.stem.out_channels < 8
    assert (model.inner.out_channels, model.local.in_channels) == (12, 12)
    assert "group inner stays as it is: the input of module 'local' cannot be gated" in caplog.text
    assert any("'local' cannot be gated" in note for note in result.notes)


def test_a_batch_that_is_no_batch_is_refused() -> None:
    model = Net()
    pruner = made(model, sgd(model), "relevance")
    with pytest.raises(InputError, match="batch of 3 samples first"), pruner.observe(X[:3]):
        model(X)
    assert nothing_left(model)
