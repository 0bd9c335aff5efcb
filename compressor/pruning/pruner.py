"""The Pruner: makes a model smaller while it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor._utils import Ranks, count_samples, run_model, unwrap_compiled
from compressor.budget import (
    USUAL_SCHEDULE,
    Allocation,
    Budget,
    Limits,
    PruneResult,
    PruningProgress,
    Schedule,
    SelectionOptions,
    Threshold,
    cut_event,
    step_of_whole_budget,
    usual_period,
    usual_rounding,
)
from compressor.criteria import Criterion, Snapshot, lookup, score
from compressor.errors import IdleArgumentError, InputError, PeriodError, RangeError
from compressor.graph import Group, named_model_tensors
from compressor.pruning.calibration import require_batches
from compressor.pruning.one_shot import KNOWN, require_compensation
from compressor.pruning.relevance_scores import relevance_scores
from compressor.pruning.to_budget import CutOptions, prune_to_budget, require_reachable, traced
from compressor.relevance import Relevance, RelevanceConfig, per_sample
from compressor.surgery import Compensation, Moments, all_optimizers, require_alike, require_followed, require_held

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)


class Pruner:
    """Makes a model smaller while it trains. One object in a training loop, and a `StepHook` for `training.train`:

        pruner = Pruner(model, x, "relevance", Budget(0.6), optimizer=optimizer, total_steps=len(loader) * epochs)
        for x, y in loader:
            pruner.loss(x, y, F.cross_entropy).backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()

    A loop that runs the model itself says `with pruner.observe(x) as mean: loss = mean(F.cross_entropy(model(x), y,
    reduction="none"))` instead of the call of `loss`. Several batches may come before one `step`.

    Every `prune_every` steps the schedule says how much may be gone by now; the channels of lowest score are cut,
    weights, gradients and optimizer state included, and training goes on with what is left.

    Args:
        model, example_inputs: as for `compressor.trace`.
        criterion: "relevance", which observes the training; or a name from `compressor.CRITERIA` or a function of a
            group and a snapshot, asked at every cut.
        budget: what is to be gone at the end of the schedule: a number in `[0, 1)`, a share of the parameters, or
            `Budget(0.5, "macs")`. Or `Threshold(0.3)`: at every cut every channel whose score is below; of
            relevance, whose confidence is not above.
        schedule: the share of the budget that is due, over the progress of training; by default cubic, from 10 % of
            it to 65 %.
        optimizer: one or several; their state is sliced along.
        total_steps: how many times `step` will be called in all.
        prune_every: steps between two cuts; a twentieth of the training by default, with relevance as many as it takes
            to tell any channel from chance.
        allocate, round_to, limits, verify: as for `prune`; the groups' own shares follow the schedule too, and cuts are
            verified on the last batch. Allocated "global", relevance counts per what a channel costs in the budget.
        compensate: "linear" moves what the channels that stay predict of a removed one, over `calibration`, into
            their weights and momentum; "mean" folds what it carries on average into the next bias or running mean, over
            the steps that were observed, or over the last batch where the criterion does not observe; "none" does
            neither. None: "linear" where there is `calibration`, else "mean".
        calibration: batches of real inputs, over which "linear" takes its covariances anew before every cut: running
            sums would mix in what the weights of many steps ago made of other inputs.
        copies: models that lose the same channels, as for `compressor.cut`.
        outputs: as for `compressor.trace`.
        seed: for whatever draws.
        relevance: how relevance observes. Left open there: `observe_every` (at least as often as `prune_every` asks
            for), `half_life` (`prune_every`), `warmup` (a twentieth of the training, none for the published method).
        process_group: of the ranks that train the model with DistributedDataParallel, `torch.distributed.group.WORLD`
            for all. Each makes a Pruner of the bare model with the same arguments, has as many samples in a step as the
            others, and wraps the model anew after a cut; what they observed counts together, and rank 0 decides.

    Attributes:
        graph: the channel graph, as it is now.
        steps: how many times `step` was called.
        relevance: what is observed, None with another criterion.

    Raises:
        RangeError, UnknownNameError, InputError: as for `prune`.
        IdleArgumentError: `relevance` with another criterion.
        OptimizerError: the optimizer holds no parameter of the model.
        BudgetError: every channel is frozen; says why.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        criterion: str | Criterion = "relevance",
        budget: Budget | Threshold | float = Budget.sparsity,
        schedule: Schedule = USUAL_SCHEDULE,
        *,
        optimizer: Optimizer | Iterable[Optimizer],
        total_steps: int,
        prune_every: int | None = None,
        allocate: Allocation | None = None,
        round_to: int | None = SelectionOptions.round_to,
        limits: Limits | None = None,
        compensate: Compensation | None = None,
        calibration: Iterable[Any] | None = None,
        verify: bool = False,
        copies: Iterable[nn.Module] = (),
        outputs: Callable[[Any], Any] | None = None,
        seed: int = 0,
        relevance: RelevanceConfig | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.model = model
        self._ranks = Ranks(process_group)
        threshold = budget if isinstance(budget, Threshold) else None
        self.budget = Budget(0.0) if isinstance(budget, Threshold) else Budget.from_share(budget)
        self.steps = 0
        self._samples = 0  # of the step at hand
        if threshold:
            _require_threshold(threshold, criterion, allocate)
        steps = usual_rounding(round_to, threshold)
        selection = SelectionOptions(allocate or SelectionOptions.allocate, steps, aligned=self.budget.aligned)
        if allocate == "relevance" and criterion != "relevance":
            raise InputError(
                f"allocate='relevance' with criterion {criterion!r} needs losses of a trained model: use "
                "compressor.prune, or criterion='relevance'"
            )
        self._calibration = list(calibration or ())
        require_batches(self._calibration, example_inputs)
        self._compensation = _chosen(compensate, self._calibration)
        self._total = _positive("total_steps", total_steps)
        self._schedule = schedule
        self._last = step_of_whole_budget(schedule, total_steps)
        self._period_is_open = prune_every is None  # then the first batch may make it longer
        period = usual_period(total_steps) if prune_every is None else prune_every
        self._prune_every = _positive("prune_every", period)
        if relevance and criterion != "relevance":
            raise IdleArgumentError("relevance", f"criterion {criterion!r}")
        self._config = self._filled_in(relevance or RelevanceConfig())
        self.graph = traced(model, example_inputs, outputs)
        if not self.graph.groups:
            require_reachable(self.graph, self.budget, selection)
        shares = (limits or Limits()).shares(self.graph)
        observing = criterion == "relevance"
        self._options = CutOptions(
            selection,
            shares,
            all_optimizers(optimizer),
            [unwrap_compiled(each) for each in copies],
            verify,
            threshold,
            observing,
        )
        require_alike(named_model_tensors(dict(self.graph.model.named_modules())), self._options.copies)
        require_held(self.graph.model, self._options.optimizers)
        require_followed(self._options.optimizers)
        self._inputs = example_inputs  # of the last batch
        self._progress = PruningProgress(self.graph, self.budget, threshold)
        self._blocked: tuple[str, ...] = ()
        self._generator = torch.Generator().manual_seed(seed)
        self.relevance = None
        if criterion == "relevance":
            self.relevance = Relevance(self.graph, self._config, seed=seed, ranks=self._ranks)
        self._criterion = None if criterion == "relevance" else lookup(criterion)
        self._criterion_name = criterion if isinstance(criterion, str) else _name(criterion)

    def _filled_in(self, config: RelevanceConfig) -> RelevanceConfig:
        """Return the configuration with what was left open, as far as it does not depend on the batches."""
        self._half_life = config.half_life
        warmup = config.warmup
        if warmup is None:
            warmup = 0 if config.estimator == "source" else min(usual_period(self._total, least=0), self._last - 1)
        if warmup >= self._last:
            raise RangeError("warmup", warmup, f"[0, {self._last}): then the whole budget is due")
        return replace(config, warmup=warmup, half_life=config.half_life or self._prune_every)

    def loss(self, inputs: Any, targets: Any, loss_fn: Callable[..., Tensor]) -> Tensor:
        """Return the mean loss of one batch, a scalar to call `backward` on; observes where the criterion does.

        Args:
            inputs: one batch, `(B, ...)`, or a tuple or dict of such, as the model takes them.
            targets: what `loss_fn` compares with.
            loss_fn: like `torch.nn.functional.cross_entropy`: takes outputs, targets and `reduction=`.

        Raises:
            BudgetError: at the first step, if the budget cannot be reached whatever the scores are.
        """
        self._begin(inputs)
        if self.relevance and self._observes():
            # NOTE: A compiled model would not see the gates, which come and go with every batch.
            return self.relevance.loss(self.graph.model, inputs, targets, loss_fn)
        return loss_fn(run_model(self.model, inputs), targets)

    @contextmanager
    def observe(self, inputs: Any) -> Iterator[Callable[[Tensor], Tensor]]:
        """Run your own forward pass of one batch in this `with`, of the traced model itself, not of a compiled one.

        Args:
            inputs: the batch, `(B, ...)`, or a tuple or dict of such.

        Yields:
            A function that takes the losses, `(B,)` or `(B, ...)`, of the samples and returns their mean, to call
            `backward` on. The relevance estimators "gate" and "soft" do without: any loss will do, of any outputs and
            targets, and every batch counts alike. For the others a batch whose losses it does not get is not observed.
        """
        self._begin(inputs)
        if not self.relevance or not self._observes():
            yield Tensor.mean
            return
        with self.relevance.observe(count_samples(inputs)) as observation:

            def mean(losses: Tensor) -> Tensor:
                each = per_sample(losses)
                observation.credit(each)
                return each.mean()

            yield mean

    def _begin(self, inputs: Any) -> None:
        if self.steps == 0:
            require_reachable(self.graph, self.budget, self._options.selection, self._options.shares)
        self._inputs = inputs
        self._samples += count_samples(inputs)  # a step may be made of several batches, one after the other

    def _observes(self) -> bool:
        return self.relevance is not None and self.relevance.draws and self._is_unfinished()

    def _is_unfinished(self) -> bool:
        return self._due(self.steps) < 1

    def step(self) -> dict[str, Any] | None:
        """Count the step as done, and cut if it is time; call it after `optimizer.step()`.

        Writes the model and the optimizers' state.

        Returns:
            What was cut and why, JSON-able, or None where nothing was.

        Raises:
            PeriodError: at the first step, as `require_time`.
            InputError: the ranks came to different cuts, or each to a gradient of its own.
        """
        if self.steps == 0:
            self._require_averaged()
            self.require_time(self._ranks.size * self._samples)
        if self.relevance and self._is_unfinished():
            self.relevance.step()
        before = self._due(self.steps)
        self.steps += 1
        self._samples = 0
        due = self._due(self.steps)
        is_last = before < 1 <= due
        if not due or not (is_last or (self.steps % self._prune_every == 0 and before < 1)):
            return None
        return self._cut(due)

    def require_time(self, batch_size: int) -> None:
        """Raise PeriodError if relevance, in the time that it has, cannot tell any channel from chance.

        Where `observe_every` was left open, samples draw as often as it takes; where `prune_every` was, it becomes as
        long.
        """
        if not self.relevance:
            return
        required = self.relevance.required_steps(batch_size)
        if self._period_is_open and required > self._prune_every:
            logger.info("cuts every %d steps, not %d: it takes so many to tell channels", required, self._prune_every)
            self._prune_every = required
        if self._prune_every < required:
            raise PeriodError(
                "prune_every", self._prune_every, required, batch_size, f"give prune_every = {required} or more"
            )
        if self._last < required:
            what = "the time until the whole budget is due"
            raise PeriodError(what, self._last, required, batch_size, "train longer, or on larger batches")
        self.relevance.set_period(self._prune_every, batch_size, self._half_life or self._prune_every)

    def _require_averaged(self) -> None:
        """Refuse ranks that learn apart: `loss` runs the model itself, where DistributedDataParallel sees nothing."""
        if self._ranks.size == 1:
            return
        gradients = [parameter.grad for parameter in self.graph.model.parameters()]
        norms = torch.tensor([0.0 if each is None else float(each.norm()) for each in gradients])
        for other in self._ranks.objects(norms):
            if not torch.allclose(norms, other, rtol=1e-3, atol=1e-3 * float(norms.max())):
                raise InputError(
                    "the ranks have different gradients: average them after backward(), or make the "
                    "DistributedDataParallel after the Pruner and let it run the model: `with pruner.observe(x) as "
                    "mean: loss = mean(F.cross_entropy(ddp(x), y, reduction='none'))`"
                )

    def _due(self, step: int) -> float:
        return self._schedule(min(step / self._total, 1.0))

    def _cut(self, due: float) -> dict[str, Any] | None:
        widths = self.graph.sizes()
        target = self.budget.scaled(due)
        observed = self.relevance.record() if self.relevance else None
        selection = prune_to_budget(
            self._progress,
            self._scores,
            target,
            self._options,
            due=due,
            means=self._known(),
            normalise=self.relevance is None,
            real_inputs=self._inputs,
        )
        self._ranks.require_alike("channels that stay", selection.keep if selection else {})
        if selection is None:
            return None
        if self.relevance:
            self.relevance.narrow(selection.keep, self.graph)
        self._blocked = selection.blocked
        event = cut_event(self.result(), widths, step=self.steps, target=target.sparsity)
        return event | {"observed": observed} if event and observed else event

    def _known(self) -> Mapping[str, Tensor] | Moments | None:
        """Return what is known of the consumers' inputs, as far as compensation asks for it."""
        if self.relevance and self._compensation == "mean":
            return self.relevance.means()
        return KNOWN[self._compensation](self.graph, self._calibration or [self._ranks.gathered(self._inputs)])

    def _scores(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        # Rank 0 decides: elsewhere a last bit may differ, and with it who is last.
        return self._ranks.of_the_first(self._own_scores(groups))

    def _own_scores(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        if self.relevance and self._options.threshold:
            return self.relevance.confidence()
        if self.relevance:
            return relevance_scores(self.relevance, self.graph, self.budget.measure, self._config.confidence)
        assert self._criterion
        return score(self._criterion, groups, Snapshot.from_model(self.graph.model, self._generator))

    def result(self) -> PruneResult:
        """Return what has been removed so far, against the whole budget."""
        return self._progress.result(self.budget, self._blocked)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the model and the optimizers: plain numbers, strings and tensors."""
        return {
            "criterion": self._criterion_name,
            "step": self.steps,
            "prune_every": self._prune_every,
            "progress": self._progress.state_dict(),
            "blocked": list(self._blocked),
            "generator": self._generator.get_state(),
            "relevance": self.relevance.state_dict() if self.relevance else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; the model must have been narrowed to its shapes before this pruner was made.

        Raises:
            InputError: it was not, or the state is that of another criterion, or of no Pruner.
        """
        if state.get("criterion") != self._criterion_name:
            raise InputError(
                f"the state to go on with is of criterion {state.get('criterion')!r}, and this Pruner's is "
                f"{self._criterion_name!r}: make it with the same"
            )
        widths = state["progress"]["sizes"]
        differs = [name for name, size in self.graph.sizes().items() if name in widths and size != widths[name]]
        if differs:
            name = differs[0]
            raise InputError(
                f"group {name!r} has {self.graph.sizes()[name]} channels, {widths[name]} in the state to go on with: "
                "load the pruned model of that moment first, then make the Pruner"
            )
        self.steps = int(state["step"])
        self._prune_every = int(state["prune_every"])
        self._blocked = tuple(state["blocked"])
        self._progress.load_state_dict(state["progress"])
        self._generator.set_state(state["generator"])
        stuck = [name for name in self.graph.sizes() if name not in state["progress"]["widths"]]
        self.graph.freeze(stuck, "frozen before the run was interrupted")
        if self.relevance:
            self.relevance.load_state_dict(state["relevance"])


def _chosen(compensate: Compensation | None, calibration: Sequence[Any]) -> Compensation:
    """Return how to compensate, if real inputs are there where they are needed, and only there."""
    if compensate is None:
        return "linear" if calibration else "mean"
    require_compensation(compensate)
    if compensate == "linear" and not calibration:
        raise InputError("compensate='linear' needs real inputs: pass calibration=[inputs, ...], or compensate='mean'")
    if calibration and compensate != "linear":
        raise IdleArgumentError("calibration", f"compensate={compensate!r}")
    return compensate


def _name(criterion: Criterion) -> str:
    """Return what a function of one's own is called, or its class where it is an object."""
    return str(getattr(criterion, "__qualname__", type(criterion).__qualname__))


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise RangeError(name, value, "1, 2, 3, ... steps")
    return value


def _require_threshold(threshold: Threshold, criterion: object, allocate: str | None) -> None:
    """Refuse a threshold that the criterion's scores do not fit, or an allocation beside it."""
    threshold.require_unit(criterion)
    if criterion == "relevance" and not 0 < threshold.value <= 1:
        raise RangeError("threshold", threshold.value, "(0, 1]: it is a confidence")
    if allocate is not None:
        raise IdleArgumentError("allocate", "a threshold")
