"""Sparse training: iterative magnitude pruning, SET and RigL, on single weights or on channels.

    training = SparseTraining(model, x, "rigl", Budget(0.9), optimizer=optimizer, total_steps=len(loader) * epochs)
    for x, y in loader:
        training.loss(x, y, F.cross_entropy).backward()
        optimizer.step()
        training.step()
        optimizer.zero_grad()

Forward passes see masked weights. What is masked is zero after every `step`, and so is what optimizers keep for it.
When the masks are final, channels that they left without a weight are cut for good, and training goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor._utils import run_model, unwrap_compiled
from compressor.budget import Budget, Limits, PruneResult, PruningProgress, Schedule, cut_event
from compressor.errors import IdleArgumentError, InputError
from compressor.graph import trace
from compressor.sparse.channel_masks import ChannelMasks
from compressor.sparse.config import SparseConfig
from compressor.sparse.regrowth import METHODS, Regrowth, drop_and_grow
from compressor.sparse.schedules import mask_schedule
from compressor.sparse.units import MaskedUnits, Masks
from compressor.sparse.weight_masks import WeightMasks
from compressor.surgery import all_optimizers, couple_blocks, require_followed


class SparseTraining:
    """Trains with masks that change on the way. One object in a training loop, and a `StepHook` for `training.train`.

    Args:
        model, example_inputs: as for `compressor.trace`.
        criterion: "magnitude" drops the smallest, more and more, as the schedule says. "set" begins sparse at random;
            every epoch but the last, 0.3 of what is on is dropped, by sign, the nearest to zero, and as much grows at
            random. "rigl" begins so too; every 100 steps until 75 % of the training the smallest are dropped, 0.3 at
            first and less and less along half a cosine, and those with the largest gradients grow.
        budget: what is off at the end; a number is a share of the parameters. On weights, the share of all weights of
            convolutions and Linears; on channels, the share of params, macs or channels that the model loses when those
            that are off are cut.
        schedule: with "magnitude", the share of the budget that is due; by default cubic, from 10 % to 65 %.
        optimizer: one or several that hold the masked weights.
        total_steps: how many times `step` will be called in all.
        config: what is masked, and how sparsity differs between layers.
        prune_every: steps between two changes of the masks. By default 100 with "rigl", a twentieth of the training
            with "magnitude"; "set" needs the steps of an epoch.
        round_to: on channels, as in `compressor.budget.SelectionOptions`.
        limits: on channels, as for `compressor.prune`.
        copies: models that get the same zeros and lose the same channels, as for `compressor.cut`.
        outputs: as for `compressor.trace`.
        seed: of what is drawn.

    Attributes:
        graph: the channel graph, as it is now.
        steps: how many times `step` was called.
        units: what is masked.

    Raises:
        UnknownNameError: no such criterion, granularity, allocation or measure.
        RangeError: a number out of its range.
        InputError: nothing to mask, an optimizer that does not hold the weights, a copy of another model, a training
            too short for a single change of the masks, or an argument that would have no effect.

    Source: Zhu & Gupta 2017, arXiv 1710.01878; Mocanu et al. 2018, arXiv 1707.04780; Evci et al. 2020, arXiv
        1911.11134. The step before a change of the masks is taken as well, where RigL's code leaves it out.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        criterion: str = "rigl",
        budget: Budget | float = Budget.sparsity,
        schedule: Schedule | None = None,
        *,
        optimizer: Optimizer | Iterable[Optimizer],
        total_steps: int,
        config: SparseConfig | None = None,
        prune_every: int | None = None,
        round_to: int | None = None,
        limits: Limits | None = None,
        copies: Iterable[nn.Module] = (),
        outputs: Callable[[Any], Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.budget = Budget.from_share(budget)
        self.steps = 0
        config = config or SparseConfig()
        self._criterion = criterion
        self._config = replace(config, allocate=config.allocation_for(criterion))
        _require_effects(config, self.budget, round_to, limits)
        self._regrowth = METHODS[criterion]
        self._schedule = mask_schedule(criterion, total_steps, prune_every, schedule)
        self.graph = trace(unwrap_compiled(model), example_inputs, outputs=outputs)
        couple_blocks(self.graph)
        self._progress = PruningProgress(self.graph, self.budget)
        optimizers = all_optimizers(optimizer)
        require_followed(optimizers)
        self.units = self._masked_units(
            optimizers, [unwrap_compiled(each) for each in copies], round_to, limits or Limits()
        )
        self._whole = self.units.whole
        self._generator = torch.Generator().manual_seed(seed)
        self._begun = False

    def _masked_units(
        self, optimizers: list[Optimizer], copies: list[nn.Module], round_to: int | None, limits: Limits
    ) -> MaskedUnits:
        allocation = self._config.allocation_for(self._criterion)
        if self._config.granularity == "weight":
            return WeightMasks(self.graph, optimizers, self.budget, allocation, copies)
        shares = limits.shares(self.graph)
        return ChannelMasks(self.graph, optimizers, self.budget, allocation, round_to, shares, copies)

    @property
    def masks(self) -> Masks:
        """The masks now: bool by weight, or by group `(C,)`; True where a weight or channel is on."""
        return self.units.masks

    # -- one step

    def loss(self, inputs: Any, targets: Any, loss_fn: Callable[..., Tensor]) -> Tensor:
        """Return the mean loss of one batch, a scalar to call `backward` on; the first call puts the first masks on.

        Args:
            inputs: one batch, `(B, ...)`, or a tuple or dict of such, as the model takes them.
            targets: what `loss_fn` compares with.
            loss_fn: like `torch.nn.functional.cross_entropy`.

        Raises:
            BudgetError: at the first step, if the budget cannot be met.
        """
        self._begin()
        return loss_fn(run_model(self.model, inputs), targets)

    @contextmanager
    def observe(self, inputs: Any) -> Iterator[Callable[[Tensor], Tensor]]:
        """Run your own forward pass of one batch in this `with`; the first one puts the first masks on.

        Yields:
            A function that returns the mean of losses, to call `backward` on.
        """
        self._begin()
        yield Tensor.mean

    def _begin(self) -> None:
        # NOTE: Not when the object is made: the weights of a run that goes on must not be masked anew.
        if not self._begun:
            self.units.freeze_uncuttable()
            if self._regrowth:
                self.units.set_masks(self.units.topk_masks(self._random()))
            self._begun = True

    def step(self) -> dict[str, Any] | None:
        """Count the step as done, keep what is masked at zero, and change the masks if it is time.

        Call it after `optimizer.step()` and before gradients are cleared. Writes the model and the optimizers' state.

        Returns:
            What was changed or cut, JSON-able, or None where nothing was.
        """
        self._begin()
        self.steps += 1
        self.units.enforce()
        if not self._schedule.is_due(self.steps):
            return None
        before = self.units.masks
        share = self._schedule.share(self.steps)
        self.units.set_masks(self._regrown(self._regrowth, share) if self._regrowth else self.units.dropped(share))
        changed = self._event(before)
        return (self._cut() if self.steps == self._schedule.last else None) or changed

    # -- changes of the masks

    def _regrown(self, how: Regrowth, share: float) -> Masks:
        """Return masks with as many on as before: that share dropped, and as many grown."""
        values = self.units.values()
        scores = self._gradients() if how.by_gradient else self._random()
        return {
            name: drop_and_grow(mask, how.drop(values[name], mask, share), scores[name])
            for name, mask in self.masks.items()
        }

    def _gradients(self) -> dict[str, Tensor]:
        if all(parameter.grad is None for parameter in self.model.parameters()):
            raise InputError("step() found no gradients: call it after backward() and before zero_grad()")
        return self.units.grad_magnitudes()

    def _random(self) -> dict[str, Tensor]:
        # Drawn on the CPU, so that the same seed grows the same on any device.
        return {
            name: torch.rand(mask.shape, generator=self._generator).to(mask.device) for name, mask in self.masks.items()
        }

    def _event(self, before: Mapping[str, Tensor]) -> dict[str, Any]:
        changed = sum(int((mask != before[name]).sum()) for name, mask in self.masks.items())
        off = self.units.off / self.units.whole
        return {"event": "masks", "step": self.steps, "off": off, "changed": changed}

    def _cut(self) -> dict[str, Any] | None:
        widths = self.graph.sizes()
        self.units.cut()
        return cut_event(self.result(), widths, step=self.steps, target=self.budget.sparsity)

    # -- what came of it

    def result(self) -> PruneResult:
        """Return what has been removed so far, against the whole budget.

        On weights, `removed` is the share that is off, of the measure "weights"; the counts are of what was cut.
        """
        cut = self._progress.result(self.budget)
        if self._config.granularity == "channel":
            return cut
        on = self.units.whole - self.units.off
        reached = on <= self.budget.goal(self._whole)
        blocked = () if reached else ("at least one weight of every layer stays",)
        return replace(
            cut,
            measure="weights",
            removed=(self._whole - on) / self._whole,
            reached=reached,
            blocked=blocked,
            notes=(*cut.notes, self._left_over(cut)),
        )

    def _left_over(self, cut: PruneResult) -> str:
        """Say which channels the masks emptied, and that other zeros stay."""
        before, after = cut.channels
        refused = self._progress.refused()
        kept = f"; the cut of {', '.join(refused)} was refused" if refused else ""
        return (
            f"{before - after:,} of {before:,} channels ended without a weight and are cut{kept}; other weights that "
            "are off stay in the file as zeros (granularity 'channel' cuts all that is off)"
        )

    def _about(self) -> dict[str, Any]:
        return {"criterion": self._criterion, **asdict(self._config)}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the model and the optimizers: plain numbers, strings and tensors."""
        return {
            **self._about(),
            "step": self.steps,
            "begun": self._begun,
            "masks": dict(self.masks),
            "whole": self._whole,
            "groups": list(self.graph.sizes()),
            "progress": self._progress.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; the model must have been narrowed to its shapes before this object was made.

        Raises:
            InputError: the state is of another method, or of another model. Nothing was changed.
        """
        for name, value in self._about().items():
            if state[name] != value:
                raise InputError(f"this state is of {name} {state[name]!r}, not {value!r}: give {name} as it was")
        masks = {name: state["masks"].get(name) for name in self.masks if name in state["masks"]}
        if len(masks) < len(state["masks"]) or any(masks[name].shape != self.masks[name].shape for name in masks):
            raise InputError("this state is of another model: narrow the model as it was before this object is made")
        self.graph.freeze(self.graph.sizes().keys() - set(state["groups"]), "frozen before the run was interrupted")
        self.steps = int(state["step"])
        self._begun = bool(state["begun"])
        self._whole = int(state["whole"])
        self._progress.load_state_dict(state["progress"])
        self._generator.set_state(state["generator"].cpu())
        self.units.set_masks({name: mask.to(self.masks[name].device) for name, mask in masks.items()})


def _require_effects(config: SparseConfig, budget: Budget, round_to: int | None, limits: Limits | None) -> None:
    """Refuse what has no meaning for single weights."""
    if config.granularity == "channel":
        return
    for name, given in (("round_to", round_to), ("limits", limits)):
        if given:
            raise IdleArgumentError(name, "granularity 'weight'")
    if budget.measure != "params":
        raise InputError(
            f"a budget of {budget.counts} cannot be met by single weights: give Budget({budget.sparsity:g}, 'params') "
            "or granularity 'channel'"
        )
