"""Prune a YOLO network of Ultralytics while its own trainer trains it (`pip install compressor[ultralytics]`)."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.utils.torch_utils import parse_device

from compressor.budget import Budget, PruneResult, Threshold
from compressor.criteria import Criterion, needs_gradients
from compressor.deploy import ExportReport
from compressor.deploy import export_onnx as write_onnx
from compressor.errors import InputError, TrainingError
from compressor.integrations.observing import ForwardObserver
from compressor.pruning import Pruner

if TYPE_CHECKING:
    from ultralytics.engine.model import Model
    from ultralytics.engine.trainer import BaseTrainer

# Where the state of the Pruner stands in a checkpoint: on the network itself, so that both are written at once.
_STATE = "compressor_state"
_CUTS = "cuts.jsonl"


def prune_while_training(
    yolo: Model,
    criterion: str | Criterion = "relevance",
    budget: Budget | Threshold | float = Budget.sparsity,
    *,
    pruner: Mapping[str, Any] | None = None,
    **train: Any,
) -> PruneResult:
    """Call `yolo.train(**train)`, and prune the network meanwhile, optimizer and EMA included.

        yolo = YOLO("yolo11n.pt")
        result = prune_while_training(yolo, budget=Budget(0.5, "macs"), data="coco8.yaml", epochs=100)
        export_onnx(yolo, "small.onnx")

    `best.pt` and `last.pt` hold the small network; they load, validate, predict and export as any other. `best.pt` is
    the best since the last cut. Every cut is a line of JSON in `cuts.jsonl` beside `results.csv`. An interrupted
    training goes on with `YOLO("last.pt")`, the same arguments, and `resume=True`.

    Args:
        yolo: an `ultralytics.YOLO`, of any task; afterwards it holds the small network.
        criterion, budget: as for `compressor.Pruner`.
        pruner: its other arguments, `{"limits": Limits(keep=["model.0.*"]), "seed": 1}`; steps are batches.
        train: the arguments of `yolo.train`.

    Returns:
        What was removed, in all.

    Raises:
        InputError: several devices, a compiled network, `quantize=8`, a limit of time instead of epochs; a pruned
            network and data with another number of classes; `resume` from a training without pruning.
        TrainingError: the loss is not finite, and `last.pt` is from before a cut, so that the trainer cannot go back.
        BudgetError, PeriodError and others: as for `compressor.Pruner`.
    """
    _require_single_device(train)
    for name, instead in (("compile", "without it"), ("time", "with epochs=")):
        if train.get(name):
            raise InputError(f"{name}={train[name]!r}: the network changes while it trains; train {instead}")
    if str(train.get("quantize")) in ("8", "int8"):
        raise InputError("quantize=8: layers that round are not cut; prune first, then train_pruned(yolo, quantize=8)")
    pruning = _Pruning(criterion, budget, dict(pruner or {}))
    with _callbacks(yolo, pruning.callbacks()):
        yolo.train(**train)
    vars(yolo.model).pop(_STATE, None)
    return pruning.pruner.result()


def train_pruned(yolo: Model, **train: Any) -> Any:
    """Call `yolo.train(**train)` on the very network that `yolo` holds, which the trainer else builds anew from YAML.

    Raises:
        InputError: as for `prune_while_training`.
    """
    _require_single_device(train)
    with _callbacks(yolo, {"on_pretrain_routine_start": _keep_architecture}):
        return yolo.train(**train)


def export_onnx(yolo: Model, path: str | Path, *, imgsz: int | None = None, check_inputs: Any = None) -> ExportReport:
    """Write the network as ONNX, with any batch size, and prove that the file gives what the network does.

    `yolo.export(format="onnx")` writes the same graph and compares nothing.

    Args:
        yolo: an `ultralytics.YOLO`.
        path: where the file goes.
        imgsz: pixels of a side of the image; by default that of the training.
        check_inputs: `(N, C, imgsz, imgsz)` real images in `[0, 1]` to compare on, besides random ones.

    Raises:
        ExportError, ParityError and others: as for `compressor.export_onnx`.
    """
    model = yolo.model.eval()
    head = model.model[-1]
    wanted = {"dynamic": True, "export": True, "format": "onnx"}  # else it returns what it tells the loss as well
    before = {name: vars(head)[name] for name in wanted if name in vars(head)}
    vars(head).update(wanted)
    size = imgsz or model.args["imgsz"]
    images = torch.zeros(1, model.yaml.get("channels", 3), size, size, device=next(model.parameters()).device)
    try:
        return write_onnx(model, path, images, check_inputs=check_inputs, input_names=["images"])
    finally:
        for name in wanted:
            vars(head).pop(name)
        vars(head).update(before)


def _require_single_device(train: Mapping[str, Any]) -> None:
    """Refuse what makes Ultralytics train in other processes, where no callback of this one is called."""
    device = parse_device(train.get("device"))
    if "," in device:
        raise InputError(f"device={device!r}: Ultralytics takes no callbacks to several devices; train on one")


@contextmanager
def _callbacks(yolo: Model, callbacks: Mapping[str, Callable[[BaseTrainer], None]]) -> Iterator[None]:
    """Attach the callbacks for one training."""
    for event, callback in callbacks.items():
        yolo.callbacks[event].append(callback)
    try:
        yield
    finally:
        for event, callback in callbacks.items():
            yolo.callbacks[event].remove(callback)


def _keep_architecture(trainer: BaseTrainer) -> None:
    """Make the trainer take a pruned network as it is: it builds one from YAML and would load what fits of another."""
    build = trainer.get_model

    def get_model(cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        if weights is None or not _is_pruned(weights):
            return build(cfg=cfg, weights=weights, verbose=verbose)
        classes = trainer.data["nc"]
        if weights.yaml["nc"] != classes:
            raise InputError(
                f"the pruned network tells {weights.yaml['nc']} classes, and the data have {classes}: prune one that "
                "was trained on these data, or prune while you train on them"
            )
        weights.train()
        return weights

    trainer.get_model = get_model


def _is_pruned(model: Any) -> bool:
    """Whether a network has other shapes than its YAML says."""
    as_built = type(model)(model.yaml, ch=model.yaml.get("channels", 3), nc=model.yaml["nc"], verbose=False)
    return _shapes(model) != _shapes(as_built)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


class _Pruning:
    """The callbacks of one training, from the events of the trainer to calls of a Pruner."""

    def __init__(self, criterion: str | Criterion, budget: Budget | Threshold | float, options: dict[str, Any]) -> None:
        self._criterion = criterion
        self._budget = budget
        self._options = options
        self._pruner: Pruner | None = None
        self._observer: ForwardObserver | None = None
        self._batches = 0  # an epoch
        self._is_cut = False  # since the trainer wrote last.pt
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = []  # of the last optimizer step

    def callbacks(self) -> dict[str, Callable[[BaseTrainer], None]]:
        return {
            "on_pretrain_routine_start": _keep_architecture,
            "on_train_start": self._begin,
            "on_train_epoch_start": self._begin_anew,
            "on_train_batch_end": self._step,
            "on_train_epoch_end": self._put_state,
            "on_model_save": self._saved,
            "teardown": self._end,
        }

    @property
    def pruner(self) -> Pruner:
        assert self._pruner, "the trainer called no callback"
        return self._pruner

    def _begin(self, trainer: BaseTrainer) -> None:
        states = [vars(model).pop(_STATE, None) for model in (trainer.model, trainer.ema.ema)]
        if trainer.start_epoch and not states[0]:
            raise InputError(
                f"{trainer.args.resume}: nothing was pruned in that training; go on with yolo.train(resume=True), and "
                "prune in a new one"
            )
        self._make_pruner(trainer)
        if needs_gradients(self._criterion):
            trainer.optimizer.register_step_post_hook(self._hold_gradients)
        if not trainer.start_epoch:
            (trainer.save_dir / _CUTS).unlink(missing_ok=True)  # of another training in the same folder
        else:
            self.pruner.load_state_dict(torch.load(io.BytesIO(states[0]), weights_only=True))

    def _make_pruner(self, trainer: BaseTrainer) -> None:
        if self._observer:
            self._observer.close()
        self._batches = len(trainer.train_loader)
        size = trainer.args.imgsz
        images = torch.zeros(1, trainer.data["channels"], size, size, device=trainer.device)
        self._pruner = Pruner(
            _traceable(trainer.model),
            images,
            self._criterion,
            self._budget,
            optimizer=trainer.optimizer,
            total_steps=trainer.epochs * self._batches,
            copies=[trainer.ema.ema],
            **self._options,
        )
        self._pruner.require_time(trainer.batch_size)
        self._observer = ForwardObserver(self._pruner, trainer.model, lambda batch: batch["img"])

    def _begin_anew(self, trainer: BaseTrainer) -> None:
        """Count steps anew where the trainer does: out of memory in its first epoch, it halves the batches.

        Once channels are gone the budget counts from the network before: then the Pruner stays, and is done earlier.
        """
        if len(trainer.train_loader) == self._batches:
            return
        self._batches = len(trainer.train_loader)
        if not trainer.start_epoch and not self._is_cut:
            self._make_pruner(trainer)

    def _hold_gradients(self, optimizer: Optimizer, *_: Any) -> None:
        """Hold what the trainer is about to drop, for a criterion that reads it."""
        self._gradients = [
            (parameter, parameter.grad) for group in optimizer.param_groups for parameter in group["params"]
        ]

    def _step(self, trainer: BaseTrainer) -> None:
        dropped = [(parameter, gradient) for parameter, gradient in self._gradients if parameter.grad is None]
        for parameter, gradient in dropped:
            parameter.grad = gradient
        event = self.pruner.step()
        for parameter, _ in dropped:
            parameter.grad = None
        self._gradients = []
        if not event:
            return
        self._is_cut = True
        trainer.ema._pairs = None  # the tensors that it holds are those from before the cut
        # The best so far was a larger network: what is kept as the best is to be of the last size.
        trainer.best_fitness = None
        trainer.stopper.best_fitness = 0.0
        with (trainer.save_dir / _CUTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": trainer.epoch + 1, **event}) + "\n")

    def _put_state(self, trainer: BaseTrainer) -> None:
        """Lay the Pruner's state on the network that the trainer is about to write."""
        if self._is_cut and not trainer.loss.isfinite():
            rates = [group["lr"] for group in trainer.optimizer.param_groups]
            raise TrainingError(trainer.loss.item(), trainer.epoch + 1, max(rates))
        state = io.BytesIO()  # as bytes, in which nobody looks for sizes of channels
        torch.save(self.pruner.state_dict(), state)
        setattr(trainer.ema.ema, _STATE, state.getvalue())

    def _saved(self, trainer: BaseTrainer) -> None:
        vars(trainer.ema.ema).pop(_STATE, None)
        self._is_cut = False

    def _end(self, trainer: BaseTrainer) -> None:
        if self._observer:
            self._observer.close()


def _traceable(model: nn.Module) -> nn.Module:
    return _WithProjector(model) if isinstance(model, DistillationModel) else model


class _WithProjector(nn.Module):
    """A student as its trainer runs it: the projectors of distillation read features that it does not return.

    Its parameters have the names that they have in the `DistillationModel`.
    """

    def __init__(self, distillation: DistillationModel) -> None:
        super().__init__()
        self.student_model = distillation.student_model
        self.projector = distillation.projector
        self._whole: Callable[[], Any] = lambda: distillation  # not as a submodule: its teacher is not to be traced

    def forward(self, images: Tensor) -> Any:
        outputs = self.student_model(images)
        whole = self._whole()
        features = whole._student_feats
        projected = [project(whole.decouple_outputs(features[level])) for level, project in enumerate(self.projector)]
        features.clear()
        return outputs, projected
