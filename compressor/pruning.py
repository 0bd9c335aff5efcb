"""Prune: the one place where graph, criterion, schedule, selection and surgery meet.

`prune` cuts a trained model once. `Pruner` cuts it while it trains: it is asked for the loss of every step, told when
the step is over, and makes the model smaller on its way, as the schedule says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.calibration import COMPENSATIONS, input_means
from compressor.costs import CostModel
from compressor.criteria import Criterion, ModuleSnapshot, lookup, score
from compressor.errors import BudgetError, CutError, InputError, PeriodError, RangeError, UnknownNameError
from compressor.graph.group import ChannelGraph, Group
from compressor.graph.trace import trace
from compressor.ledger import Ledger, PruneResult
from compressor.limits import Limits
from compressor.schedules import Cubic, Schedule
from compressor.selection import Budget, Selection, select
from compressor.surgery import cut
from compressor.verification import verified_cut

if TYPE_CHECKING:
    from compressor.intraining.relevance import Relevance


def prune(
    model: nn.Module,
    example_inputs: Any,
    criterion: str | Criterion = "l1",
    sparsity: float = 0.5,
    measure: str = "params",
    scope: str = "global",
    round_to: int = 1,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    seed: int = 0,
    *,
    limits: Limits | None = None,
    calibration: Iterable[Any] | None = None,
    compensate: str = "none",
    verify: bool = False,
) -> PruneResult:
    """Make a model smaller at once, in place.

    Args:
        model: any module; gradients must be present for criteria that need them.
        example_inputs: a tensor, a tuple or a dict that `model` accepts.
        criterion: a name from `compressor.CRITERIA`, or a function of a group and a snapshot that gives `(C,)` scores.
        sparsity: the share to remove, in `[0, 1)`.
        measure: of what: "params", "macs" or "channels".
        scope: "global" ranks all channels together, "local" takes the same share of every group.
        round_to: channel counts become multiples of this.
        optimizer: optimizers whose state is sliced along.
        seed: for criteria that draw.
        limits: groups that stay whole, that alone lose channels, or that lose a share of their own.
        calibration: batches of real inputs, for `compensate` and `verify`.
        compensate: "mean" folds what a removed channel carried on average, over `calibration`, into the next bias or
            running mean; "none" does not.
        verify: also compare every cut with the silenced model, on the first batch of `calibration`, or on
            `example_inputs` where there is none; a group whose cut is not its silence stays whole, like every group
            that refuses.

    Returns:
        What was removed. A target that cannot be reached is not an error here: `reached` is false, as much as possible
        is removed, and `blocked` says why.

    Raises:
        UnknownNameError, RangeError: a criterion, measure, scope or group that does not exist; a number out of range.
        InputError: a model without parameters; limits that contradict each other; an argument that lacks what it needs
            or has no effect.
        TraceError: the model does not run on the example inputs.
    """
    budget, judge = Budget(sparsity, measure), lookup(criterion)
    batches = _batches(calibration, compensate, verify)
    graph = traced(model, example_inputs)
    ledger = Ledger(graph)
    how = _How(scope, round_to, (limits or Limits()).shares(graph), optimizer, verify)
    generator = torch.Generator().manual_seed(seed)
    made = _cut_to(
        ledger,
        lambda groups: score(judge, groups, ModuleSnapshot.of(model, generator)),
        budget,
        how,
        means=input_means(graph, batches) if compensate == "mean" else None,
        real_inputs=batches[0] if batches else example_inputs,
    )
    return ledger.result(budget, made.blocked if made else ())


def _batches(calibration: Iterable[Any] | None, compensate: str, verify: bool) -> list[Any]:
    """Give the batches of real inputs, if they are there where they are needed, and only there."""
    if compensate not in COMPENSATIONS:
        raise UnknownNameError("compensation", compensate, COMPENSATIONS)
    batches = list(calibration or ())
    if compensate == "mean" and not batches:
        raise InputError("compensate='mean' needs real inputs: pass calibration=[inputs, ...], or compensate='none'")
    if batches and compensate == "none" and not verify:
        raise InputError("calibration has no effect with compensate='none' and verify=False: leave it out")
    return batches


def traced(model: nn.Module, example_inputs: Any) -> ChannelGraph:
    """Give the channel graph of a model that has something to prune.

    Raises:
        InputError: the model has no parameters.
        TraceError: the model does not run on the example inputs.
    """
    if next(model.parameters(), None) is None:
        raise InputError(
            f"{type(model).__name__} has no parameters, so there is nothing to prune: pass the whole model"
        )
    return trace(model, example_inputs)


@dataclass(frozen=True)
class _How:
    """How cuts are made: the same for all cuts of one pruning."""

    scope: str
    round_to: int
    shares: Mapping[str, float]
    optimizer: Optimizer | Iterable[Optimizer] | None
    verify: bool


def _cut_to(
    ledger: Ledger,
    scores: Callable[[Sequence[Group]], Mapping[str, Tensor]],
    budget: Budget,
    how: _How,
    *,
    due: float = 1.0,
    means: Mapping[str, Tensor] | None = None,
    normalise: bool = True,
    real_inputs: Any = None,
) -> Selection | None:
    """Select and cut; a group that refuses is frozen with the reason, and the selection is made again without it.

    Every group is scored once. `due` is the part of the groups' own shares that may be gone by now.

    Gives the selection that was cut, None where all was done before.
    """
    graph = ledger.graph
    shares = {name: share * due for name, share in how.shares.items()}
    if ledger.remaining(budget) is None and not any(shares.values()):
        return None
    known = scores([group for group in graph.groups if shares.get(group.name) != 0])
    while True:
        selection = select(
            graph,
            {name: each for name, each in known.items() if name in graph.sizes()},
            ledger.remaining(budget) or Budget(0.0, budget.measure),
            costs=CostModel(graph),
            scope=how.scope,
            round_to=how.round_to,
            whole=ledger.widths,
            shares=shares,
            normalise=normalise,
        )
        try:
            if how.verify:
                verified_cut(graph, selection.keep, real_inputs, how.optimizer, means)
            else:
                cut(graph, selection.keep, how.optimizer, means)
            return selection
        except CutError as refusal:
            if not refusal.groups:
                raise
            graph.freeze(refusal.groups, refusal.reason)


# -- while training


class Pruner:
    """Makes a model smaller while it trains. One object in a training loop, and a `StepHook` for `training.train`:

        pruner = Pruner(model, x, "relevance", Budget(0.6), optimizer=optimizer, total_steps=len(loader) * epochs)
        for x, y in loader:
            pruner.loss(x, y, F.cross_entropy).backward()
            optimizer.step()
            pruner.update()
            optimizer.zero_grad()

    Every `collect` steps the schedule says how much may be gone by now; the channels of lowest score are cut, weights,
    gradients and optimizer state included, and training goes on with what is left.

    Args:
        model, example_inputs: as for `compressor.trace`.
        criterion: "relevance", which watches the training; or a name from `compressor.CRITERIA` or a function of a
            group and a snapshot, asked at every cut.
        budget: what is to be gone at the end of the schedule, as a share of the whole model.
        schedule: the share of the budget that is due, over the progress of training; by default cubic, from 10 % of
            it to 65 %.
        optimizer: one or several; their state is sliced along.
        total_steps: how many times `update` will be called in all.
        collect: steps between two cuts; a twentieth of the training by default, with relevance as many as it takes to
            tell any channel from chance.
        scope, round_to, limits, verify: as for `prune`; the groups' own shares follow the schedule too, and cuts are
            verified on the last batch.
        delta: with relevance, channels whose p-value (the chance to be more useful than a random one) is above `delta`
            are cut only when the budget leaves no others.
        compensate: "mean" folds what a removed channel carries on average into the next bias or running mean, over the
            steps that were watched, or over the last batch where the criterion does not watch; "none" does not.
        seed: for whatever draws.
        observing: further arguments for `Relevance` (estimator, drop, dummies; half_life, by default `collect`;
            warmup, by default a twentieth of the training, none for the published method).

    Raises:
        RangeError, UnknownNameError, InputError: as for `prune`.
        BudgetError: every channel is frozen; says why.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        criterion: str | Criterion = "relevance",
        budget: Budget | None = None,
        schedule: Schedule | None = None,
        *,
        optimizer: Optimizer | Iterable[Optimizer],
        total_steps: int,
        collect: int | None = None,
        scope: str = "global",
        round_to: int = 8,
        limits: Limits | None = None,
        delta: float = 0.99,
        compensate: str = "mean",
        verify: bool = False,
        seed: int = 0,
        **observing: Any,
    ) -> None:
        self.model = model
        self.budget = budget or Budget(0.5)
        self.graph = traced(model, example_inputs)
        self.step = 0
        if compensate not in COMPENSATIONS:
            raise UnknownNameError("compensation", compensate, COMPENSATIONS)
        self._schedule = schedule or Cubic(0.1, 0.65)
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self._total = _positive("total_steps", total_steps)
        self._last = _last_cut(self._schedule, self._total)
        self._open = collect is None  # then the first batch may make it longer
        self._collect = max(1, total_steps // 20) if collect is None else _positive("collect", collect)
        if not self.graph.groups:
            require_reachable(self.graph, self.budget)
        self._how = _How(scope, round_to, (limits or Limits()).shares(self.graph), optimizers, verify)
        self._compensate, self._seen = compensate == "mean", example_inputs
        self._delta, self._ledger, self._blocked = delta, Ledger(self.graph), tuple[str, ...]()
        self._generator = torch.Generator().manual_seed(seed)
        warmup = 0 if observing.get("estimator") == "source" else min(self._total // 20, self._last - 1)
        observing = {"half_life": self._collect, "delta": delta, "warmup": warmup, **observing}
        if observing["warmup"] >= self._last:
            raise RangeError("warmup", observing["warmup"], f"[0, {self._last}): then the whole budget is due")
        self._observer = _observer(self.graph, seed, observing) if criterion == "relevance" else None
        self._judge = None if self._observer else lookup(criterion)

    def loss(self, inputs: Tensor, targets: Tensor, loss_fn: Callable[..., Tensor]) -> Tensor:
        """Give the mean loss of one batch, a scalar to call `backward` on; observes where the criterion watches.

        Args:
            inputs: `(B, ...)`, one batch.
            targets: `(B, ...)`, what `loss_fn` compares with.
            loss_fn: like `torch.nn.functional.cross_entropy`: takes outputs, targets and `reduction=`.

        Raises:
            BudgetError: at the first step, if the budget cannot be reached whatever the scores are.
        """
        if self.step == 0:
            require_reachable(self.graph, self.budget, self._how.scope, self._how.round_to, self._how.shares)
        self._seen = inputs
        if self._observer and self._due(self.step) < 1:
            return self._observer.loss(self.model, inputs, targets, loss_fn)
        return loss_fn(self.model(inputs), targets)

    def update(self) -> dict[str, Any] | None:
        """Count the step as done, and cut if it is time; writes the model and the optimizers' state.

        Returns:
            What was cut and why, JSON-able, or None where nothing was.

        Raises:
            PeriodError: at the first step, as `require_time`.
        """
        if self.step == 0:
            self.require_time(len(self._seen))
        if self._observer and self._due(self.step) < 1:
            self._observer.update()
        before, self.step = self._due(self.step), self.step + 1
        now = self._due(self.step)
        last = before < 1 <= now
        if not now or not (last or (self.step % self._collect == 0 and before < 1)):
            return None
        return self._cut(Budget(self.budget.sparsity * now, self.budget.measure), now)

    def require_time(self, batch_size: int) -> None:
        """Raise PeriodError if relevance, in the time that it has, cannot tell any channel from chance.

        Where `collect` was left open, it becomes as long as it takes.
        """
        if not self._observer:
            return
        needed = self._observer.needed_steps(batch_size)
        if self._open and needed > self._collect:
            self._collect, self._observer.half_life = needed, needed
        if self._collect < needed:
            raise PeriodError("collect", self._collect, needed, batch_size, f"give --collect {needed} or more")
        if self._last < needed:
            what = "the time until the whole budget is due"
            raise PeriodError(what, self._last, needed, batch_size, "train longer, or on larger batches")

    def _due(self, step: int) -> float:
        return self._schedule(min(step / self._total, 1.0))

    def _cut(self, target: Budget, due: float) -> dict[str, Any] | None:
        widths = self.graph.sizes()
        seen = self._observer.record() if self._observer else None
        made = _cut_to(
            self._ledger,
            self._scores,
            target,
            self._how,
            due=due,
            means=self._means() if self._compensate else None,
            normalise=self._observer is None,
            real_inputs=self._seen,
        )
        if made is None:
            return None
        if self._observer:
            self._observer.narrow(made.keep, self.graph)
        self._blocked = made.blocked
        return self._event(target, widths, seen)

    def _means(self) -> Mapping[str, Tensor]:
        return self._observer.means() if self._observer else input_means(self.graph, [self._seen])

    def _scores(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        if self._observer:
            price = CostModel(self.graph).per_channel(self.budget.measure, self.graph.sizes())
            usual = sum(price.values()) / max(len(price), 1)
            scores = {name: _per_cost(seen, price[name] / usual) for name, seen in self._observer.scores().items()}
            return _protected(scores, self._observer.p_values(), self._delta)
        assert self._judge
        return score(self._judge, groups, ModuleSnapshot.of(self.model, self._generator))

    def _event(self, target: Budget, widths: Mapping[str, int], seen: dict[str, Any] | None) -> dict[str, Any] | None:
        sizes = self.graph.sizes()
        changed = {name: [width, sizes[name]] for name, width in widths.items() if sizes.get(name, width) != width}
        if not changed:
            return None
        result = self.result()
        event: dict[str, Any] = {"event": "cut", "step": self.step, "target": target.sparsity, "widths": changed}
        event |= {"removed": result.removed, "params": result.params[1], "macs": result.macs[1]}
        return event | ({"observed": seen} if seen else {})

    def result(self) -> PruneResult:
        """Give what has been removed so far, against the whole budget."""
        return self._ledger.result(self.budget, self._blocked)

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed run needs beside the model and the optimizers: plain numbers, strings and tensors."""
        return {
            "step": self.step,
            "collect": self._collect,
            "ledger": self._ledger.state_dict(),
            "blocked": list(self._blocked),
            "generator": self._generator.get_state(),
            "observer": self._observer.state_dict() if self._observer else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; the model must have been narrowed to its shapes before this pruner was made."""
        self.step, self._collect, self._blocked = int(state["step"]), int(state["collect"]), tuple(state["blocked"])
        self._ledger.load_state_dict(state["ledger"])
        self._generator.set_state(state["generator"])
        stuck = [name for name in self.graph.sizes() if name not in state["ledger"]["widths"]]
        self.graph.freeze(stuck, "frozen before the run was interrupted")
        if self._observer:
            self._observer.load_state_dict(state["observer"])


def require_reachable(
    graph: ChannelGraph,
    budget: Budget,
    scope: str = "global",
    round_to: int = 1,
    shares: Mapping[str, float] | None = None,
) -> None:
    """Raise BudgetError if no choice of channels can reach the budget; what blocks it is in the message."""
    zeros = {group.name: torch.zeros(group.size) for group in graph.groups}
    costs = CostModel(graph)
    selection = select(graph, zeros, budget, scope=scope, round_to=round_to, costs=costs, shares=shares)
    if not selection.reached:
        raise BudgetError(budget.measure, budget.sparsity, selection.removed, selection.blocked)


def _last_cut(schedule: Schedule, total_steps: int) -> int:
    """Give the step at which the whole budget is due."""
    due = (step for step in range(1, total_steps + 1) if schedule(step / total_steps) >= 1)
    last = next(due, None)
    if last is None:
        raise InputError(
            f"after all {total_steps} steps the schedule asks for {schedule(1.0):.0%} of the budget, which is never "
            "reached: give a schedule that gets to 1, Cubic(0.1, 0.65) say"
        )
    return last


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise RangeError(name, value, "1, 2, 3, ... steps")
    return value


def _observer(graph: ChannelGraph, seed: int, observing: Mapping[str, Any]) -> Relevance:
    from compressor.intraining.relevance import Relevance

    return Relevance(graph, seed=seed, **observing)


def _per_cost(relevance: Tensor, price: float) -> Tensor:
    """Give relevance per cost: of two useful channels the cheaper stays, of two harmful ones the dearer goes first."""
    relevance = relevance.double()  # one line of ranks is made of all groups' scores: keep their order exact
    return torch.where(relevance > 0, relevance / price, relevance * price)


def _protected(scores: Mapping[str, Tensor], p_values: Mapping[str, Tensor], delta: float) -> dict[str, Tensor]:
    """Rank channels that passed the test behind all that did not, whatever their scores are."""
    everything = torch.cat(list(scores.values()))
    reach = 2 * float(everything.max() - everything.min()) + 1e-30
    return {name: each + reach * (p_values[name] > delta) for name, each in scores.items()}
