"""The stages of a run: what is trained and cut, in which order, and what is recorded of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from compressor.budget import Budget, PruneResult
from compressor.criteria import needs_gradients
from compressor.errors import BudgetError
from compressor.job.checks import OBSERVING, masking
from compressor.job.folder import Metrics, checkpoint
from compressor.job.settings import Settings
from compressor.pruning import Pruner, prune
from compressor.sparse import SparseTraining
from compressor.training import Data, HookFactory, PlainStep, TrainingConfig, recalibrate, require_scores, train

Progress = Callable[[str, int, int], None]  # what, done, total

VERIFIED_IMAGES = 8  # on which a cut is compared with the silenced model
CALIBRATION_IMAGES = 512  # over which the means of removed channels are taken


@dataclass(frozen=True)
class Trained:
    """What comes out of the stages: two models trained equally long, and what was cut from the second."""

    dense: nn.Module
    pruned: nn.Module
    result: PruneResult


@dataclass
class Stages:
    """The stages of one run, each with a checkpoint of its own."""

    settings: Settings
    data: Data
    folder: Path
    resume: bool
    on_progress: Progress

    def __post_init__(self) -> None:
        """Open the records."""
        self.metrics = Metrics(self.folder / "metrics.jsonl")

    def rehearse(self, model: nn.Module) -> None:
        """Find out on copies whether the pruning can work, before the training whose end would tell.

        Raises:
            InputError: the model does not fit the data, or the criterion cannot judge it.
            BudgetError: the sparsity cannot be reached, whatever the scores are.
        """
        settings, double = self.settings, copy.deepcopy(model).to(self.settings.device)
        require_scores(double, self.data, settings.device)
        if settings.criterion == OBSERVING or masking(settings.criterion):
            trained = copy.deepcopy(double)
            pruner = self._pruner(trained, SGD(trained.parameters()), settings.epochs * self._epoch_steps())
            inputs, targets = next(iter(self.data.validation.batches(2, device=settings.device)))
            pruner.loss(inputs, targets, F.cross_entropy)
            if isinstance(pruner, Pruner):
                pruner.require_time(settings.batch_size)
        if masking(settings.criterion):
            return
        for parameter in double.parameters():
            parameter.grad = torch.ones_like(parameter)  # some gradient, so that a criterion that wants one can judge
        result = self._cut(double, "random" if settings.criterion == OBSERVING else settings.criterion)
        if not result.reached:
            raise BudgetError(result.measure, result.asked, result.removed, result.blocked)

    def during(self, model: nn.Module) -> Trained:
        """Train the dense model, and another from the same weights that gets smaller on its way."""
        dense, pruned, pruners = copy.deepcopy(model), model, list[Pruner | SparseTraining]()

        def make_pruner(model: nn.Module, optimizer: Optimizer, total_steps: int) -> Pruner | SparseTraining:
            pruners.append(self._pruner(model, optimizer, total_steps))
            return pruners[-1]

        self._train(dense, "dense", self.settings.epochs)
        self._train(pruned, "pruned", self.settings.epochs, make_pruner)
        return Trained(dense, pruned, pruners[-1].result())

    def after(self, model: nn.Module) -> Trained:
        """Train, then go two ways for equally long: with a pruned copy, and with the dense model."""
        settings = self.settings
        self._train(model, "train", settings.epochs)
        dense, pruned = model, copy.deepcopy(model)
        result = self._prune(pruned)
        self._train(dense, "dense", settings.finetune_epochs or 0)
        self._train(pruned, "pruned", settings.finetune_epochs or 0, events=[_cut_event(result)])
        return Trained(dense, pruned, result)

    def _train(
        self,
        model: nn.Module,
        stage: str,
        epochs: int,
        hook: HookFactory = PlainStep,
        events: list[dict[str, Any]] | None = None,
    ) -> None:
        """Train for one stage; `events` came before its first epoch. Writes the model."""
        settings = self.settings
        config = TrainingConfig(epochs, settings.batch_size, settings.lr, seed=settings.seed, device=settings.device)
        history = train(
            model,
            self.data,
            config,
            hook,
            checkpoint=checkpoint(self.folder, stage),
            resume=self.resume,
            on_progress=partial(self.on_progress, f"training: {stage}"),
            log=lambda record: self.metrics.append({"stage": stage, **record}),
        )
        self.metrics.settle({"stage": stage, **record} for record in (*(events or ()), *history.records))

    def _epoch_steps(self) -> int:
        return max(1, len(self.data.train) // self.settings.batch_size)

    def _masked(self, model: nn.Module, optimizer: Optimizer, total_steps: int) -> SparseTraining:
        settings = self.settings
        return SparseTraining(
            model,
            self._example(),
            settings.criterion,
            Budget(settings.sparsity, settings.measure),
            optimizer=optimizer,
            total_steps=total_steps,
            granularity=settings.granularity or "",
            allocation=settings.allocation,
            collect=settings.collect or (self._epoch_steps() if settings.criterion == "set" else None),
            round_to=settings.round_to if settings.granularity == "channel" else None,
            limits=settings.limits() if settings.granularity == "channel" else None,
            seed=settings.seed,
        )

    def _pruner(self, model: nn.Module, optimizer: Optimizer, total_steps: int) -> Pruner | SparseTraining:
        settings = self.settings
        if masking(settings.criterion):
            return self._masked(model, optimizer, total_steps)
        how: dict[str, Any] = {}
        if settings.criterion == OBSERVING:
            how = {"estimator": settings.relevance_estimator, "drop": settings.drop, "delta": settings.delta}
            how |= {"dummies": settings.dummies, "observe_every": settings.observe_every}
            how |= {} if settings.warmup is None else {"warmup": settings.warmup}
        made = _RecalibratingPruner if settings.recalibrate else Pruner
        pruner = made(
            model,
            self._example(),
            settings.criterion,
            Budget(settings.sparsity, settings.measure),
            optimizer=optimizer,
            total_steps=total_steps,
            collect=settings.collect,
            scope=settings.scope,
            round_to=settings.round_to,
            limits=settings.limits(),
            compensate=settings.compensate or "none",
            verify=settings.verify,
            seed=settings.seed,
            **how,
        )
        if isinstance(pruner, _RecalibratingPruner):
            pruner.recalibrate = self._recalibrate
        return pruner

    def _prune(self, model: nn.Module) -> PruneResult:
        """Cut a trained model, and take its BatchNorm statistics anew; writes the model."""
        settings = self.settings
        if needs_gradients(settings.criterion):
            self._sum_gradients(model)
        result = self._cut(model, settings.criterion, CALIBRATION_IMAGES)
        model.zero_grad(set_to_none=True)
        if settings.recalibrate:
            self._recalibrate(model)
        return result

    def _recalibrate(self, model: nn.Module) -> None:
        recalibrate(model, self.data.train, images=self.settings.recalibrate or 0, device=self.settings.device)

    def _cut(self, model: nn.Module, criterion: str, images: int = 0) -> PruneResult:
        """Cut a model on so many calibration images, at least those that the cut is verified on."""
        settings = self.settings
        compensate = settings.compensate or "none"
        return prune(
            model,
            self._example(),
            criterion,
            settings.sparsity,
            settings.measure,
            scope=settings.scope,
            round_to=settings.round_to,
            seed=settings.seed,
            limits=settings.limits(),
            calibration=self._calibration(images) if settings.verify or compensate == "mean" else None,
            compensate=compensate,
            verify=settings.verify,
        )

    def _calibration(self, images: int) -> list[Tensor]:
        """Give the first images of the training part as batches: a small one to verify on, then the others."""
        few = [next(iter(self.data.train.batches(VERIFIED_IMAGES, device=self.settings.device)))[0]]
        batches = self.data.train.batches(self.settings.batch_size, device=self.settings.device)
        return few + [inputs for inputs, _ in islice(batches, images // self.settings.batch_size)]

    def _sum_gradients(self, model: nn.Module) -> None:
        """Leave the gradient of the loss over the training part on the model's parameters."""
        model.eval()
        for inputs, targets in self.data.train.batches(self.settings.batch_size, device=self.settings.device):
            F.cross_entropy(model(inputs), targets, reduction="sum").backward()  # type: ignore[no-untyped-call]

    def _example(self) -> Tensor:
        return torch.zeros(1, *self.data.image_shape, device=self.settings.device)


class _RecalibratingPruner(Pruner):
    """Takes BatchNorm statistics anew after every cut."""

    recalibrate: Callable[[nn.Module], None]

    def update(self) -> dict[str, Any] | None:
        event = super().update()
        if event:
            self.recalibrate(self.model)
        return event


def _cut_event(result: PruneResult) -> dict[str, Any]:
    """Give the one cut of a trained model as a record like those of a `Pruner`."""
    narrower = {name: list(pair) for name, pair in result.widths.items() if pair[0] != pair[1]}
    counts = {"removed": result.removed, "params": result.params[1], "macs": result.macs[1]}
    return {"event": "cut", "epoch": 0, "step": 0, "target": result.asked, "widths": narrower, **counts}
