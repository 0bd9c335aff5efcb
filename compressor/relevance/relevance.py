"""Relevance: the loss that a channel saves, gathered from the training steps themselves.

In every step each sample draws a random share of the channels. They are excluded, wholly or in part, where consumers
see them, and the step trains with what is left. Its own losses and gate gradients are the observations. Dummies,
channels without any effect, are credited in the same way; a channel is relevant if it stands out from them.

    relevance = Relevance(graph)
    relevance.loss(model, x, y, F.cross_entropy).backward()
    optimizer.step()
    relevance.update()

Source: Novikov & Buryak (Moscow State University), after Räsänen & Pohjalainen, Interspeech 2013. The estimator
`source` is theirs; what the others do differently stands in `estimators.py` and `statistics.py`.

Shape letters: B samples; C channels of a group; N channels of all groups, side by side; G groups; D dummies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import InputError, RangeError, UnknownNameError
from compressor.graph import ChannelGraph
from compressor.relevance.draws import thinned
from compressor.relevance.estimators import ESTIMATORS, Step
from compressor.relevance.evidence import Evidence
from compressor.relevance.gates import Gates
from compressor.relevance.observation import Observation, leaving_no_trace, per_sample
from compressor.relevance.schedule import Pace, needed_batches
from compressor.relevance.statistics import ControlVariate, Increment, RunningMean, rank_correlation

TRACK_EVERY = 8  # steps; on one in so many the means of the inputs are taken, which reads them all
CONTROL_EVERY = 4  # batches under gates; on one in so many the samples also run without, a third of a step's work
DECIDE_EVERY = 10  # batches under gates; after so many it is looked up which channels are relevant beyond doubt
RELEVANT_RATE = 0.5  # these are drawn so much less often than the undecided ones


class Relevance:
    """Watches training steps and scores the channels by the loss that they save.

    Args:
        graph: the channel graph of the model that trains, on its device. Groups whose consumers show no input cannot
            be watched and are frozen.
        estimator: "gate" ranks by squared gate gradients, which add up when many channels go; "soft" by the finite
            effect of each channel alone; "loss" by the losses themselves; "mixed" is "soft", corrected by the losses;
            "source" is the published method.
        drop: the share of channels that a sample draws, in (0, 0.5]; rounded so that `1 / drop` is a whole number.
        delta: a channel whose p-value is above this counts as relevant, in (0, 1]. It is then drawn half as often, so
            that the undecided ones get the samples (not by "source", which draws all alike).
        observe_every: on one step in so many samples draw; the others train as they would. By default one in eight
            where gradients tell, or more often if `keep_pace` asks for it; every step where losses tell ("loss",
            "source").
        warmup: steps over which the share rises from 0 to `drop`.
        dummies: channels without effect per group, at least 10.
        half_life: steps after which an observation counts half; about one period between cuts.
        seed: of the draws.

    Raises:
        UnknownNameError: an estimator that does not exist.
        RangeError: a number out of its range.
        InputError: a graph in which no group can be watched.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        *,
        estimator: str = "gate",
        drop: float = 0.05,
        delta: float = 0.99,
        observe_every: int | None = None,
        warmup: int = 0,
        dummies: int = 100,
        half_life: float = 100.0,
        seed: int = 0,
    ) -> None:
        _check(estimator, drop, delta, dummies)
        self.estimator, self.steps, self._batches = estimator, 0, 0
        self._how, self._count, self._dummies_each = ESTIMATORS[estimator], round(1 / drop), dummies
        self._graph, self._delta = graph, delta
        self._pace = Pace.of(observe_every, self._how.observe_every, warmup, half_life)
        self._gates = self._watching()
        parameter = next(graph.model.parameters())
        self._device, self._dtype = parameter.device, torch.promote_types(parameter.dtype, torch.float32)
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self._pending: list[Observation] = []
        self._lay_out()
        self._evidence = Evidence(self._how, self._group_of, dummies)
        self._relevant = torch.zeros(len(self._group_of), dtype=torch.bool, device=self._device)
        self._level, self._variance = RunningMean(device=self._device), RunningMean(device=self._device)
        self._control = ControlVariate(self._device)

    def _lay_out(self) -> None:
        """Note the group of every channel, `(N,)`, and of every column that is drawn."""
        sizes = torch.tensor(list(self._gates.sizes.values()), device=self._device)
        groups = torch.arange(len(sizes), device=self._device)
        self._group_of = groups.repeat_interleave(sizes)
        dummies = groups.repeat(0 if self._how.soft else self._dummies_each)
        self._drawn_of = torch.cat([self._group_of, dummies])

    def _watching(self) -> Gates:
        """Give gates for every group that can be watched; the others are frozen."""
        gates = Gates(self._graph, half_life=self._pace.half_life_in_batches, track_every=self._track_every)
        unseen = [name for name in self._graph.sizes() if name not in gates.sizes]
        self._graph.freeze(unseen, "no module sees these channels at its input, so relevance cannot watch them")
        return gates

    @property
    def _track_every(self) -> int:
        return max(1, TRACK_EVERY // self._pace.every)

    # -- one step

    @property
    def draws(self) -> bool:
        """Whether samples draw in this step."""
        return self._pace.draws(self.steps)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: Callable[..., Tensor]) -> Tensor:
        """Run one batch, under gates if it is time, and give its mean loss to call `backward` on; then call `update`.

        Args:
            model: the traced model or a wrapper around it, in training mode.
            inputs: `(B, ...)`.
            targets: `(B, ...)`.
            loss_fn: like `torch.nn.functional.cross_entropy`: takes outputs, targets and `reduction=`.

        Raises:
            InputError: a loss that is not one per sample, a model in evaluation mode or that was not traced.
        """
        if not self.draws:
            return loss_fn(model(inputs), targets)
        ungated = None
        if self._how.controlled and (self._batches + len(self._pending)) % CONTROL_EVERY == 0:
            with leaving_no_trace(model):
                ungated = per_sample(loss_fn(model(inputs), targets, reduction="none"))
        with self.observing(len(inputs)) as observation:
            losses = per_sample(loss_fn(model(inputs), targets, reduction="none"))
            observation.credit(losses, ungated)
        return losses.mean()

    @contextmanager
    def observing(self, batch_size: int) -> Iterator[Observation]:
        """Run the forward pass of one batch in this `with`, for a loop of one's own; call `credit` with the losses.

        Gates and hooks are gone afterwards, whatever happened. A batch that was not credited is forgotten.
        """
        observation = self._drawn(batch_size)
        with self._gates.applied(observation.gates, self._how.towards_mean) as observation.reached:
            yield observation
        if observation.losses is not None:
            self._pending.append(observation)

    def _drawn(self, batch: int) -> Observation:
        drawing = batch if self._how.per_sample else 1
        draw = self._how.draw(self._drawn_of, self._count, drawing, self._generator)
        draw = thinned(draw, self._count, self._rate(), self._generator).expand(batch, -1)
        out = draw[:, : len(self._group_of)]
        gates = torch.zeros(out.shape, dtype=self._dtype, device=self._device)
        if self._how.soft:
            gates.uniform_(generator=self._generator)
        return Observation(gates.masked_fill_(~out, 1.0).requires_grad_(self._how.soft), draw)

    def _rate(self) -> Tensor:
        """Give the share of its draws that every column takes up now: less in the warm-up, half if it is decided."""
        rate = torch.ones(len(self._drawn_of), device=self._device)
        if self._how.per_sample:
            rate[: len(self._group_of)][self._relevant] = RELEVANT_RATE
        return rate * self._pace.share(self.steps)

    @torch.no_grad()
    def update(self) -> None:
        """Count one step as done, and take in what its batches showed; call it after `backward`.

        Raises:
            InputError: there was no batch, or no backward pass.
        """
        pending, self._pending = self._pending, []
        if not pending and self.draws:
            raise InputError("update() came without a batch: call loss(...) and backward() first")
        for observation in pending:
            self._evidence.add(self._batches, self._measured(observation), self._pace.decay, self._generator)
            self._batches += 1
            if self._batches % DECIDE_EVERY == 0:
                self._relevant = self._evidence.p_values() > self._delta
        self.steps += 1

    def _measured(self, observation: Observation) -> Step:
        """Bring one batch into units of the running deviation, and the deviation up to date."""
        assert observation.losses is not None
        losses = observation.losses.to(self._dtype)
        gradients = observation.gradients() if self._how.soft else torch.zeros_like(observation.gates)
        surprise, unit = self._learned_scale(losses)
        noise, controlled = torch.ones_like(unit), observation.ungated is not None
        if observation.ungated is not None:
            losses, noise = self._control.reduce(losses, observation.ungated.to(losses), self._pace.decay)
        return Step(
            losses=losses * unit,
            noise=noise,
            controlled=controlled,
            surprise=surprise * unit,
            draw=observation.draw,
            gates=observation.gates.detach(),
            gradients=gradients * unit,
            factor=self._evidence.factor(controlled),
        )

    def _learned_scale(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Give the mean loss above its running mean, and one over the running deviation; then the means go on."""
        level = self._level
        surprise = torch.where(level.weights[0] > 0, losses.mean() - level.mean(), 0.0)
        centred = losses - losses.mean() if self._how.per_sample else surprise.expand(1)
        freedom = len(losses) - 1 if self._how.per_sample else (level.weights[0] > 1).to(losses)
        level.add(self._batches, Increment(losses.mean(), torch.ones_like(surprise)), self._pace.decay)
        squares = Increment(centred.square().sum(), torch.as_tensor(freedom, device=losses.device))
        self._variance.add(self._batches, squares, self._pace.decay)
        deviation = self._variance.mean().sqrt()
        return surprise, torch.where(deviation > 0, 1 / deviation, 0.0)

    # -- what is known

    def scores(self) -> dict[str, Tensor]:
        """Give `(C,)` float32 by group name, larger means keep: what ranks the channels, comparable between groups.

        Relevance in deviations of the loss; for the estimator "gate" half the mean square of its slope.
        """
        return self._by_group(self._evidence.ranking())

    def _by_group(self, values: Tensor) -> dict[str, Tensor]:
        return self._gates.split(values.float())

    def p_values(self) -> dict[str, Tensor]:
        """Give `(C,)` by group name: how surely a channel saves more loss than a dummy; larger means more surely."""
        return self._by_group(self._evidence.p_values())

    def undecided(self) -> dict[str, Tensor]:
        """Give `(C,)` bool by group name: channels that cannot be told from chance, `1 - delta <= p <= delta`."""
        return {name: (p <= self._delta) & (p >= 1 - self._delta) for name, p in self.p_values().items()}

    def reliability(self) -> dict[str, float]:
        """Give by group name how well two halves of the steps agree on the ranking: their rank correlation.

        It is not corrected for the halves' length (Spearman-Brown). Below 0.3 the ranking is as good as random.
        """
        first, second = (self._gates.split(half) for half in self._evidence.halves())
        return {name: rank_correlation(one, second[name]) for name, one in first.items()}

    def means(self) -> dict[str, Tensor]:
        """Give the running mean of every consumer's input, `(D,)` by weight name: what a cut folds."""
        return self._gates.means()

    def record(self) -> dict[str, Any]:
        """Give a JSON-able summary by group name.

        Of every channel its relevance `r`, its `p`, and the number of samples that drew it (`n`, forgotten ones counted
        in part); of its dummies the mean and the spread. Over the group the number of undecided channels, and the
        reliability of the ranking.
        """
        columns = {key: self._by_group(values) for key, values in self._evidence.record().items()}
        undecided, reliability = self.undecided(), self.reliability()
        return {
            name: {key: _rounded(groups[name]) for key, groups in columns.items()}
            | {"undecided": int(undecided[name].sum()), "reliability": reliability[name]}
            for name in self._gates.sizes
        }

    def needed_steps(self, batch_size: int) -> int:
        """Give how many steps it takes at least to resolve a channel that saves one deviation of the loss."""
        return self._pace.least * self._needed_batches(batch_size)

    def _needed_batches(self, batch_size: int) -> int:
        # NOTE: For "source" one batch is one observation.
        return needed_batches(batch_size if self._how.per_sample else 1, 1 / self._count, self._delta)

    def keep_pace(self, period: int, batch_size: int, half_life: float) -> None:
        """Draw often enough to resolve in `period` steps what can be resolved, if `observe_every` was left open.

        Args:
            period: steps between two cuts, at least `needed_steps`.
            batch_size: samples in a step.
            half_life: from now on.
        """
        self._pace.fit(period, self._needed_batches(batch_size), half_life)
        self._gates.half_life, self._gates.track_every = self._pace.half_life_in_batches, self._track_every

    # -- cuts and checkpoints

    def narrow(self, keep: Mapping[str, Tensor], graph: ChannelGraph) -> None:
        """Forget the channels that were cut, and the groups that were frozen.

        Args:
            keep: by group name, the channels that stayed, `(n,)`, sorted, as `compressor.cut` keeps them.
            graph: the graph after the cut.

        Raises:
            InputError: `keep` does not lead to this graph. Nothing was changed.
        """
        before = self._gates.split(torch.arange(len(self._group_of), device=self._device))
        after = self._gates.narrowed(keep, graph)
        stays = [_kept(before, keep, name, size) for name, size in after.sizes.items()]
        columns, names = torch.cat(stays), list(before)
        groups = torch.tensor([names.index(name) for name in after.sizes], device=self._device)
        self._graph, self._gates, self._pending = graph, after, []
        self._lay_out()
        self._evidence.narrow(columns, groups, self._group_of)
        self._relevant = self._relevant[columns]

    def state_dict(self) -> dict[str, Any]:
        """Give everything that is needed to go on later, as plain tensors and numbers; batches under way are not."""
        return {
            "steps": self.steps,
            "batches": self._batches,
            "estimator": self.estimator,
            "observe_every": self._pace.every,
            "dummies": self._dummies_each,
            "half_life": self._pace.half_life,
            "sizes": dict(self._gates.sizes),
            "evidence": self._evidence.state_dict(),
            "running": {name: mean.state_dict() for name, mean in self._running().items()},
            "gates": self._gates.state_dict(),
            "relevant": self._relevant.clone(),
            "generator": self._generator.get_state(),
        }

    def _running(self) -> dict[str, RunningMean]:
        means = {"level": self._level, "variance": self._variance}
        return means | {"control": self._control.slope, "rest": self._control.rest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`. Groups that it does not know had been frozen, and are frozen again.

        Raises:
            InputError: the state is of another estimator, or of a model with other groups. Nothing was changed.
        """
        sizes = {name: size for name, size in self._gates.sizes.items() if name in state["sizes"]}
        mine = {"estimator": self.estimator, "dummies": self._dummies_each, "sizes": sizes}
        for name, value in mine.items():
            if state[name] != value:
                raise InputError(f"this state is of {name} {state[name]}, not {value}: make Relevance as it was made")
        self._graph.freeze(self._gates.sizes.keys() - sizes.keys(), "frozen before the run was interrupted")
        self._pace.half_life, self._pace.every = state["half_life"], int(state["observe_every"])
        self._gates = self._watching()
        self._lay_out()
        self._evidence = Evidence(self._how, self._group_of, self._dummies_each)
        self._evidence.load_state_dict(state["evidence"])
        for name, mean in self._running().items():
            mean.load_state_dict(state["running"][name])
        self._gates.load_state_dict(state["gates"])
        self._relevant = state["relevant"].to(self._device, copy=True)
        self._generator.set_state(state["generator"].cpu())
        self.steps, self._batches, self._pending = int(state["steps"]), int(state["batches"]), []


def _kept(before: Mapping[str, Tensor], keep: Mapping[str, Tensor], name: str, size: int) -> Tensor:
    """Give the old columns of the channels that a group has now, `(size,)`."""
    if name not in before:
        raise InputError(f"group {name!r} was not watched before the cut: make a new Relevance for this graph")
    columns = before[name][keep[name].to(before[name].device)] if name in keep else before[name]
    if len(columns) != size:
        raise InputError(
            f"keep leaves {len(columns)} channels of group {name!r}, the graph has {size}: pass both of one cut"
        )
    return columns


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


def _check(estimator: str, drop: float, delta: float, dummies: int) -> None:
    if estimator not in ESTIMATORS:
        raise UnknownNameError("relevance estimator", estimator, ESTIMATORS)
    if not 0 < drop <= 0.5:
        raise RangeError("drop", drop, "(0, 0.5]")
    if not 0 < delta <= 1:
        raise RangeError("delta", delta, "(0, 1]")
    if dummies < 10:
        raise RangeError("dummies", dummies, "10, 11, ...; 100 are usual")
