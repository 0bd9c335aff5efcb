"""Prune a network while Hugging Face's `Trainer` trains it (`pip install compressor[transformers]`)."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from compressor._utils import atomic_write
from compressor.budget import Budget, PruneResult, Threshold
from compressor.criteria import Criterion
from compressor.deploy import save
from compressor.errors import InputError
from compressor.integrations.observing import ForwardObserver
from compressor.integrations.wrapping import all_ranks, when_wrapped, wrap_anew
from compressor.pruning import Pruner

logger = logging.getLogger(__name__)

MODEL_FILE = "pruned.safetensors"
_STATE_FILE = "pruner.pt"


class PruningCallback(TrainerCallback):
    """A callback for `Trainer(callbacks=[...])`: prunes the network while it trains, optimizer included.

        callback = PruningCallback({"pixel_values": torch.zeros(1, 3, 224, 224)}, budget=Budget(0.5, "macs"))
        Trainer(model, args, train_dataset=images, callbacks=[callback]).train()
        compressor.save(model, "small.safetensors")

    Beside the files of every checkpoint stands `pruned.safetensors`, since `from_pretrained` would build the network as
    wide as its configuration says. An interrupted training goes on from it:

        model = compressor.load("out/checkpoint-500/pruned.safetensors", factory=build)
        Trainer(model, args, ..., callbacks=[callback]).train(resume_from_checkpoint="out/checkpoint-500")

    The best checkpoint, `load_best_model_at_end`, is the best since the last cut. Several devices train together, one
    process each: `torchrun --nproc-per-node 2 train.py`.

    Args:
        example_inputs: a dict of tensors by the names of the model's arguments, without labels.
        criterion, budget: as for `compressor.Pruner`.
        pruner: its other arguments, `outputs=lambda result: result.logits` among them; steps are optimizer steps.

    Raises:
        InputError: when training begins, with several devices in one process, sharded weights or a compiled model, or
            from a checkpoint without a pruner's state.
        BudgetError, PeriodError and others: as for `compressor.Pruner`.
    """

    def __init__(
        self,
        example_inputs: dict[str, Any],
        criterion: str | Criterion = "relevance",
        budget: Budget | Threshold | float = Budget.sparsity,
        **pruner: Any,
    ) -> None:
        self._example_inputs = example_inputs
        self._criterion = criterion
        self._budget = budget
        self._options = pruner
        self._pruner: Pruner | None = None
        self._observer: ForwardObserver | None = None
        self._wrapper: DistributedDataParallel | None = None
        self._hooks = ExitStack()

    @property
    def pruner(self) -> Pruner:
        """What prunes; there once training has begun."""
        if self._pruner is None:
            raise InputError("nothing was pruned yet: pass this callback to Trainer(callbacks=[...]), and train")
        return self._pruner

    def result(self) -> PruneResult:
        """Return what has been removed so far, against the whole budget."""
        return self.pruner.result()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trace the model, and go on where a checkpoint stands."""
        self._close()  # of a training that ended in an error, which no callback is told
        model: nn.Module = kwargs["model"]
        if args.n_gpu > 1:
            raise InputError(
                f"one process trains on {args.n_gpu} devices: start one for each (torchrun --nproc-per-node "
                f"{args.n_gpu} train.py), or set CUDA_VISIBLE_DEVICES=0"
            )
        if args.fsdp or args.deepspeed:
            raise InputError("fsdp and deepspeed keep parts of the weights on every device: train without them")
        if args.torch_compile:
            raise InputError("torch_compile=True: the network changes while it trains; train without it")
        self._pruner = Pruner(
            model,
            {name: tensor.to(args.device) for name, tensor in self._example_inputs.items()},
            self._criterion,
            self._budget,
            optimizer=getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"]),  # accelerate wraps it
            total_steps=state.max_steps,
            process_group=all_ranks(),
            **self._options,
        )
        if state.global_step:
            self._pruner.load_state_dict(_read_state(args, state))
        names = self._example_inputs.keys()
        self._observer = ForwardObserver(
            self._pruner, model, lambda batch: {name: batch[name] for name in names if name in batch}
        )
        if all_ranks():
            self._hooks.callback(when_wrapped(model, self._take_wrapper))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step, and cut if it is time: the gradients are still there."""
        event = self.pruner.step()
        if event:
            if self._wrapper:
                wrap_anew(self._wrapper)
            logger.info("step %d: %d parameters are left", state.global_step + 1, self.result().params[1])
            # The best so far was a larger network, which could not be loaded into this one.
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the small network, and where pruning stands, beside the files of the checkpoint."""
        if not state.is_world_process_zero:
            return
        folder = _checkpoint(args, state)
        save(kwargs["model"], folder / MODEL_FILE)
        with atomic_write(folder / _STATE_FILE) as unfinished:
            torch.save(self.pruner.state_dict(), unfinished)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model without hooks."""
        self._close()

    def _take_wrapper(self, wrapper: DistributedDataParallel) -> None:
        self._wrapper = wrapper
        wrap_anew(wrapper)  # it was made before the pruner, which tried cuts

    def _close(self) -> None:
        self._hooks.close()
        self._wrapper = None
        if self._observer:
            self._observer.close()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _read_state(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """Return where pruning stood; the Trainer does not say which folder it resumes from, but how far that was."""
    file = _checkpoint(args, state) / _STATE_FILE
    if not file.exists():
        raise InputError(f"{file} is not there: resume a training that was pruned, with its output_dir")
    state_dict: dict[str, Any] = torch.load(file, weights_only=True)
    return state_dict
