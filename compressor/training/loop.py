"""The training loop: steps, epochs, records, and going on from a checkpoint."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor._utils import Ranks, StopRequest
from compressor.errors import InputError, TrainingError
from compressor.graph import all_numeric_attributes
from compressor.training import checkpoint as checkpoints
from compressor.training.averaging import MovingAverage
from compressor.training.config import TrainingConfig
from compressor.training.data.augmentation import Augmentation
from compressor.training.data.images import Progress
from compressor.training.data.mixing import mix
from compressor.training.data.sources import Data
from compressor.training.distillation import distilled
from compressor.training.evaluation import evaluate, in_mode, running_statistics
from compressor.training.history import History
from compressor.training.hooks import HookFactory, LossFunction, PlainStep
from compressor.training.optimizers import learning_rate, make_optimizer
from compressor.training.sync_norms import synchronized_norms

logger = logging.getLogger(__name__)

Log = Callable[[Mapping[str, Any]], None]


def train(
    model: nn.Module,
    data: Data,
    config: TrainingConfig,
    hook: HookFactory = PlainStep,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    on_progress: Progress = lambda step, total_steps: None,
    log: Log = lambda record: None,
    stop: StopRequest | None = None,
    about: Mapping[str, Any] = MappingProxyType({}),
    teacher: nn.Module | None = None,
    checkpoint_every: int | None = None,
    ranks: Ranks | None = None,
) -> History:
    """Train a model in place, on `config.device`, where it stays.

    Seeds torch's global generator, so that dropout is repeatable too.

    Args:
        model: returns `(B, classes)` scores.
        data: learns from `data.train` and looks at `data.validation` after every epoch; never at `data.test`.
        config: how.
        hook: called as `hook(model, optimizer, total_steps)`, makes what takes part in every step.
        checkpoint: folder of the checkpoint that is written after every epoch; None writes none.
        resume: go on from the checkpoint; from the beginning if none was written yet. The model must be built as it was
            for the first call (its weights do not matter); it is narrowed to what the checkpoint holds before the hook
            is made, and the hook gets its state back.
        on_progress: called after every step with the steps done and their total.
        log: called with every new record when it arises; see `History`. After an interruption, events of the epoch that
            was cut off arise again.
        stop: asks to stop at the end of a step, with a checkpoint.
        teacher: a model of the same outputs, on `config.device`, that this one also learns from; `config.distill` says
            how much. It stays as it is.
        checkpoint_every: steps between checkpoints besides those after an epoch.
        about: more that must be the same when the run is resumed, as JSON values by name.
        ranks: the processes that train this model together. Each calls with the same arguments, takes its share of
            every batch, and has the same weights after every step; all begin with those of the first, which alone
            writes and reads checkpoints. The hook must know the ranks as well.

    Raises:
        KeyboardInterrupt: `stop` of a rank asked for it.
        RanksError: another rank has ended.
        InputError: the ranks cannot share a batch evenly; the model's output does not fit the data; there is a teacher
            without `config.distill`, or the other way round; the checkpoint is of a run with other settings.
        ArtifactError: the checkpoint is damaged or of another model. The model is as it was.
        TrainingError: the loss became infinite or not a number; on a CPU at that step. The checkpoint before it stays.
    """
    ranks = ranks or Ranks()
    _require_even(data, config, ranks)
    require_scores(model.to(config.device), data, config.device)
    if teacher is None and config.distill:
        raise InputError(f"distill = {config.distill} needs a teacher: pass teacher=, or leave it out")
    if teacher is not None:
        if not config.distill:
            raise InputError(
                "a teacher has no effect without distill: pass TrainingConfig(distill=0.5), or leave it out"
            )
        require_scores(teacher, data, config.device)
    dense = checkpoints.shapes(model)  # before the checkpoint narrows it: what a later resume is held against
    about = {**_about(config, data), **about}
    state = _restored(model, checkpoint, about, ranks) if checkpoint and resume else None
    checkpoints.take_over(model, ranks)
    # The hook is made on the narrowed model: what it traces must be what it goes on with.
    run = _Run(model, data, config, hook, on_progress, log, teacher, ranks)
    if state and checkpoint:
        with checkpoints.as_damage(checkpoint):
            run.load_state_dict(state)
    stop = stop or StopRequest()

    def write() -> None:
        if checkpoint:
            state = run.state_dict()
            if ranks.is_first:
                checkpoints.write(checkpoint, {**state, "about": about, "dense": dense})

    def is_stopping() -> bool:
        # Of whichever rank: one that stops alone leaves the others waiting in the next step.
        return ranks.any([stop.signal is not None])[0]

    with synchronized_norms(model, ranks) if config.sync_batchnorm else nullcontext():
        while run.epoch < config.epochs:
            with stop.deferred():
                for _ in run.train_epoch():
                    if is_stopping():
                        break
                    if checkpoint_every and run.step % checkpoint_every == 0:
                        write()
                write()
                stops = is_stopping()
            if stops:
                raise KeyboardInterrupt
    run.finish()
    return History(tuple(run.records))


def _require_even(data: Data, config: TrainingConfig, ranks: Ranks) -> None:
    """Refuse ranks whose shares of a batch would differ: the mean over the ranks would be no mean over images."""
    size = min(config.batch_size, len(data.train))
    if size % ranks.size:
        raise InputError(
            f"{ranks.size} processes cannot share batches of {size} images evenly: give --batch-size "
            f"{max(1, size // ranks.size) * ranks.size}"
        )


def _restored(model: nn.Module, folder: Path, about: Mapping[str, Any], ranks: Ranks) -> dict[str, Any] | None:
    """Return the checkpoint in a folder, if there is one; writes its weights into the model, however narrow."""
    state = ranks.object_of_the_first(checkpoints.read(folder) if ranks.is_first else None)
    if state is None:
        logger.info("no checkpoint in %s yet: training begins anew", folder)
        return None
    with checkpoints.as_damage(folder):
        checkpoints.require_fit(state, folder, about, checkpoints.shapes(model))
        checkpoints.restore_model(model, state["tensors"], state["numbers"])
    logger.info("going on after step %d, from the checkpoint in %s", state["step"], folder)
    return state


class _Run:
    """One training: what changes from step to step."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        config: TrainingConfig,
        hook: HookFactory,
        on_progress: Progress,
        log: Log,
        teacher: nn.Module | None,
        ranks: Ranks,
    ) -> None:
        torch.manual_seed(config.seed + ranks.rank)  # dropout of other images is other dropout
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        self.epoch = 0
        self.step = 0
        self.records: list[dict[str, Any]] = []
        self._model = model
        self._data = data
        self._config = config
        self._on_progress = on_progress
        self._log = log
        self._teacher = teacher
        self._ranks = ranks
        self._device = torch.device(config.device)
        self._total = config.epochs * _steps_per_epoch(len(data.train), config.batch_size)
        # A generator of its own: a hook that draws from the global one must not change which images come when.
        self._generator = torch.Generator().manual_seed(config.seed)
        self._begin_epoch()
        self._loss_fn = partial(F.cross_entropy, label_smoothing=config.label_smoothing)
        self._optimizer = make_optimizer(model, config)
        self._average = MovingAverage(model, config.ema) if config.ema else None
        runs = cast(nn.Module, torch.compile(model)) if config.compile else model
        self._hook = hook(runs, self._optimizer, self._total)

    def _begin_epoch(self) -> None:
        self._order = self._generator.get_state()  # from which the order of the epoch's images is drawn
        self._draws: Tensor | None = None  # where the generator was when the epoch was interrupted
        self._done = 0  # batches
        # Summed on the device in float64 and asked for at the end: the GPU never waits, and nothing is rounded off.
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._images = 0

    def train_epoch(self) -> Iterator[None]:
        """Go through the train split once, look at the validation split, and record both; yields behind every step.

        Whoever stops there may take the state, and go on from it in another process.
        """
        began = perf_counter()
        self._model.train()
        for inputs, targets in self._batches():
            loss = self._take_step(inputs, targets)
            # On a CPU the number is there. A GPU would have to be waited for in every step: it is asked once an epoch.
            if self._device.type == "cpu" and not math.isfinite(loss):
                config = self._config
                chosen = self._data.train.chosen(self._done, config.batch_size, self._order, balanced=config.balanced)
                raise TrainingError(float(loss), self.epoch + 1, config.lr, self.step, chosen.tolist())
            images = len(targets) * self._ranks.size
            self._loss += loss.double() * images
            self._images += images
            self._done += 1
            yield
        mean = float(self._loss) / self._images
        self.epoch += 1
        self._begin_epoch()
        if not math.isfinite(mean):
            raise TrainingError(mean, self.epoch, self._config.lr)
        with self._average.applied() if self._average else nullcontext():
            seen = evaluate(self._model, self._data.validation, self._config.batch_size, self._device, self._ranks)
        record = {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": mean,
            "validation_accuracy": seen.accuracy,
            "validation_loss": seen.loss,
            "lr": self._optimizer.param_groups[0]["lr"],
            "seconds": perf_counter() - began,
            "params": sum(parameter.numel() for parameter in self._model.parameters()),
        }
        self._note(record)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._data.train.batches(
            self._config.batch_size,
            shuffle=self._generator,
            augment=Augmentation(self._config.crop, self._config.jitter) if self._config.augment else None,
            balanced=self._config.balanced,
            device=self._device,
            # A batch of one image at the end would give BatchNorm nothing to take a variance of.
            drop_last=len(self._data.train) >= self._config.batch_size,
            done=self._done,
            draws=self._draws,
            rows=self._ranks.own_rows,
        )

    def _take_step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        config = self._config
        if config.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        # Set anew each time from the number of the step: a resumed run needs no state of a scheduler.
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step, self._total)
        if config.mixup or config.cutmix:
            shares = {"mixup": config.mixup, "cutmix": config.cutmix}
            inputs, targets = mix(inputs, targets, len(self._data.classes), **shares, generator=self._generator)
        loss = self._add_gradients(inputs, targets)
        self._average_over_ranks(loss)
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._model.parameters(), config.clip_norm)
        self._optimizer.step()
        self.step += 1
        # Before the gradients are cleared: criteria read them, and a cut slices them along with the weights.
        event = self._hook.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._average:
            self._average.update()
        if event is not None and config.compile:
            torch.compiler.reset()  # or the old widths would count towards dynamo's limit of recompilations
        if event is not None:
            self._note({"event": "update", "epoch": self.epoch + 1, "step": self.step, **event})
        self._on_progress(self.step, self._total)
        return loss

    def _add_gradients(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Run the batch forward and backward, in as many parts as asked for, and return its mean loss."""
        loss = torch.zeros((), device=inputs.device)
        parts = self._config.accumulate
        for some, wanted in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            with self._precision():
                mean = self._hook.loss(some, wanted, self._batch_loss(some))
            share = len(some) / len(inputs)
            (mean * share).backward()  # type: ignore[no-untyped-call]
            loss += mean.detach() * share
        return loss

    @torch.no_grad()
    def _average_over_ranks(self, loss: Tensor) -> None:
        """Put the means over the ranks in place of the loss, the gradients, and the statistics that norms keep.

        Other buffers become those of the first rank. One transfer, and no wrapper around the model that every cut would
        have to renew.
        """
        if self._ranks.size == 1:
            return
        parameters = list(self._model.parameters())
        # A part of the model that only some images reach has a gradient on some ranks alone.
        reached = self._ranks.any([parameter.grad is not None for parameter in parameters])
        for parameter, is_reached in zip(parameters, reached, strict=True):
            if is_reached and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        kept = list(running_statistics(self._model))
        means = [loss, *gradients, *kept]
        for tensor in means:
            tensor /= self._ranks.size
        averaged = set(map(id, kept))
        others = [each for each in self._model.buffers() if each.is_floating_point() and id(each) not in averaged]
        # Not the mean of what is the same everywhere: a sum of seven sevenths may be off by a bit, in every step.
        for buffer in others if self._ranks.rank else ():
            buffer.zero_()
        self._ranks.sum_([*means, *others])

    def _batch_loss(self, inputs: Tensor) -> LossFunction:
        if self._teacher is None:
            return self._loss_fn
        config = self._config
        return distilled(self._loss_fn, self._teacher, inputs, weight=config.distill, temperature=config.temperature)

    def _precision(self) -> AbstractContextManager[Any]:
        # bfloat16 has float32's range, so that no loss has to be scaled, as float16 would ask for.
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._config.amp)

    def _note(self, record: Mapping[str, Any]) -> None:
        # NOTE: through JSON, so that a record that could not be read back fails now, and a resumed run's are equal.
        self.records.append(json.loads(json.dumps(record)))
        self._log(self.records[-1])

    def finish(self) -> None:
        """Leave the model as validation saw it."""
        if self._average:
            self._average.exchange()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes; every rank asks at the same time."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "records": json.dumps(self.records),  # one string, not thousands of objects to unpickle
            "numbers": all_numeric_attributes(self._model),
            "tensors": {name: tensor.detach() for name, tensor in checkpoints.tensors(self._model).items()},
            "optimizer": self._optimizer.state_dict(),
            "hook": self._hook.state_dict(),
            "average": self._average.state_dict() if self._average else {},
            "order": self._order,
            "draws": self._generator.get_state(),
            "done": self._done,
            "loss": self._loss,
            "images": self._images,
            "random": self._ranks.objects(checkpoints.random_state(self._device)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; the model has its tensors already."""
        self.epoch = int(state["epoch"])
        self.step = int(state["step"])
        self.records = json.loads(state["records"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._hook.load_state_dict(state["hook"])
        if self._average:
            self._average.load_state_dict(state["average"])
        self._generator.set_state(state["order"])
        self._begin_epoch()
        self._done = state["done"]
        self._draws = state["draws"] if self._done else None
        self._loss = state["loss"].to(self._device)
        self._images = state["images"]
        # Last: making the model and the hook drew from the global generators as well.
        if len(state["random"]) == self._ranks.size:
            checkpoints.restore_random_state(state["random"][self._ranks.rank], self._device)
        else:  # as many streams as there were ranks: others draw anew, and not what they drew in the beginning
            torch.manual_seed(self._config.seed + self._ranks.rank + (self.step << 32))


def _steps_per_epoch(images: int, batch_size: int) -> int:
    """Return the whole batches of an epoch; fewer images than one batch make one incomplete batch, and it counts."""
    if images < batch_size:
        logger.info("the train split has %d images: every step takes all of them, not %d", images, batch_size)
        return 1
    if left_out := images % batch_size:
        logger.info("%d of %d training images are left out of each epoch, others every time", left_out, images)
    return images // batch_size


def _about(config: TrainingConfig, data: Data) -> dict[str, Any]:
    """Return what must be the same when a run is resumed; the device may change."""
    settings = {name: value for name, value in asdict(config).items() if name != "device"}
    return {**settings, "training images": len(data.train), "classes": list(data.classes)}


def require_scores(model: nn.Module, data: Data, device: str) -> None:
    """Refuse a model whose output is not one score a class, before a loss on it fails or means something else.

    Raises:
        InputError: what the model, which is on `device`, returns for an image of the data does not fit its classes.
    """
    inputs, _ = next(iter(data.validation.batches(1, device=device)))
    # In evaluation mode: BatchNorm would refuse one image, and its statistics are not ours to change.
    with in_mode(model, training=False), torch.no_grad():
        outputs = model(inputs)
    got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if not isinstance(outputs, Tensor):
        raise InputError(
            f"{type(model).__name__} returns a {got} for an image, and one tensor of scores is needed, (1, "
            f"{len(data.classes)}): let its factory return a module that gives the scores alone"
        )
    if got != (1, len(data.classes)):
        raise InputError(
            f"{type(model).__name__} gives {got} for one image of {data.name}, which has {len(data.classes)} classes: "
            f"build it with num_classes={len(data.classes)} so that it gives (1, {len(data.classes)})"
        )
