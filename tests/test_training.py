"""The training loop: what a step is made of, and that a killed run goes on as if it had never stopped."""

from __future__ import annotations

import copy
import itertools
import math
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor._utils import StopRequest
from compressor.errors import ArtifactError, InputError, RangeError, TrainingError, UnknownNameError
from compressor.graph.tracing import trace
from compressor.surgery.cutting import cut
from compressor.training import checkpoint as checkpoints
from compressor.training import lr_range
from compressor.training.config import TrainingConfig
from compressor.training.data.augmentation import Augmentation
from compressor.training.data.images import Resident
from compressor.training.data.sources import Data
from compressor.training.data.splits import Split
from compressor.training.evaluation import evaluate, recalibrate
from compressor.training.history import History
from compressor.training.hooks import PlainStep
from compressor.training.loop import train
from compressor.training.lr_range import find_learning_rate
from compressor.training.optimizers import learning_rate

CONFIG = TrainingConfig(epochs=4, batch_size=8, lr=0.1, label_smoothing=0.1)


def make_split(count: int, seed: int) -> Split:
    """Noise whose brighter half (left or right) is the class."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 2
    pixels = torch.randint(0, 156, (count, 3, 8, 8), generator=generator)
    pixels[targets == 0, :, :, :4] += 100
    pixels[targets == 1, :, :, 4:] += 100
    split = Split.from_arrays(Resident(pixels.to(torch.uint8)), targets)
    return replace(split, mean=(128.0,) * 3, std=(64.0,) * 3, shift=1)


@pytest.fixture
def data() -> Data:
    splits = [make_split(count, seed) for seed, count in enumerate((44, 10, 10))]
    return Data("halves", ("left", "right"), (3, 8, 8), *splits)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(24, 2),
    )


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def timeless(history: History) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history.records]


# -- the step


def test_it_learns(data: Data) -> None:
    history = train(net(), data, replace(CONFIG, epochs=8))
    assert history.epochs[-1]["validation_accuracy"] == 1.0
    assert history.epochs[-1]["train_loss"] < history.epochs[0]["train_loss"]


def test_records_say_what_happened(data: Data) -> None:
    model, logged, steps = net(), [], []
    history = train(model, data, CONFIG, log=logged.append, on_progress=lambda *done: steps.append(done))
    assert list(history.records) == logged
    assert [record["epoch"] for record in history.epochs] == [1, 2, 3, 4]
    assert [record["step"] for record in history.epochs] == [5, 10, 15, 20]
    assert steps == [(step, 20) for step in range(1, 21)]
    last = history.epochs[-1]
    seen = evaluate(model, data.validation)
    assert (last["validation_accuracy"], last["validation_loss"]) == (seen.accuracy, pytest.approx(seen.loss))
    assert last["params"] == sum(parameter.numel() for parameter in model.parameters())
    assert last["lr"] == learning_rate(CONFIG, 19, 20)
    assert last["seconds"] > 0


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.8, nesterov=True, weight_decay=1e-3, fused=True),
    "adamw": partial(torch.optim.AdamW, betas=(0.8, 0.999), weight_decay=1e-3, fused=True),
}


def by_hand(model: nn.Module, data: Data, config: TrainingConfig) -> list[float]:
    """The same training as PyTorch's tutorials write it, with PyTorch's own scheduler."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = OPTIMIZERS[config.optimizer](model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(config, step, 20))
    losses = []
    for _ in range(config.epochs):
        model.train()
        total = 0.0
        for x, y in data.train.batches(8, shuffle=generator, augment=Augmentation(), drop_last=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += float(loss.detach().double()) * len(y)
        losses.append(total / 40)
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_against_a_loop_written_by_hand(data: Data, optimizer: str) -> None:
    config = replace(CONFIG, optimizer=optimizer, momentum=0.8, weight_decay=1e-3, lr=0.02)
    model = net()
    expected = by_hand(reference := copy.deepcopy(model), data, config)
    history = train(model, data, config)
    assert [record["train_loss"] for record in history.epochs] == pytest.approx(expected)
    assert same(values(model), values(reference))


class Watcher(PlainStep):
    """Notes in which state every call finds the model."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, total_steps: int) -> None:
        super().__init__(model, optimizer, total_steps)
        self.model, self.optimizer, self.total_steps = model, optimizer, total_steps
        self.seen: list[tuple[Any, ...]] = []

    def loss(self, inputs: Tensor, targets: Tensor, loss_fn: Callable[..., Tensor]) -> Tensor:
        self.before = self.model[0].weight.detach().clone()
        self.each = loss_fn(self.model(inputs), targets, reduction="none")
        clear = all(parameter.grad is None for parameter in self.model.parameters())
        self.seen.append(("loss", self.model.training, clear, self.each.shape == targets.shape))
        return self.each.mean()

    def step(self) -> dict[str, Any] | None:
        moved = not torch.equal(self.before, self.model[0].weight)
        graded = all(parameter.grad is not None for parameter in self.model.parameters())
        self.seen.append(("step", moved, graded, self.optimizer.param_groups[0]["lr"]))
        return {"event": "seen", "pair": (1, 2)} if len(self.seen) == 4 else None


def test_order_within_a_step(data: Data) -> None:
    made: list[Watcher] = []

    def hook(*arguments: Any) -> Watcher:
        made.append(Watcher(*arguments))
        return made[0]

    history = train(net().eval(), data, CONFIG, hook)
    assert made[0].total_steps == 20
    assert made[0].seen[0::2] == [("loss", True, True, True)] * 20
    assert made[0].seen[1::2] == [("step", True, True, learning_rate(CONFIG, step, 20)) for step in range(20)]
    assert history.events == ({"event": "seen", "epoch": 1, "step": 2, "pair": [1, 2]},)
    assert history.records[0] == history.events[0]


def test_fewer_images_than_a_batch_make_one_step(data: Data) -> None:
    history = train(net(), data, replace(CONFIG, batch_size=100))
    assert [record["step"] for record in history.epochs] == [1, 2, 3, 4]


def test_frozen_parameters_stay(data: Data) -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    before = values(model)
    train(model, data, CONFIG)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[3].weight, before["3.weight"])


@given(warmup=st.floats(0, 0.99), total=st.integers(1, 300))
def test_learning_rate_rises_then_falls(warmup: float, total: int) -> None:
    config = replace(CONFIG, warmup=warmup, lr=0.3)
    rates = [learning_rate(config, step, total) for step in range(total)]
    top = rates.index(max(rates))
    assert min(rates) > 0
    assert max(rates) <= 0.3
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_learning_rate_at_known_steps() -> None:
    config = replace(CONFIG, warmup=0.2, lr=1.0)
    rates = [learning_rate(config, step, 10) for step in (0, 1, 2, 6)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.5])


# -- kill and resume


class Killed(Exception):
    """Stands for whatever ends a process."""


def killed_at(step: int) -> Callable[[int, int], None]:
    def on_progress(done: int, total: int) -> None:
        if done == step:
            raise Killed

    return on_progress


class Narrowing(PlainStep):
    """Cuts half of the first layer's channels at step 7; the state says how often `step` was called."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, total_steps: int) -> None:
        super().__init__(model, optimizer, total_steps)
        self.graph, self.optimizer, self.calls = trace(model, torch.zeros(2, 3, 8, 8)), optimizer, 0

    def step(self) -> dict[str, Any] | None:
        self.calls += 1
        if self.calls != 7:
            return None
        cut(self.graph, {self.graph.groups[0].name: [0, 2, 5, 7]}, self.optimizer)
        return {"event": "cut", "kept": 4}

    def state_dict(self) -> dict[str, Any]:
        return {"calls": torch.tensor(self.calls)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = int(state["calls"])


class Drawing(PlainStep):
    """Draws from Python's and numpy's global generators in every step."""

    def step(self) -> dict[str, Any]:
        return {"event": "drawn", "python": random.random(), "numpy": np.random.rand()}


@pytest.mark.parametrize("killed", [3, 13, 20])
@pytest.mark.parametrize(
    ("options", "hook"),
    [
        ({}, PlainStep),
        ({"optimizer": "adamw", "lr": 0.01}, PlainStep),
        ({"amp": True, "channels_last": True}, PlainStep),
        ({}, Narrowing),
        ({"ema": 0.9, "accumulate": 2}, Narrowing),
        ({"crop": 0.5, "jitter": 0.2}, PlainStep),
        ({"optimizer": "adamw", "lr": 0.01, "channels_last": True}, Narrowing),
        ({}, Drawing),
    ],
)
def test_resumed_is_bit_identical(
    data: Data, tmp_path: Path, options: dict[str, Any], hook: type[PlainStep], killed: int
) -> None:
    config = replace(CONFIG, **options)
    random.seed(1)
    np.random.seed(1)
    whole = train(reference := net(), data, config, hook, checkpoint=tmp_path / "whole")
    random.seed(1)
    np.random.seed(1)
    with pytest.raises(Killed):
        train(net(), data, config, hook, checkpoint=tmp_path / "a/b", on_progress=killed_at(killed))
    if killed > 5:  # a checkpoint was written: everything comes from there
        random.seed(2)
        np.random.seed(2)
        model = net(seed=9)
    else:
        random.seed(1)
        np.random.seed(1)
        model = net()
    again = train(model, data, config, hook, checkpoint=tmp_path / "a/b", resume=True)
    assert timeless(again) == timeless(whole)
    assert same(values(model), values(reference))


# -- parts of a step, averages


def without_norms(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2))


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_step_in_parts_is_the_step(data: Data, parts: int) -> None:
    whole = train(reference := without_norms(), data, CONFIG)
    again = train(model := without_norms(), data, replace(CONFIG, accumulate=parts))
    assert [each["train_loss"] for each in again.epochs] == pytest.approx([each["train_loss"] for each in whole.epochs])
    for name, value in values(reference).items():
        torch.testing.assert_close(values(model)[name], value, rtol=1e-4, atol=1e-5)


def test_parts_are_run_one_after_the_other(data: Data) -> None:
    sizes: list[int] = []

    class Sizes(PlainStep):
        def loss(self, inputs: Tensor, targets: Tensor, loss_fn: Callable[..., Tensor]) -> Tensor:
            sizes.append(len(inputs))
            return super().loss(inputs, targets, loss_fn)

    train(net(), data, replace(CONFIG, epochs=1, accumulate=3), Sizes)
    assert sizes == [3, 3, 2] * 5


class Recording(PlainStep):
    """Keeps the weights of every step."""

    seen: ClassVar[list[dict[str, Tensor]]] = []

    def __init__(self, model: nn.Module, optimizer: Optimizer, total_steps: int) -> None:
        super().__init__(model, optimizer, total_steps)
        type(self).seen = []

    def step(self) -> None:
        self.seen.append(values(self._model))


def test_the_average_is_what_validation_sees_and_what_is_kept(data: Data) -> None:
    history = train(model := net(), data, replace(CONFIG, ema=0.8), Recording)
    plain = train(other := net(), data, CONFIG)
    assert [each["train_loss"] for each in history.epochs] == [each["train_loss"] for each in plain.epochs]
    assert not same(values(model), values(other))
    expected: dict[str, Tensor] = {}
    for step, weights in enumerate(Recording.seen, 1):
        decay = min(0.8, (1 + step) / (10 + step))
        for name, value in weights.items():
            old = expected.get(name, value)
            expected[name] = old + (value - old) * (1 - decay) if value.is_floating_point() else value
    for name, value in values(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert history.epochs[-1]["validation_loss"] == pytest.approx(evaluate(model, data.validation).loss)


def test_the_average_begins_anew_after_a_cut(data: Data) -> None:
    train(model := net(), data, replace(CONFIG, ema=0.8), Narrowing)
    assert model[0].out_channels == 4
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 2)


@pytest.mark.slow
def test_compiled_steps_are_the_steps(data: Data) -> None:
    """Also behind a cut, and without using up the recompilations that PyTorch allows."""
    whole = train(reference := without_norms(), data, CONFIG)
    again = train(model := without_norms(), data, replace(CONFIG, compile=True))
    assert [each["train_loss"] for each in again.epochs] == pytest.approx([each["train_loss"] for each in whole.epochs])
    for name, value in values(reference).items():
        torch.testing.assert_close(values(model)[name], value, rtol=1e-3, atol=1e-4)


def test_narrowed_model_is_whole_after_resume(data: Data, tmp_path: Path) -> None:
    train(net(), data, CONFIG, Narrowing, checkpoint=tmp_path)
    model = net(seed=9)
    parameters = list(model.parameters())
    history = train(model, data, CONFIG, Narrowing, checkpoint=tmp_path, resume=True)
    assert (model[0].out_channels, model[1].num_features, model[3].in_channels) == (4, 4, 4)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert history.epochs[-1]["params"] == sum(parameter.numel() for parameter in model.parameters())
    assert history.epochs[-1]["params"] < history.epochs[0]["params"]


def test_device_may_change_between_kill_and_resume(data: Data, tmp_path: Path) -> None:
    whole = train(reference := net(), data, CONFIG)
    with pytest.raises(Killed):
        train(net(), data, CONFIG, checkpoint=tmp_path, on_progress=killed_at(12))
    again = train(model := net(seed=9), data, replace(CONFIG, device="cpu:0"), checkpoint=tmp_path, resume=True)
    assert timeless(again) == timeless(whole)
    assert same(values(model), values(reference))


def test_a_resume_says_whether_there_was_a_checkpoint(
    data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "compressor")
    train(net(), data, CONFIG, checkpoint=tmp_path / "new", resume=True)
    assert "no checkpoint in" in caplog.text
    assert "4 of 44 training images are left out of each epoch" in caplog.text
    train(net(), data, CONFIG, checkpoint=tmp_path / "new", resume=True)
    assert "going on after step 20" in caplog.text


def test_log_gets_only_what_is_new(data: Data, tmp_path: Path) -> None:
    first: list[Any] = []
    second: list[Any] = []
    with pytest.raises(Killed):
        train(net(), data, CONFIG, checkpoint=tmp_path, on_progress=killed_at(12), log=first.append)
    history = train(net(), data, CONFIG, checkpoint=tmp_path, resume=True, log=second.append)
    assert list(history.records) == first + second


def test_finished_training_is_not_repeated(data: Data, tmp_path: Path) -> None:
    whole = train(reference := net(), data, CONFIG, checkpoint=tmp_path)
    again = train(model := net(seed=9), data, CONFIG, checkpoint=tmp_path, resume=True, on_progress=killed_at(1))
    assert again == whole
    assert same(values(model), values(reference))


def test_without_resume_a_checkpoint_is_replaced(data: Data, tmp_path: Path) -> None:
    train(net(), data, replace(CONFIG, seed=3), checkpoint=tmp_path)
    with pytest.raises(Killed):
        train(net(), data, CONFIG, checkpoint=tmp_path, on_progress=killed_at(7))
    whole = train(net(), data, CONFIG)
    assert timeless(train(net(), data, CONFIG, checkpoint=tmp_path, resume=True)) == timeless(whole)


def test_interrupted_write_leaves_the_checkpoint_before(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_save, written = torch.save, []

    def save(state: Any, file: Any) -> None:
        written.append(state["epoch"])
        real_save(state, file)
        if state["epoch"] == 3:
            raise Killed

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(Killed):
        train(net(), data, CONFIG, checkpoint=tmp_path)
    assert written == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["previous.pt", "state.pt"]
    monkeypatch.undo()
    again = train(net(), data, CONFIG, checkpoint=tmp_path, resume=True)
    assert timeless(again) == timeless(train(net(), data, CONFIG))


@pytest.mark.parametrize("place", [60, 3_000, -40])
def test_a_flipped_bit_is_noticed_and_the_checkpoint_before_goes_on(
    place: int, data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Killed):
        train(net(), data, CONFIG, checkpoint=tmp_path, on_progress=killed_at(17))
    content = bytearray((tmp_path / "state.pt").read_bytes())
    content[place] ^= 1
    (tmp_path / "state.pt").write_bytes(content)
    again = train(net(), data, CONFIG, checkpoint=tmp_path, resume=True)
    assert "state.pt is damaged" in caplog.text
    assert "going on from the checkpoint before it" in caplog.text
    assert timeless(again) == timeless(train(net(), data, CONFIG))


def test_killed_between_the_two_names_of_a_checkpoint(data: Data, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(net(), data, CONFIG, checkpoint=tmp_path, on_progress=killed_at(12))
    (tmp_path / "state.pt").rename(tmp_path / "previous.pt")
    again = train(net(), data, CONFIG, checkpoint=tmp_path, resume=True)
    assert timeless(again) == timeless(train(net(), data, CONFIG))


@pytest.mark.parametrize("step", [1, 2, 5, 6, 17, 20])
def test_a_run_that_is_asked_to_stop_ends_its_step_and_goes_on_from_there(
    step: int, data: Data, tmp_path: Path
) -> None:
    stop = StopRequest()

    def ask(done: int, total: int) -> None:
        stop.signal = 15 if done == step else None

    with pytest.raises(KeyboardInterrupt):
        train(net(), data, CONFIG, checkpoint=tmp_path, on_progress=ask, stop=stop)
    assert checkpoints.read(tmp_path)["step"] == step
    again = train(net(), data, CONFIG, checkpoint=tmp_path, resume=True)
    assert timeless(again) == timeless(train(net(), data, CONFIG))


def test_a_signal_waits_for_the_end_of_a_step_and_a_second_one_does_not() -> None:
    stop, reached = StopRequest(), list[int]()

    def ask_twice() -> None:
        with stop.listening(), stop.deferred():
            signal.raise_signal(signal.SIGTERM)
            reached.append(1)
            signal.raise_signal(signal.SIGINT)
            reached.append(2)

    with pytest.raises(KeyboardInterrupt):
        ask_twice()
    assert (reached, stop.signal) == ([1], signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop.listening():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


TAMPERED: dict[str, Callable[[dict[str, Any]], object]] = {
    "a field is missing": lambda state: state.pop("optimizer"),
    "tensors are gone": lambda state: state["tensors"].clear(),
    "a tensor is a list": lambda state: state["tensors"].update({"0.weight": [1, 2]}),
    "a number for a method": lambda state: state["numbers"].update({"": {"forward": 3}}),
    "a module that is not there": lambda state: state["numbers"].update({"nine": {"eps": 3}}),
    "a step that is none": lambda state: state.update(step="many"),
    "records that are none": lambda state: state.update(records="{"),
    "the state of a generator": lambda state: state.update(order=torch.zeros(3)),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_checkpoint_that_was_tampered_with_is_named(how: str, data: Data, tmp_path: Path) -> None:
    train(net(), data, replace(CONFIG, epochs=4), checkpoint=tmp_path)
    state = checkpoints.read(tmp_path)
    TAMPERED[how](state)
    checkpoints.write(tmp_path, state)
    (tmp_path / "previous.pt").unlink()
    with pytest.raises((ArtifactError, InputError), match=r"damaged|not those of this model|belong to another model"):
        train(net(), data, CONFIG, checkpoint=tmp_path, resume=True)


# -- what is refused


def other_net() -> nn.Module:
    model = net()
    model[0] = nn.Conv2d(3, 8, 5, padding=2)
    return model


@pytest.mark.parametrize(
    ("write", "model", "config", "error", "message"),
    [
        (
            lambda p: p.write_bytes(p.read_bytes()[:500]),
            net,
            CONFIG,
            ArtifactError,
            "state.pt is damaged: its content does not match its checksum",
        ),
        (lambda p: torch.save(net(), p), net, CONFIG, ArtifactError, "is no checkpoint of this version"),
        (lambda p: torch.save(net().state_dict(), p), net, CONFIG, ArtifactError, "is no checkpoint of this version"),
        (lambda p: None, other_net, CONFIG, ArtifactError, "'0.weight' is (8, 3, 3, 3) there and (8, 3, 5, 5) here"),
        (
            lambda p: None,
            lambda: net()[:3] + net()[6:8] + nn.Sequential(nn.Linear(32, 2)),
            CONFIG,
            ArtifactError,
            "absent",
        ),
        (
            lambda p: None,
            net,
            replace(CONFIG, lr=0.2),
            InputError,
            "was made with lr = 0.1, not 0.2: resume with the same lr",
        ),
        (lambda p: None, net, replace(CONFIG, epochs=5), InputError, "epochs = 4, not 5"),
    ],
)
def test_checkpoint_that_does_not_fit(
    data: Data,
    tmp_path: Path,
    write: Callable[[Path], object],
    model: Callable[[], nn.Module],
    config: TrainingConfig,
    error: type[Exception],
    message: str,
) -> None:
    train(net(), data, CONFIG, checkpoint=tmp_path)
    (tmp_path / "previous.pt").unlink()
    write(tmp_path / "state.pt")
    content = (tmp_path / "state.pt").read_bytes()
    before = values(built := model())
    with pytest.raises(error) as caught:
        train(built, data, config, checkpoint=tmp_path, resume=True)
    assert message in str(caught.value)
    assert same(values(built), before)
    assert (tmp_path / "state.pt").read_bytes() == content


def test_checkpoint_of_other_data(data: Data, tmp_path: Path) -> None:
    train(net(), data, CONFIG, checkpoint=tmp_path)
    with pytest.raises(InputError, match="training images = 44, not 40"):
        train(net(), replace(data, train=make_split(40, 0)), CONFIG, checkpoint=tmp_path, resume=True)


def test_divergence_is_said_and_the_checkpoint_stays(data: Data, tmp_path: Path) -> None:
    class Diverging(PlainStep):
        calls = 0

        def loss(self, inputs: Tensor, targets: Tensor, loss_fn: Callable[..., Tensor]) -> Tensor:
            self.calls += 1
            return super().loss(inputs, targets, loss_fn) * (float("nan") if self.calls == 8 else 1)

    with pytest.raises(TrainingError) as caught:
        train(net(), data, CONFIG, Diverging, checkpoint=tmp_path)
    says = (
        "the loss became nan in step 8, epoch 2: training diverged at lr = 0.1; try 0.03 or less; images of that step"
    )
    assert str(caught.value).startswith(says)
    assert caught.value.step == 8
    assert checkpoints.read(tmp_path)["epoch"] == 1


def test_the_images_of_a_diverging_step_are_named(data: Data) -> None:
    """Of one image among 44 the loss is not finite: it is in the batch that is named, wherever the shuffle put it."""
    pixels = data.train.images.take(torch.arange(44), torch.device("cpu")).clone()
    pixels[13] = 255  # the only white one
    white = replace(data, train=replace(data.train, images=Resident(pixels), shift=0))

    class Diverging(PlainStep):
        def loss(self, inputs: Tensor, targets: Tensor, loss_fn: Callable[..., Tensor]) -> Tensor:
            bad = inputs.flatten(1).amin(1).amax() >= (255 - 128) / 64
            return super().loss(inputs, targets, loss_fn) * (float("inf") if bad else 1)

    for seed in range(5):
        with pytest.raises(TrainingError) as caught:
            train(net(), white, replace(CONFIG, seed=seed), Diverging)
        assert 13 in caught.value.images
        assert len(caught.value.images) == CONFIG.batch_size


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (nn.Linear(24, 5), "Sequential gives (1, 5) for one image of halves, which has 2 classes"),
        (nn.Unflatten(1, (24, 1)), "Sequential gives (1, 24, 1) for one image of halves, which has 2 classes"),
        (nn.LSTM(24, 2), "Sequential returns a tuple for an image, and one tensor of scores is needed, (1, 2)"),
    ],
)
def test_model_must_fit_the_data(data: Data, head: nn.Module, said: str) -> None:
    model = net()
    model[9] = head
    with pytest.raises(InputError) as caught:
        train(model, data, CONFIG)
    assert said in str(caught.value)


def test_an_event_that_is_no_json_is_refused_at_once(data: Data) -> None:
    class Odd(PlainStep):
        def step(self) -> dict[str, Any]:
            return {"event": "cut", "kept": torch.arange(3)}

    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        train(net(), data, CONFIG, Odd)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "epochs = 0 is out of range: give epochs in 1 to 100,000"),
        ("batch_size", 1, "batch_size = 1 is out of range: give batch_size in 2 to 1,000,000"),
        ("lr", 0.0, "lr = 0.0 is out of range: give lr in (0, inf)"),
        ("lr", float("nan"), "lr = nan"),
        ("momentum", 1.0, "momentum = 1.0"),
        ("weight_decay", -1e-4, "weight_decay = -0.0001"),
        ("warmup", 1.0, "warmup = 1.0"),
        ("label_smoothing", 1.0, "label_smoothing = 1.0"),
        ("seed", -1, "seed = -1"),
        ("seed", 2**63, "seed = 9223372036854775808 is out of range: give seed in 0 to 2**63 - 1"),
    ],
)
def test_out_of_range(field: str, value: float, message: str) -> None:
    with pytest.raises(RangeError) as caught:
        replace(CONFIG, **{field: value})
    assert message in str(caught.value)


def test_settings_can_be_read_without_torch() -> None:
    code = (
        "import sys; from compressor.training import TrainingConfig; TrainingConfig(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_optimizer() -> None:
    with pytest.raises(UnknownNameError, match="unknown optimizer 'adam': did you mean 'adamw'"):
        replace(CONFIG, optimizer="adam")


# -- evaluate and recalibrate


def test_evaluate_against_one_big_batch(data: Data) -> None:
    model = net().eval()
    inputs, targets = next(data.test.batches(10))
    scores = model(inputs).detach()
    seen = evaluate(model, data.test, batch_size=3)
    assert seen.accuracy == float((scores.argmax(1) == targets).float().mean())
    assert seen.loss == pytest.approx(float(nn.functional.cross_entropy(scores, targets)))
    assert seen.n == 10
    for index, (right, images) in enumerate(zip(seen.right_of, seen.images_of, strict=True)):
        assert images == int((targets == index).sum())
        assert right == int(((targets == index) & (scores.argmax(1) == index)).sum())


@pytest.mark.parametrize("look", [evaluate, recalibrate])
def test_modes_come_back_even_after_a_failure(data: Data, look: Callable[..., object]) -> None:
    model = net().train()
    model[4].eval()
    modes = [module.training for module in model.modules()]
    before = values(model)
    look(model, data.test, batch_size=2)
    assert [module.training for module in model.modules()] == modes
    changed = {name for name, tensor in values(model).items() if not torch.equal(tensor, before[name])}
    statistics = {
        f"{norm}.{name}" for norm in (1, 4) for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert changed == (statistics if look is recalibrate else set())
    model[6] = nn.Linear(3, 3)  # does not fit: the model fails in the middle
    with pytest.raises(RuntimeError):
        look(model, data.test, batch_size=2)
    assert [module.training for module in model.modules()] == modes
    assert [model[1].momentum, model[4].momentum] == [0.1, 0.1]


def test_recalibration_averages_over_drawn_images(data: Data) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.9), nn.BatchNorm2d(3))
    model[0].running_mean.fill_(50)  # what a long training left behind
    model[0].num_batches_tracked.fill_(1000)
    recalibrate(model, data.train, images=18, batch_size=6)
    drawn = list(data.train.batches(6, shuffle=torch.Generator().manual_seed(0)))[:3]
    means = torch.stack([images.mean((0, 2, 3)) for images, _ in drawn])
    variances = torch.stack([images.var((0, 2, 3)) for images, _ in drawn])
    assert torch.allclose(model[0].running_mean, means.mean(0), atol=1e-6)
    assert torch.allclose(model[0].running_var, variances.mean(0), rtol=1e-5)
    assert model[2].running_mean.abs().max() < 1e-5  # behind the first one, and behind dropout that does nothing
    assert (model[2].running_var - 1).abs().max() < 0.02


def test_recalibration_takes_what_there_is(data: Data) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    recalibrate(model, data.test, images=1000, batch_size=1000)
    images, _ = next(data.test.batches(10))
    assert torch.allclose(model[0].running_mean, images.mean((0, 2, 3)), atol=1e-6)
    with pytest.raises(RangeError, match="images = 1 is out of range"):
        recalibrate(model, data.test, images=1)


def test_recalibration_without_statistics_does_not_run_the_model(data: Data, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "compressor")
    runs: list[object] = []
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    norm.register_forward_hook(lambda *call: runs.append(call))
    recalibrate(nn.Sequential(norm), data.test)
    assert runs == []
    assert "has no BatchNorm that keeps statistics" in caplog.text
    norm.track_running_stats = True  # the same model, and now it is run
    norm.register_buffer("running_mean", torch.zeros(3))
    norm.register_buffer("running_var", torch.ones(3))
    norm.register_buffer("num_batches_tracked", torch.tensor(0))
    recalibrate(nn.Sequential(norm), data.test)
    assert len(runs) == 1


# -- a learning rate that is found


def test_a_rate_is_found_that_learns_and_the_model_stays_as_it_was(data: Data) -> None:
    before = values(model := net())
    found = find_learning_rate(model, data, CONFIG)
    assert same(values(model), before)
    assert 1e-4 < found < 10
    losses = {
        lr: train(net(), data, replace(CONFIG, lr=lr)).epochs[-1]["validation_loss"] for lr in (found / 1000, found)
    }
    assert losses[found] < losses[found / 1000]


def test_the_rate_found_is_that_of_the_lowest_loss_over_ten(data: Data) -> None:
    """A loss of one's own shape: least at the 60th of a hundred steps."""
    rates: list[float] = []

    def parabola(model: nn.Module, optimizer: Optimizer, steps: int) -> PlainStep:
        hook = hooked(model, optimizer, steps)
        inner = hook.loss

        def loss(inputs: Tensor, targets: Tensor, loss_fn: Any) -> Tensor:
            own = inner(inputs, targets, loss_fn)
            rates.append(optimizer.param_groups[0]["lr"])
            hook._loss = torch.tensor((len(rates) - 60) ** 2 / 1000 + 1.0)  # type: ignore[attr-defined]
            return own

        hook.loss = loss  # type: ignore[method-assign]
        return hook

    trial = lr_range._Trial()
    hooked = trial.hook
    with pytest.raises(lr_range._Found):
        train(net(), data, replace(CONFIG, epochs=30), parabola)
    assert rates[0] == pytest.approx(1e-5)
    ratios = [b / a for a, b in itertools.pairwise(rates)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    lowest = trial.rates[min(range(len(trial.losses)), key=trial.losses.__getitem__)]
    assert 60 <= rates.index(lowest) + 1 <= 75  # smoothed, it comes a little later


def test_a_model_without_a_finite_loss_has_no_rate(data: Data) -> None:
    model = net()
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(TrainingError):
        find_learning_rate(model, data, CONFIG)
