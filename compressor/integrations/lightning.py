"""Prune a network while Lightning's `Trainer` trains it (`pip install compressor[lightning]`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compressor._utils import device_of, to_device
from compressor.budget import Budget, PruneResult, Threshold
from compressor.criteria import Criterion
from compressor.errors import InputError
from compressor.graph import all_numeric_attributes, restore_shapes, set_numeric_attributes
from compressor.integrations.wrapping import all_ranks, wrap_anew
from compressor.pruning import Pruner

logger = logging.getLogger(__name__)


class PruningCallback(Callback):
    """A callback for `Trainer(callbacks=[...])`: prunes the network while it trains, optimizers included.

        callback = PruningCallback(torch.zeros(1, 3, 32, 32), budget=Budget(0.5, "macs"), network=lambda m: m.net)
        Trainer(max_epochs=30, callbacks=[callback]).fit(module, loader)
        compressor.save(module.net, "small.safetensors")

    A checkpoint holds the small network and where pruning stands; `fit(Module(), loader, ckpt_path="last.ckpt")` makes
    the module as narrow and goes on. What `ModelCheckpoint` and `EarlyStopping` call the best is the best since the
    last cut. Several devices train together with the strategy "ddp".

    Args:
        example_inputs: as for `compressor.trace`; by default the module's `example_input_array`.
        criterion, budget: as for `compressor.Pruner`.
        network: returns the part of the module that is traced and pruned; by default the module itself.
        inputs: takes a batch, and returns the inputs of what is pruned; by default the first of a tuple or list.
        pruner: other arguments of `compressor.Pruner`; steps are optimizer steps.

    Raises:
        InputError: when training begins, on several devices but by "ddp", without an end or example inputs.
        BudgetError, PeriodError and others: as for `compressor.Pruner`.
    """

    def __init__(
        self,
        example_inputs: Any = None,
        criterion: str | Criterion = "relevance",
        budget: Budget | Threshold | float = Budget.sparsity,
        *,
        network: Callable[[Any], nn.Module] | None = None,
        inputs: Callable[[Any], Any] | None = None,
        **pruner: Any,
    ) -> None:
        self._example_inputs = example_inputs
        self._criterion = criterion
        self._budget = budget
        self._network = network or _itself
        self._inputs = inputs or _first
        self._options = pruner
        self._pruner: Pruner | None = None
        self._stored: dict[str, Any] = {}
        self._open = ExitStack()
        self._hooks = ExitStack()
        self._steps = 0  # that the trainer counts

    @property
    def pruner(self) -> Pruner:
        """What prunes; there once training has begun."""
        if self._pruner is None:
            raise InputError("nothing was pruned yet: pass this callback to Trainer(callbacks=[...]), and call fit")
        return self._pruner

    def result(self) -> PruneResult:
        """Return what has been removed so far, against the whole budget."""
        return self.pruner.result()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module become as narrow as a checkpoint that is loaded into it."""
        hook = pl_module.register_load_state_dict_pre_hook(_narrow)
        self._hooks.callback(hook.remove)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Trace the network, and go on where a checkpoint stands."""
        self._hooks.close()
        if trainer.world_size > 1 and not _wrapper(trainer):
            raise InputError(
                f'{trainer.world_size} devices train one model: say Trainer(strategy="ddp"), or Trainer(devices=1)'
            )
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise InputError("the training has no end: say Trainer(max_epochs=...) or Trainer(max_steps=...)")
        example = pl_module.example_input_array if self._example_inputs is None else self._example_inputs
        if example is None:
            raise InputError(
                "no example inputs: say PruningCallback(torch.zeros(1, 3, 32, 32)), or set self.example_input_array"
            )
        network = self._network(pl_module)
        modules = dict(network.named_modules())
        for name, values in self._stored.get("numbers", {}).items():
            set_numeric_attributes(modules[name], values)
        self._pruner = Pruner(
            network,
            to_device(example, device_of(network)),
            self._criterion,
            self._budget,
            optimizer=trainer.optimizers,
            total_steps=int(steps),
            process_group=all_ranks(),
            **self._options,
        )
        self._wrap_anew(trainer)  # the pruner tried cuts
        if self._stored:
            self._pruner.load_state_dict(self._stored["pruner"])
        self._steps = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Observe the batch."""
        self._open.enter_context(self.pruner.observe(self._inputs(batch)))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward pass is over."""
        self._open.close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step if the optimizer made one, and cut if it is time."""
        self._open.close()  # a training step may skip its batch
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        if self.pruner.step():
            self._wrap_anew(trainer)
            logger.info("step %d: %d parameters are left", self._steps, self.result().params[1])
            _forget_best(trainer)

    def _wrap_anew(self, trainer: Trainer) -> None:
        if wrapper := _wrapper(trainer):
            wrap_anew(wrapper)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module without hooks."""
        self._open.close()
        self._hooks.close()

    def state_dict(self) -> dict[str, Any]:
        """Return where pruning stands, for the trainer's checkpoint."""
        if self._pruner is None:
            return self._stored
        return {"pruner": self._pruner.state_dict(), "numbers": all_numeric_attributes(self._pruner.graph.model)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what stands in a checkpoint."""
        self._stored = state_dict


def _wrapper(trainer: Trainer) -> DistributedDataParallel | None:
    """Return what averages gradients over devices, if there are several."""
    model = trainer.strategy.model
    return model if isinstance(model, DistributedDataParallel) else None


def _itself(module: nn.Module) -> nn.Module:
    return module


def _first(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple | list) else batch


def _narrow(module: nn.Module, state_dict: Mapping[str, Tensor], *_: Any) -> None:
    """Give the module the shapes of what is about to be loaded."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    loaded = {name: tensor for name, tensor in state_dict.items() if name in tensors}
    restore_shapes(module, {name: tuple(tensor.shape) for name, tensor in (tensors | loaded).items()})


def _forget_best(trainer: Trainer) -> None:
    """Begin anew to look for the best model: the best so far was a larger one."""
    for callback in trainer.callbacks:
        if isinstance(callback, ModelCheckpoint):
            for path in callback.best_k_models:
                trainer.strategy.remove_checkpoint(path)
            callback.best_k_models = {}
            callback.best_model_path = callback.kth_best_model_path = ""
            callback.best_model_score = None
        elif isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(math.inf if callback.monitor_op == torch.lt else -math.inf)
