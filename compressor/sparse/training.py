"""Sparse training: iterative magnitude pruning, SET and RigL, on single weights or on channels.

    training = SparseTraining(model, x, "rigl", Budget(0.9), optimizer=optimizer, total_steps=len(loader) * epochs)
    for x, y in loader:
        training.loss(x, y, F.cross_entropy).backward()
        optimizer.step()
        training.update()
        optimizer.zero_grad()

Forward passes see masked weights. What is masked is zero after every `update`, and so is what optimizers keep for it.
When the masks are final, channels that they left without a weight are cut for good, and training goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor._utils import unwrap_compiled
from compressor.budget import Budget, Limits, PruneResult, PruningProgress, Schedule
from compressor.errors import InputError, UnknownNameError
from compressor.graph import trace
from compressor.sparse.allocation import ALLOCATIONS
from compressor.sparse.channel_masks import ChannelMasks
from compressor.sparse.regrowth import METHODS, Regrowth, drop_and_grow
from compressor.sparse.schedules import mask_schedule
from compressor.sparse.units import MaskedUnits, Masks
from compressor.sparse.weight_masks import WeightMasks

GRANULARITIES = ("weight", "channel")


class SparseTraining:
    """Trains with masks that change on the way. One object in a training loop, and a `StepHook` for `training.train`.

    Args:
        model, example_inputs: as for `compressor.trace`.
        criterion: "magnitude" drops the smallest, more and more, as the schedule says. "set" begins sparse at random;
            every epoch but the last, 0.3 of what is on is dropped, by sign, the nearest to zero, and as much grows at
            random. "rigl" begins so too; every 100 steps until 75 % of the training the smallest are dropped, 0.3 at
            first and less and less along half a cosine, and those with the largest gradients grow.
        budget: what is off at the end: on weights, a share of all weights of convolutions and Linears; on channels, the
            share of params, macs or channels that the model loses when those that are off are cut.
        schedule: with "magnitude", the share of the budget that is due; by default cubic, from 10 % to 65 %.
        optimizer: one or several that hold the masked weights.
        total_steps: how many times `update` will be called in all.
        granularity: "weight" or "channel".
        allocation: how sparsity differs between layers: "erk", or "uniform", the default with "magnitude"; with
            "magnitude" also "global", which ranks everything together.
        collect: steps between two changes of the masks. By default 100 with "rigl", a twentieth of the training with
            "magnitude"; "set" needs the steps of an epoch.
        round_to: on channels, counts become multiples of this; 8 by default.
        limits: on channels, as for `compressor.prune`.
        copies: models that get the same zeros and lose the same channels, as for `compressor.cut`.
        seed: of what is drawn.

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
        budget: Budget | None = None,
        schedule: Schedule | None = None,
        *,
        optimizer: Optimizer | Iterable[Optimizer],
        total_steps: int,
        granularity: str = "weight",
        allocation: str | None = None,
        collect: int | None = None,
        round_to: int | None = None,
        limits: Limits | None = None,
        copies: Iterable[nn.Module] = (),
        seed: int = 0,
    ) -> None:
        self.model, self.budget, self.steps = model, budget or Budget(0.5), 0
        allocation = allocation or ("uniform" if criterion == "magnitude" else "erk")
        _check(criterion, granularity, allocation, self.budget, round_to, limits)
        self._about = {"criterion": criterion, "granularity": granularity, "allocation": allocation}
        self._regrowth = METHODS[criterion]
        self._timetable = mask_schedule(criterion, total_steps, collect, schedule)
        self.graph = trace(unwrap_compiled(model), example_inputs)
        self._ledger = PruningProgress(self.graph)
        shares = limits.shares(self.graph) if limits else {}
        optimizers, along = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer), list(copies)
        self._units: MaskedUnits = (
            WeightMasks(self.graph, optimizers, self.budget, allocation, along)
            if granularity == "weight"
            else ChannelMasks(self.graph, optimizers, self.budget, allocation, round_to or 8, shares, along)
        )
        self._whole = self._units.size
        self._generator = torch.Generator().manual_seed(seed)
        self._begun = False

    @property
    def masks(self) -> Masks:
        """The masks now: bool by weight, or by group `(C,)`; True where a weight or channel is on."""
        return self._units.masks

    # -- one step

    def loss(self, inputs: Tensor, targets: Tensor, loss_fn: Callable[..., Tensor]) -> Tensor:
        """Return the mean loss of one batch, a scalar to call `backward` on; the first call puts the first masks on.

        Args:
            inputs: `(B, ...)`, one batch.
            targets: `(B, ...)`, what `loss_fn` compares with.
            loss_fn: like `torch.nn.functional.cross_entropy`.

        Raises:
            BudgetError: at the first step, if the budget cannot be met.
        """
        self._begin()
        return loss_fn(self.model(inputs), targets)

    @contextmanager
    def step(self, inputs: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        """Run your own forward pass of one batch, `(B, ...)`, in this `with`; the first one puts the first masks on.

        Yields:
            A function that gives the mean of losses, to call `backward` on.
        """
        self._begin()
        yield Tensor.mean

    def _begin(self) -> None:
        # NOTE: Not when the object is made: the weights of a run that goes on must not be masked anew.
        if not self._begun:
            self._units.settle()
            if self._regrowth:
                self._units.switch(self._units.best(self._random()))
            self._begun = True

    def update(self) -> dict[str, Any] | None:
        """Count the step as done, keep what is masked at zero, and change the masks if it is time.

        Call it after `optimizer.step()` and before gradients are cleared. Writes the model and the optimizers' state.

        Returns:
            What was changed or cut, JSON-able, or None where nothing was.
        """
        self._begin()
        self.steps += 1
        self._units.enforce()
        if not self._timetable.is_due(self.steps):
            return None
        before, share = self._units.masks, self._timetable.share(self.steps)
        self._units.switch(self._regrown(self._regrowth, share) if self._regrowth else self._thinned(share))
        changed = self._event(before)
        return (self._cut() if self.steps == self._timetable.last else None) or changed

    # -- changes of the masks

    def _regrown(self, how: Regrowth, share: float) -> Masks:
        """Return masks with as many on as before: that share dropped, and as many grown."""
        values, scores = self._units.values(), self._slopes() if how.by_gradient else self._random()
        return {
            name: drop_and_grow(mask, how.drop(values[name], mask, share), scores[name])
            for name, mask in self.masks.items()
        }

    def _slopes(self) -> dict[str, Tensor]:
        if all(parameter.grad is None for parameter in self.model.parameters()):
            raise InputError("update() found no gradients: call it after backward() and before zero_grad()")
        return self._units.grad_magnitudes()

    def _random(self) -> dict[str, Tensor]:
        # Drawn on the CPU, so that the same seed grows the same on any device.
        return {
            name: torch.rand(mask.shape, generator=self._generator).to(mask.device) for name, mask in self.masks.items()
        }

    def _thinned(self, share: float) -> Masks:
        """Return masks that meet that share of the budget; what is off stays off."""
        wanted = self._units.best(self._units.magnitudes(), share)
        return {name: mask & wanted[name] for name, mask in self.masks.items()}

    def _event(self, before: Mapping[str, Tensor]) -> dict[str, Any]:
        changed = sum(int((mask != before[name]).sum()) for name, mask in self.masks.items())
        off = self._units.off / self._units.size
        return {"event": "masks", "step": self.steps, "off": off, "changed": changed}

    def _cut(self) -> dict[str, Any] | None:
        widths = self.graph.sizes()
        self._units.cut()
        sizes, result = self.graph.sizes(), self.result()
        narrower = {name: [width, sizes[name]] for name, width in widths.items() if sizes.get(name, width) != width}
        if not narrower:
            return None
        event: dict[str, Any] = {"event": "cut", "step": self.steps, "target": self.budget.sparsity, "widths": narrower}
        return event | {"removed": result.removed, "params": result.params[1], "macs": result.macs[1]}

    # -- what came of it

    def result(self) -> PruneResult:
        """Return what has been removed so far, against the whole budget.

        On weights, `removed` is the share that is off, of the measure "weights"; the counts are of what was cut.
        """
        cut = self._ledger.result(self.budget)
        if self._about["granularity"] == "channel":
            return cut
        on = self._units.size - self._units.off
        reached = on <= self.budget.goal(self._whole)
        blocked = () if reached else ("at least one weight of every layer stays",)
        return replace(
            cut,
            measure="weights",
            removed=(self._whole - on) / self._whole,
            reached=reached,
            blocked=blocked,
            notes=self._left_over(cut),
        )

    def _left_over(self, cut: PruneResult) -> tuple[str, ...]:
        """Say which channels the masks emptied, and that other zeros stay."""
        before, after = cut.channels
        refused = self._ledger.refused()
        kept = f"; the cut of {', '.join(refused)} was refused" if refused else ""
        return (
            f"{before - after:,} of {before:,} channels ended without a weight and are cut{kept}; other weights that "
            "are off stay in the file as zeros (granularity 'channel' cuts all that is off)",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the model and the optimizers: plain numbers, strings and tensors."""
        return {
            **self._about,
            "step": self.steps,
            "begun": self._begun,
            "masks": dict(self.masks),
            "whole": self._whole,
            "groups": list(self.graph.sizes()),
            "ledger": self._ledger.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; the model must have been narrowed to its shapes before this object was made.

        Raises:
            InputError: the state is of another method, or of another model. Nothing was changed.
        """
        for name, value in self._about.items():
            if state[name] != value:
                raise InputError(f"this state is of {name} {state[name]!r}, not {value!r}: give {name} as it was")
        masks = {name: state["masks"].get(name) for name in self.masks if name in state["masks"]}
        if len(masks) < len(state["masks"]) or any(masks[name].shape != self.masks[name].shape for name in masks):
            raise InputError("this state is of another model: narrow the model as it was before this object is made")
        self.graph.freeze(self.graph.sizes().keys() - set(state["groups"]), "frozen before the run was interrupted")
        self.steps, self._begun, self._whole = int(state["step"]), bool(state["begun"]), int(state["whole"])
        self._ledger.load_state_dict(state["ledger"])
        self._generator.set_state(state["generator"].cpu())
        self._units.switch({name: mask.to(self.masks[name].device) for name, mask in masks.items()})


def _check(
    criterion: str,
    granularity: str,
    allocation: str,
    budget: Budget,
    round_to: int | None,
    limits: Limits | None,
) -> None:
    """Refuse names that do not exist and what would have no effect."""
    tables = {
        "criterion": (criterion, METHODS),
        "granularity": (granularity, GRANULARITIES),
        "allocation": (allocation, (*ALLOCATIONS, "global")),
    }
    for kind, (name, known) in tables.items():
        if name not in known:
            raise UnknownNameError(kind, name, known)
    if METHODS[criterion] and allocation == "global":
        raise InputError(
            f"{criterion} begins at random, so there is nothing to rank: give allocation 'erk' or 'uniform'"
        )
    for name, given in (("round_to", round_to), ("limits", limits)):
        if granularity == "weight" and given:
            raise InputError(f"{name} has no effect on single weights: leave it out, or give granularity 'channel'")
    if granularity == "weight" and budget.measure != "params":
        raise InputError(
            f"a budget of {budget.measure} cannot be met by single weights: give Budget({budget.sparsity:g}, 'params') "
            "or granularity 'channel'"
        )
