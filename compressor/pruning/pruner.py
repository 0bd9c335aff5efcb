"""The Pruner: makes a model smaller while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.budget import Budget, CostModel, Cubic, Ledger, Limits, PruneResult, Schedule
from compressor.criteria import Criterion, Snapshot, lookup, score
from compressor.errors import InputError, PeriodError, RangeError, UnknownNameError
from compressor.graph import ChannelGraph, Group
from compressor.pruning.to_budget import How, cut_to, require_reachable, traced
from compressor.surgery import COMPENSATIONS, input_means

if TYPE_CHECKING:
    from compressor.relevance import Relevance


class Pruner:
    """Makes a model smaller while it trains. One object in a training loop, and a `StepHook` for `training.train`:

        pruner = Pruner(model, x, "relevance", Budget(0.6), optimizer=optimizer, total_steps=len(loader) * epochs)
        for x, y in loader:
            pruner.loss(x, y, F.cross_entropy).backward()
            optimizer.step()
            pruner.update()
            optimizer.zero_grad()

    A loop that runs the model itself says `with pruner.step(x) as mean: loss = mean(F.cross_entropy(model(x), y,
    reduction="none"))` instead of the call of `loss`. Several batches may come before one `update`.

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
            verified on the last batch. With scope "global" relevance counts per what a channel costs in the budget.
        delta: with relevance, channels whose p-value (the chance to be more useful than a random one) is above `delta`
            are cut only when the budget leaves no others.
        compensate: "mean" folds what a removed channel carries on average into the next bias or running mean, over the
            steps that were watched, or over the last batch where the criterion does not watch; "none" does not.
        copies: models that lose the same channels, as for `compressor.cut`.
        seed: for whatever draws.
        observing: further arguments for `Relevance` (estimator, drop, dummies; observe_every, by default at least as
            often as `collect` asks for; half_life, by default `collect`; warmup, by default a twentieth of the
            training, none for the published method).

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
        scope: str = "local",
        round_to: int = 8,
        limits: Limits | None = None,
        delta: float = 0.99,
        compensate: str = "mean",
        verify: bool = False,
        copies: Iterable[nn.Module] = (),
        seed: int = 0,
        **observing: Any,
    ) -> None:
        self.model = model
        self.budget = budget or Budget(0.5)
        self.graph = traced(model, example_inputs)
        self.steps = 0
        if compensate not in COMPENSATIONS:
            raise UnknownNameError("compensation", compensate, COMPENSATIONS)
        self._schedule = schedule or Cubic(0.1, 0.65)
        self._total = _positive("total_steps", total_steps)
        self._last = _last_cut(self._schedule, self._total)
        self._open = collect is None  # then the first batch may make it longer
        self._collect = max(1, total_steps // 20) if collect is None else _positive("collect", collect)
        if not self.graph.groups:
            require_reachable(self.graph, self.budget)
        shares = (limits or Limits()).shares(self.graph)
        self._how = How.of(scope, round_to, shares, optimizer, copies, verify)
        _require_held(self.graph.model, self._how.optimizers)
        self._compensate, self._seen = compensate == "mean", example_inputs
        self._delta, self._ledger, self._blocked = delta, Ledger(self.graph), tuple[str, ...]()
        self._generator = torch.Generator().manual_seed(seed)
        self._half_life: float | None = observing.get("half_life")
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
        self._begin(inputs)
        if self._watches():
            assert self._observer
            # NOTE: A compiled model would not see the gates, which come and go with every batch.
            return self._observer.loss(self.graph.model, inputs, targets, loss_fn)
        return loss_fn(self.model(inputs), targets)

    @contextmanager
    def step(self, inputs: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        """Run your own forward pass of one batch in this `with`, of the traced model itself, not of a compiled one.

        Args:
            inputs: `(B, ...)`, the batch.

        Yields:
            A function that takes the losses, `(B,)` or `(B, ...)`, of the samples and gives their mean, to call
            `backward` on. A batch whose losses it does not get is not observed.
        """
        self._begin(inputs)
        if not self._watches():
            yield Tensor.mean
            return
        assert self._observer
        from compressor.relevance import per_sample

        with self._observer.observing(len(inputs)) as observation:

            def mean(losses: Tensor) -> Tensor:
                each = per_sample(losses)
                observation.credit(each)
                return each.mean()

            yield mean

    def _begin(self, inputs: Tensor) -> None:
        if self.steps == 0:
            require_reachable(self.graph, self.budget, self._how.scope, self._how.round_to, self._how.shares)
        self._seen = inputs

    def _watches(self) -> bool:
        return self._observer is not None and self._observer.draws and self._unfinished()

    def _unfinished(self) -> bool:
        return self._due(self.steps) < 1

    def update(self) -> dict[str, Any] | None:
        """Count the step as done, and cut if it is time; writes the model and the optimizers' state.

        Returns:
            What was cut and why, JSON-able, or None where nothing was.

        Raises:
            PeriodError: at the first step, as `require_time`.
        """
        if self.steps == 0:
            self.require_time(len(self._seen))
        if self._observer and self._unfinished():
            self._observer.update()
        before, self.steps = self._due(self.steps), self.steps + 1
        now = self._due(self.steps)
        last = before < 1 <= now
        if not now or not (last or (self.steps % self._collect == 0 and before < 1)):
            return None
        return self._cut(Budget(self.budget.sparsity * now, self.budget.measure), now)

    def require_time(self, batch_size: int) -> None:
        """Raise PeriodError if relevance, in the time that it has, cannot tell any channel from chance.

        Where `observe_every` was left open, samples draw as often as it takes; where `collect` was, it becomes as long.
        """
        if not self._observer:
            return
        needed = self._observer.needed_steps(batch_size)
        if self._open:
            self._collect = max(needed, self._collect)
        if self._collect < needed:
            raise PeriodError("collect", self._collect, needed, batch_size, f"give --collect {needed} or more")
        if self._last < needed:
            what = "the time until the whole budget is due"
            raise PeriodError(what, self._last, needed, batch_size, "train longer, or on larger batches")
        self._observer.keep_pace(self._collect, batch_size, self._half_life or self._collect)

    def _due(self, step: int) -> float:
        return self._schedule(min(step / self._total, 1.0))

    def _cut(self, target: Budget, due: float) -> dict[str, Any] | None:
        widths = self.graph.sizes()
        seen = self._observer.record() if self._observer else None
        made = cut_to(
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
        return score(self._judge, groups, Snapshot.from_model(self.graph.model, self._generator))

    def _event(self, target: Budget, widths: Mapping[str, int], seen: dict[str, Any] | None) -> dict[str, Any] | None:
        sizes = self.graph.sizes()
        changed = {name: [width, sizes[name]] for name, width in widths.items() if sizes.get(name, width) != width}
        if not changed:
            return None
        result = self.result()
        event: dict[str, Any] = {"event": "cut", "step": self.steps, "target": target.sparsity, "widths": changed}
        event |= {"removed": result.removed, "params": result.params[1], "macs": result.macs[1]}
        return event | ({"observed": seen} if seen else {})

    def result(self) -> PruneResult:
        """Give what has been removed so far, against the whole budget."""
        return self._ledger.result(self.budget, self._blocked)

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed run needs beside the model and the optimizers: plain numbers, strings and tensors."""
        return {
            "step": self.steps,
            "collect": self._collect,
            "ledger": self._ledger.state_dict(),
            "blocked": list(self._blocked),
            "generator": self._generator.get_state(),
            "observer": self._observer.state_dict() if self._observer else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; the model must have been narrowed to its shapes before this pruner was made."""
        self.steps, self._collect, self._blocked = int(state["step"]), int(state["collect"]), tuple(state["blocked"])
        self._ledger.load_state_dict(state["ledger"])
        self._generator.set_state(state["generator"])
        stuck = [name for name in self.graph.sizes() if name not in state["ledger"]["widths"]]
        self.graph.freeze(stuck, "frozen before the run was interrupted")
        if self._observer:
            self._observer.load_state_dict(state["observer"])


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
    from compressor.relevance import Relevance

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


def _require_held(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Raise InputError if the optimizers hold none of the model's parameters: it would not train, nor be sliced."""
    held = {id(tensor) for optimizer in optimizers for group in optimizer.param_groups for tensor in group["params"]}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if trained and not any(id(parameter) in held for parameter in model.parameters()):
        raise InputError(
            f"the optimizer holds none of the model's {len(trained)} parameters ({trained[0]!r}, ...): make it from "
            "model.parameters(), of the model that is given here"
        )
