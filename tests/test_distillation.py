"""Distillation and recipes: soft targets against values worked out by hand, and what a training makes of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training import CONFIG, make_split, net
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor.errors import InputError, RangeError
from compressor.pruning import Pruner
from compressor.training import Data, PlainStep, TrainingConfig, distilled, train
from compressor.training import checkpoint as checkpoints
from compressor.training.data.mixing import mix


@pytest.fixture
def data() -> Data:
    splits = [make_split(count, seed) for seed, count in enumerate((44, 10, 10))]
    return Data("halves", ("left", "right"), (3, 8, 8), *splits)


def test_the_worked_example() -> None:
    teacher = lambda inputs: torch.tensor([[4.0, 0.0]])  # noqa: E731
    loss = distilled(F.cross_entropy, teacher, None, weight=0.5, temperature=4.0)
    p = math.e / (math.e + 1)
    divergence = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    assert divergence == pytest.approx(0.11, abs=0.005)
    expected = 0.5 * math.log(2) + 0.5 * 16 * divergence
    assert float(loss(torch.zeros(1, 2), torch.tensor([0]))) == pytest.approx(expected, rel=1e-6)


@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0.5, 8))
def test_single_losses_are_those_that_the_mean_is_of(seed: int, weight: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores, answers = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 5, (6,), generator=generator)
    loss = distilled(F.cross_entropy, lambda inputs: answers, None, weight=weight, temperature=temperature)
    single = loss(scores, targets, reduction="none")
    assert single.shape == (6,)
    torch.testing.assert_close(single.mean(), loss(scores, targets))
    torch.testing.assert_close(single.sum(), loss(scores, targets, reduction="sum"))
    # A model that answers as its teacher is left with its own part.
    own = distilled(F.cross_entropy, lambda inputs: scores, None, weight=weight, temperature=temperature)
    torch.testing.assert_close(
        own(scores, targets), (1 - weight) * F.cross_entropy(scores, targets), atol=1e-12, rtol=1e-9
    )


def test_the_gradient_is_that_of_hinton() -> None:
    """Of the soft part: T * (softmax(student / T) - softmax(teacher / T)), whatever T is of the same size."""
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_()
    student = student.detach().requires_grad_()
    distilled(F.cross_entropy, lambda inputs: teacher, None, weight=1.0, temperature=3.0)(
        student, torch.zeros(3, dtype=torch.long), reduction="sum"
    ).backward()
    expected = 3.0 * (F.softmax(student / 3, 1) - F.softmax(teacher / 3, 1))
    torch.testing.assert_close(student.grad, expected.detach(), atol=1e-12, rtol=1e-9)


def test_a_teacher_stays_as_it_is(data: Data) -> None:
    teacher = net(1)
    before = copy.deepcopy(teacher.state_dict())
    train(net(), data, replace(CONFIG, distill=0.5, epochs=1), teacher=teacher)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_student_of_a_teacher_alone_learns_its_answers(data: Data) -> None:
    """With weight 1 the classes do not count: a teacher that says the opposite is followed."""
    teacher = net(1)
    train(teacher, data, replace(CONFIG, epochs=8))
    with torch.no_grad():
        for parameter in list(teacher.parameters())[-2:]:
            parameter.neg_()
    history = train(net(), data, replace(CONFIG, epochs=8, distill=1.0), teacher=teacher)
    assert history.records[-1]["validation_accuracy"] <= 0.2


@pytest.mark.parametrize(
    ("arguments", "config", "says"),
    [
        ({}, {"distill": 0.5}, "needs a teacher"),
        ({"teacher": net()}, {}, "no effect without distill"),
        ({"teacher": nn.Sequential(nn.Flatten(), nn.Linear(192, 3))}, {"distill": 0.5}, r"gives \(1, 3\)"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    arguments: dict[str, Any], config: dict[str, Any], says: str, data: Data
) -> None:
    with pytest.raises(InputError, match=says):
        train(net(), data, replace(CONFIG, **config), **arguments)


@pytest.mark.parametrize("wrong", [{"weight": 1.1}, {"weight": math.nan}, {"temperature": 0.0}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RangeError, match="out of range"):
        distilled(F.cross_entropy, lambda inputs: torch.zeros(1, 2), None, **wrong)


def test_another_batch_is_refused() -> None:
    loss = distilled(F.cross_entropy, lambda inputs: torch.zeros(4, 2), None)
    with pytest.raises(InputError, match="anew for every batch"):
        loss(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))


# -- what else a recipe may have


@pytest.mark.parametrize("ways", [(1.0, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixed_classes_have_the_shares_of_the_mixed_images(ways: tuple[float, float]) -> None:
    # Images of class c are c everywhere: the mean of a mixed one says its shares.
    targets = torch.arange(4)
    images = targets.float().view(4, 1, 1, 1).expand(4, 3, 8, 8).clone()
    generator = torch.Generator().manual_seed(0)
    before = torch.get_rng_state()
    for _ in range(8):
        mixed, shares = mix(images, targets, 4, mixup=ways[0], cutmix=ways[1], generator=generator)
        torch.testing.assert_close(mixed.mean((1, 2, 3)), shares @ torch.arange(4.0))
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
    assert torch.equal(before, torch.get_rng_state())


def test_norms_and_biases_do_not_decay_where_they_are_not_to(data: Data) -> None:
    """With a gradient of nothing, what shrinks is what decays."""
    model = net()

    class Still(PlainStep):
        def loss(self, inputs: Tensor, targets: Tensor, loss_fn: Callable[..., Tensor]) -> Tensor:
            return sum((0.0 * parameter).sum() for parameter in model.parameters())  # type: ignore[return-value]

    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    train(model, data, replace(CONFIG, epochs=1, weight_decay=0.1, decay_norms=False), Still)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == (value.ndim == 1), name


def test_gradients_are_clipped(data: Data) -> None:
    seen = []

    class Watched(PlainStep):
        def step(self) -> None:
            seen.append(
                float(nn.utils.get_total_norm([p.grad for p in self._model.parameters() if p.grad is not None]))
            )

    train(net(), data, replace(CONFIG, epochs=1, clip_norm=0.01), Watched)
    assert max(seen) <= 0.01 * (1 + 1e-5)


RECIPES: dict[str, dict[str, Any]] = {
    "mixing": {"mixup": 0.4, "cutmix": 1.0},
    "two groups": {"optimizer": "adamw", "lr": 1e-3, "decay_norms": False},
    "clipped": {"clip_norm": 0.5},
    "balanced": {"balanced": True},
    "distilled": {"distill": 0.5},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("every", [None, 3])
def test_a_run_that_died_goes_on_bit_for_bit(recipe: str, every: int | None, data: Data, tmp_path: Path) -> None:
    """Dies in the seventh step: of five a epoch, so that the newest checkpoint is of step 5, or with `every` of 6."""
    config = replace(CONFIG, **RECIPES[recipe])
    extra: dict[str, Any] = {"teacher": net(1)} if config.distill else {}

    def hook(model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int) -> Pruner:
        budget = compressor.Budget(0.4)
        return Pruner(
            model, torch.zeros(1, 3, 8, 8), "l1", budget, optimizer=optimizer, total_steps=total_steps, prune_every=4
        )

    whole = net()
    expected = train(whole, data, config, hook, **extra)

    def die(step: int, total: int) -> None:
        if step == 7:
            raise RuntimeError("the power is gone")

    with pytest.raises(RuntimeError):
        train(net(), data, config, hook, checkpoint=tmp_path, on_progress=die, checkpoint_every=every, **extra)
    state = checkpoints.read(tmp_path)
    assert state is not None
    assert state["step"] == (6 if every else 5)
    resumed = net()
    history = train(resumed, data, config, hook, checkpoint=tmp_path, resume=True, checkpoint_every=every, **extra)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    without_time = [[{**each, "seconds": 0} for each in made.records] for made in (history, expected)]
    assert without_time[0] == without_time[1]


@pytest.mark.parametrize("estimator", ["gate", "mixed", "loss"])
def test_relevance_observes_distilled_and_mixed_losses(estimator: Any, data: Data) -> None:
    def hook(model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int) -> Pruner:
        return Pruner(
            model, torch.zeros(1, 3, 8, 8), "relevance", compressor.Budget(0.4), optimizer=optimizer,
            total_steps=total_steps, relevance=compressor.RelevanceConfig(estimator=estimator, observe_every=1),
        )  # fmt: skip

    model = net()
    params = sum(parameter.numel() for parameter in model.parameters())
    config = replace(CONFIG, epochs=20, mixup=1.0, distill=0.5)
    train(model, data, config, hook, teacher=net(1))
    assert sum(parameter.numel() for parameter in model.parameters()) <= 0.65 * params


def test_a_config_shows_what_is_usual() -> None:
    assert (TrainingConfig().distill, TrainingConfig().mixup, TrainingConfig().clip_norm) == (0.0, 0.0, None)
