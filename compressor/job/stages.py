"""The stages of a run: what is trained and cut, in which order, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from compressor._utils import Ranks, StopRequest
from compressor.budget import Allocation, Budget, PruneResult, Threshold, cut_event
from compressor.criteria import needs_gradients
from compressor.deploy import LatencyCost, require_exportable, weight_bits
from compressor.errors import BudgetError, InputError
from compressor.graph import copied
from compressor.job.board import BOARD, Board
from compressor.job.checks import OBSERVING, is_sparse, observes
from compressor.job.folder import Metrics, checkpoint
from compressor.job.settings import Settings
from compressor.pruning import Pruner, prune
from compressor.sparse import SparseTraining
from compressor.training import (
    TRAINED_LR,
    Data,
    HookFactory,
    LossFunction,
    PlainStep,
    QuantizationAware,
    StepHook,
    TrainingConfig,
    read_model,
    recalibrate,
    require_scores,
    take_over,
    train,
    write_model,
)

Progress = Callable[[str, int, int], None]  # what, done, total

DENSE_STAGES = ("train", "dense")  # whose model no criterion has touched
CUT_STAGE = "cut"  # between two trainings
VERIFIED_IMAGES = 8  # on which a cut is compared with the masked model
# Over which means and covariances are taken: 4 for each channel of a ResNet's widest group, as its last layer sees it.
CALIBRATION_IMAGES = 2048


def training_of(stage: str) -> str:
    """Return by which name the training of a stage shows its progress."""
    return f"training: {stage}"


@dataclass(frozen=True)
class Trained:
    """What comes out of the stages: two models trained equally long, and what was cut from the second."""

    dense: nn.Module
    pruned: nn.Module
    result: PruneResult


@dataclass
class Stages:
    """The stages of one run, each with a checkpoint of its own.

    Attributes:
        teacher: whom the pruned model learns from besides the classes; by default the dense model.
        network: what tells the code of the dense model from another's; a resumed run must have the same.
        ranks: the processes that train together, each in stages of its own; the first one alone writes, and prunes
            between stages.
        on_record: called with every record of `metrics.jsonl` when it arises.
    """

    settings: Settings
    data: Data
    folder: Path
    resume: bool
    on_progress: Progress
    stop: StopRequest | None = None
    network: str = ""
    teacher: nn.Module | None = None
    ranks: Ranks = field(default_factory=Ranks)
    on_record: Callable[[Mapping[str, Any]], None] = lambda record: None

    def __post_init__(self) -> None:
        """Open the records, and time what is to be measured before anything else runs."""
        board = Board(self.folder / BOARD) if self.settings.tensorboard and self.ranks.is_first else None
        self.metrics = Metrics(self.folder / "metrics.jsonl" if self.ranks.is_first else None, board)
        self._round_to = self.settings.selection().round_to
        if self.settings.round_to == "auto":  # here, where every rank comes by: the others wait for the first one's
            step = self.settings.latency().table.step if self.ranks.is_first else None
            self._round_to = self.ranks.object_of_the_first(step)

    def preflight(self, model: nn.Module) -> None:
        """Find out on copies whether the pruning can work, before the training whose end would tell; on one rank.

        Raises:
            InputError: the model does not fit the data, or the criterion cannot judge it.
            BudgetError: the sparsity cannot be reached, whatever the scores are.
            ExportError: the model cannot be exported to ONNX.
        """
        settings = self.settings
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InputError(f"no parameter of {settings.model} trains: let its factory set requires_grad = True")
        double = copied(model).to(settings.device)
        require_scores(double, self.data, settings.device)
        self._try_pruning(copied(double))
        require_exportable(double, self._example())

    def _try_pruning(self, double: nn.Module) -> None:
        """Make the pruner, and cut; writes the model, which is of no use afterwards."""
        settings = self.settings
        if observes(vars(settings)) or is_sparse(settings.criterion):
            trained = copied(double)
            steps = (settings.epochs or 0) * self._epoch_steps()
            pruner = self._pruner(trained, SGD(trained.parameters()), steps, Ranks())
            inputs, targets = next(iter(self.data.validation.batches(2, device=settings.device)))
            pruner.loss(inputs, targets, F.cross_entropy)
            if isinstance(pruner, Pruner):
                pruner.require_time(settings.batch_size)
        if is_sparse(settings.criterion):
            return
        for parameter in double.parameters():
            parameter.grad = torch.ones_like(parameter)  # some gradient, so that a criterion that wants one can judge
        # With few images it is also tried whether they are enough; more always are.
        images = CALIBRATION_IMAGES if len(self.data.train) < CALIBRATION_IMAGES else 0
        blind = settings.criterion == OBSERVING or settings.allocate == "relevance"  # without training there is none
        goal = settings.budget() if blind else settings.goal()
        if isinstance(goal, Budget) and isinstance(goal.measure, LatencyCost):
            goal = replace(goal, measure=LatencyCost(goal.measure.place, self._timing_layers, is_measured=False))
        result = self._cut(
            double, "random" if blind else settings.criterion, goal, images, allocate="uniform" if blind else None
        )
        if not result.reached:
            raise BudgetError(result.measure, result.asked, result.removed, result.blocked)

    def during(self, model: nn.Module) -> Trained:
        """Train the dense model, and another from the same weights that gets smaller on its way."""
        pruned = model.to(self.settings.device)
        dense = copied(model)
        pruners: list[Pruner | SparseTraining] = []

        def make_pruner(model: nn.Module, optimizer: Optimizer, total_steps: int) -> StepHook:
            pruners.append(self._pruner(model, optimizer, total_steps, self.ranks))
            return _Recalibrating(pruners[-1], self._recalibrate) if self.settings.recalibrate else pruners[-1]

        config = self._training(self.settings.epochs)
        self._train(dense, "dense", config)
        self._train(pruned, "pruned", config, make_pruner, teacher=self._teacher(dense))
        return Trained(dense, pruned, pruners[-1].result())

    def after(self, model: nn.Module) -> Trained:
        """Train, then go two ways for equally long: with a pruned copy, and with the dense model."""
        settings = self.settings
        dense = model.to(settings.device)  # also where nothing is trained, which would bring it there
        self._train(dense, "train", self._training(settings.epochs))
        # NOTE: The dense model gets the same treatment, or the pruned one would be ahead by BatchNorm statistics alone;
        # and before the cut, because its layers are what those of the pruned one are fitted to.
        if settings.recalibrate:
            self._recalibrate(dense)
        pruned = copied(model)
        # One rank prunes and the others take over what it made: no two of them could come to different channels.
        made = self._cut_once(pruned) if self.ranks.is_first else None
        result = cast(PruneResult, self.ranks.object_of_the_first(made))
        take_over(pruned, self.ranks)
        config = self._training(settings.finetune_epochs)
        self._train(dense, "dense", config)
        self._train(pruned, "pruned", config, events=_cut_records(result), teacher=self._teacher(dense))
        return Trained(dense, pruned, result)

    def for_int8(self, model: nn.Module, name: str) -> nn.Module:
        """Return a copy of a finished model that was trained on with weights and inputs rounded as int8 has them."""
        settings = self.settings
        double = copied(model)
        hook = partial(QuantizationAware, weight_bits=weight_bits())
        usual = settings.training(settings.qat_epochs)
        config = replace(usual, lr=TRAINED_LR * usual.lr, compile=False, ema=0.0)
        self._train(double, f"int8-{name}", config, hook, teacher=self._teacher(model), ranks=Ranks())
        return double.eval()

    def _train(
        self,
        model: nn.Module,
        stage: str,
        config: TrainingConfig | None,
        hook: HookFactory = PlainStep,
        events: list[dict[str, Any]] | None = None,
        teacher: nn.Module | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Train for one stage, if there is one; `events` came before its first epoch. Writes the model."""
        if config is None:  # --finetune-epochs 0: what was cut is recorded all the same
            self.metrics.replace_stage({"stage": stage, **event} for event in events or ())
            return
        history = train(
            model,
            self.data,
            config if teacher else replace(config, distill=0.0),  # the dense model learns from the classes alone
            hook,
            checkpoint=checkpoint(self.folder, stage),
            resume=self.resume,
            on_progress=partial(self.on_progress, training_of(stage)),
            log=partial(self._record, stage),
            stop=self.stop,
            about={"network": self.network},
            teacher=teacher,
            checkpoint_every=self.settings.checkpoint_every,
            ranks=ranks or self.ranks,
        )
        self.metrics.replace_stage({"stage": stage, **record} for record in (*(events or ()), *history.records))

    def _training(self, epochs: int | None) -> TrainingConfig | None:
        """Return how a stage of so many epochs trains; None for one without any."""
        return self.settings.training(epochs) if epochs else None

    def _record(self, stage: str, record: Mapping[str, Any]) -> None:
        self.metrics.append({"stage": stage, **record})
        self.on_record({"stage": stage, **record})

    def _teacher(self, dense: nn.Module) -> nn.Module | None:
        """Return whom the pruned model learns from besides the classes, if from anybody."""
        settings = self.settings
        if not settings.distill:
            return None
        return self.teacher or dense

    def _epoch_steps(self) -> int:
        return max(1, len(self.data.train) // self.settings.batch_size)

    def _masked(self, model: nn.Module, optimizer: Optimizer, total_steps: int) -> SparseTraining:
        settings = self.settings
        return SparseTraining(
            model,
            self._example(),
            settings.criterion,
            settings.budget(),
            optimizer=optimizer,
            total_steps=total_steps,
            config=settings.sparse(),
            schedule=settings.schedule() if settings.criterion == "magnitude" else None,
            prune_every=settings.prune_every or (self._epoch_steps() if settings.criterion == "set" else None),
            round_to=self._round_to if settings.granularity == "channel" else None,
            limits=settings.limits() if settings.granularity == "channel" else None,
            seed=settings.seed,
        )

    def _pruner(
        self, model: nn.Module, optimizer: Optimizer, total_steps: int, ranks: Ranks
    ) -> Pruner | SparseTraining:
        settings = self.settings
        if is_sparse(settings.criterion):
            return self._masked(model, optimizer, total_steps)
        return Pruner(
            model,
            self._example(),
            settings.criterion,
            settings.goal(),
            settings.schedule(),
            optimizer=optimizer,
            total_steps=total_steps,
            prune_every=settings.prune_every,
            allocate=None if settings.threshold is not None else settings.selection().allocate,
            round_to=self._round_to,
            limits=settings.limits(),
            compensate=settings.compensate,
            calibration=self._inputs(CALIBRATION_IMAGES) if settings.compensate == "linear" else None,
            verify=settings.verify,
            seed=settings.seed,
            relevance=settings.relevance() if observes(vars(settings)) else None,
            process_group=ranks.group,
        )

    def _cut_once(self, model: nn.Module) -> PruneResult:
        """Prune, or take over what an interrupted call made of the same model; writes the model and a checkpoint.

        Measured again, a latency would be another, and with it what goes.
        """
        folder = checkpoint(self.folder, CUT_STAGE)
        kept = read_model(folder, model) if self.resume else None
        if kept is not None:
            return PruneResult(**kept)
        result = self._prune(model)
        write_model(folder, model, vars(result))
        return result

    def _prune(self, model: nn.Module) -> PruneResult:
        """Cut a trained model, and take its BatchNorm statistics anew; writes the model."""
        settings = self.settings
        result = self._cut(model, settings.criterion, settings.goal(), CALIBRATION_IMAGES, rounds=settings.rounds)
        if settings.recalibrate:
            self._recalibrate(model)
        return result

    def _recalibrate(self, model: nn.Module) -> None:
        recalibrate(model, self.data.train, images=self.settings.recalibrate or 0, device=self.settings.device)

    def _timing_layers(self, done: int, total: int) -> None:
        self.on_progress("timing layers", done, total)

    def _cut(
        self,
        model: nn.Module,
        criterion: str,
        goal: Budget | Threshold,
        images: int = 0,
        *,
        allocate: Allocation | None = None,
        rounds: int = 1,
    ) -> PruneResult:
        """Cut a model, compensated over so many calibration images; verified on a few in any case."""
        settings = self.settings
        compensate = settings.compensate if images else "none"
        allocate = allocate or settings.selection().allocate
        reads_losses = bool(images) and ("relevance" in (criterion, allocate) or needs_gradients(criterion))
        reads = settings.verify or settings.reconstruct or compensate != "none" or reads_losses
        pairs = self._calibration(images) if reads else []
        return prune(
            model,
            self._example(),
            criterion,
            goal,
            rounds=rounds,
            allocate=None if settings.threshold is not None else allocate,
            round_to=self._round_to,
            seed=settings.seed,
            limits=settings.limits(),
            calibration=pairs if reads_losses else [inputs for inputs, _ in pairs],
            loss_fn=F.cross_entropy if reads_losses else None,
            compensate=compensate,
            reconstruct=bool(settings.reconstruct and images),
            verify=settings.verify,
        )

    def _inputs(self, images: int) -> list[Tensor]:
        return [inputs for inputs, _ in self._calibration(images)]

    def _calibration(self, images: int) -> list[tuple[Tensor, Tensor]]:
        """Return images of the training part with their classes: a small batch to verify on, then the others."""
        # In an order of their own: folders list one class behind the other.
        few, others = (
            self.data.train.batches(size, shuffle=torch.Generator().manual_seed(0), device=self.settings.device)
            for size in (VERIFIED_IMAGES, self.settings.batch_size)
        )
        return [next(iter(few)), *islice(others, -(-images // self.settings.batch_size))]

    def _example(self) -> Tensor:
        return torch.zeros(1, *self.data.image_shape, device=self.settings.device)


class _Recalibrating:
    """A step hook around another that takes BatchNorm statistics anew after every change that the other reports."""

    def __init__(self, hook: Pruner | SparseTraining, recalibrate: Callable[[nn.Module], None]) -> None:
        self._hook = hook
        self._recalibrate = recalibrate

    def loss(self, inputs: Tensor, targets: Tensor, loss_fn: LossFunction) -> Tensor:
        """Return the mean loss, as the other hook does."""
        return self._hook.loss(inputs, targets, loss_fn)

    def step(self) -> dict[str, Any] | None:
        """Let the other hook look at the step."""
        event = self._hook.step()
        if event:
            self._recalibrate(self._hook.model)
        return event

    def state_dict(self) -> dict[str, Any]:
        """Return the other hook's state."""
        return self._hook.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hand the state on."""
        self._hook.load_state_dict(state)


def _cut_records(result: PruneResult) -> list[dict[str, Any]]:
    """Return the one cut of a trained model as a record like those of a `Pruner`; none where nothing went."""
    before = {name: pair[0] for name, pair in result.widths.items()}
    event = cut_event(result, before, step=0, target=result.asked)
    return [{"epoch": 0, **event}] if event else []
