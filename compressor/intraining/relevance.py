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
from compressor.graph.group import ChannelGraph
from compressor.intraining.estimators import ESTIMATORS, Step
from compressor.intraining.observation import Observation
from compressor.intraining.statistics import Increment, RunningMean, drawn, p_values, rank_correlation
from compressor.masks import Gates


class Relevance:
    """Watches training steps and scores the channels by the loss that they save.

    Args:
        graph: the channel graph of the model that trains, on its device. Groups whose consumers show no input cannot
            be watched and are frozen.
        estimator: "soft" ranks by the finite effect from gate gradients; "loss" by the losses themselves; "gate" by
            squared gate gradients, which add up when many channels go; "source" is the published method.
        drop: the share of channels that a sample draws, in (0, 0.5]; rounded so that `1 / drop` is a whole number.
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
        estimator: str = "soft",
        drop: float = 0.15,
        dummies: int = 100,
        half_life: float = 100.0,
        seed: int = 0,
    ) -> None:
        _check(estimator, drop, dummies, half_life)
        self.estimator, self.steps = estimator, 0
        self._how, self._count, self._dummies_each = ESTIMATORS[estimator], round(1 / drop), dummies
        self._graph, self._half_life = graph, half_life
        self._gates = _watching(graph, half_life)
        parameter = next(graph.model.parameters())
        self._device, self._dtype = parameter.device, torch.promote_types(parameter.dtype, torch.float32)
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self._pending: list[Observation] = []
        self._lay_out()
        channels, groups = len(self._group_of), len(self._gates.sizes)
        columns = channels if self._how.soft else groups
        self._means = {
            "relevance": RunningMean(channels, parts=2, device=self._device),
            "dummies": RunningMean(dummies, columns, device=self._device),
            "draws": RunningMean(channels, device=self._device),
            "level": RunningMean(device=self._device),
            "variance": RunningMean(device=self._device),
        }
        if self._how.rank:
            self._means["rank"] = RunningMean(channels, parts=2, device=self._device)

    def _lay_out(self) -> None:
        """Note the group of every channel, `(N,)`, and of every column that is drawn."""
        sizes = torch.tensor(list(self._gates.sizes.values()), device=self._device)
        groups = torch.arange(len(sizes), device=self._device)
        self._group_of = groups.repeat_interleave(sizes)
        dummies = groups.repeat(0 if self._how.soft else self._dummies_each)
        self._drawn_of = torch.cat([self._group_of, dummies])

    # -- one step

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: Callable[..., Tensor]) -> Tensor:
        """Run one batch under the gates and give its mean loss, a scalar to call `backward` on; then call `update`.

        Args:
            model: the traced model or a wrapper around it, in training mode.
            inputs: `(B, ...)`.
            targets: `(B, ...)`.
            loss_fn: like `torch.nn.functional.cross_entropy`: takes outputs, targets and `reduction=`.

        Raises:
            InputError: a loss that is not one per sample, a model in evaluation mode or that was not traced.
        """
        with self.observing(len(inputs)) as observation:
            losses = loss_fn(model(inputs), targets, reduction="none")
            losses = losses.flatten(1).mean(1) if losses.dim() > 1 else losses
            observation.credit(losses)
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
        draw = drawn(self._drawn_of, self._count, drawing, self._generator).expand(batch, -1)
        out = draw[:, : len(self._group_of)]
        gates = torch.zeros(out.shape, dtype=self._dtype, device=self._device)
        if self._how.soft:
            gates.uniform_(generator=self._generator)
        return Observation(gates.masked_fill_(~out, 1.0).requires_grad_(self._how.soft), draw)

    @torch.no_grad()
    def update(self) -> None:
        """Take in what the batches since the last update showed; call it after `backward`.

        Raises:
            InputError: there was no batch, or no backward pass.
        """
        pending, self._pending = self._pending, []
        if not pending:
            raise InputError("update() came without a batch: call loss(...) and backward() first")
        for observation in pending:
            step = self._measured(observation)
            relevance = self._how.measure(step)
            channels = len(self._group_of)
            self._add("relevance", Increment(relevance.totals[:channels], relevance.weights[:channels]))
            self._add("dummies", self._chance(relevance))
            self._add("draws", _sum(step.draw[:, :channels].sum(0)))
            if self._how.rank:
                self._add("rank", self._how.rank(step))
            self.steps += 1

    def _add(self, name: str, increment: Increment) -> None:
        self._means[name].add(self.steps, increment, 0.5 ** (1 / self._half_life))

    def _chance(self, relevance: Increment) -> Increment:
        """Give what the dummies add: those that were drawn along, or channels' own increments with random signs."""
        if self._how.soft:
            return relevance.signed(self._dummies_each, self._generator)
        drawn_along = slice(len(self._group_of), None)
        shape = (self._dummies_each, -1)
        return Increment(relevance.totals[drawn_along].view(shape), relevance.weights[drawn_along].view(shape))

    def _measured(self, observation: Observation) -> Step:
        """Bring one batch into units of the running deviation, and the deviation up to date."""
        assert observation.losses is not None
        losses = observation.losses.to(self._dtype)
        gradients = observation.gradients() if self._how.soft else torch.zeros_like(observation.gates)
        level = self._means["level"]
        surprise = torch.where(level.weights[0] > 0, losses.mean() - level.mean(), 0.0)
        self._add("level", _sum(losses.mean()))
        centred = losses - losses.mean() if self._how.per_sample else surprise.expand(1)
        freedom = len(losses) - 1 if self._how.per_sample else (level.weights[0] > 1).to(losses)
        self._add("variance", Increment(centred.square().sum(), torch.as_tensor(freedom, device=losses.device)))
        deviation = self._means["variance"].mean().sqrt()
        unit = torch.where(deviation > 0, 1 / deviation, 0.0)
        return Step(losses * unit, surprise * unit, observation.draw, gradients * unit)

    # -- what is known

    def scores(self) -> dict[str, Tensor]:
        """Give `(C,)` float32 by group name, larger means keep: what ranks the channels, comparable between groups.

        Relevance in deviations of the loss; for the estimator "gate" half the mean square of its slope.
        """
        ranking = self._means["rank"].mean() if "rank" in self._means else self._above_chance()
        return self._by_group(ranking)

    def _above_chance(self) -> Tensor:
        # NOTE: Subsets of fixed size make relevance a contrast with the other channels; the dummies shift alike.
        return self._means["relevance"].mean() - self._dummies().mean(0)

    def _dummies(self) -> Tensor:
        """Give the dummies that each channel is compared with, `(D, N)`."""
        dummies = self._means["dummies"].mean()
        return dummies if self._how.soft else dummies[:, self._group_of]

    def _by_group(self, values: Tensor) -> dict[str, Tensor]:
        return self._gates.split(values.float())

    def p_values(self) -> dict[str, Tensor]:
        """Give `(C,)` by group name: how surely a channel saves more loss than a dummy; larger means more surely."""
        return self._by_group(p_values(self._means["relevance"].mean(), self._dummies()))

    def reliability(self) -> dict[str, float]:
        """Give by group name how well two halves of the steps agree on the ranking: their rank correlation.

        It is not corrected for the halves' length (Spearman-Brown). Below 0.3 the ranking is as good as random.
        """
        first, second = self._means["rank" if "rank" in self._means else "relevance"].halves()
        pairs = zip(self._gates.split(first).items(), self._gates.split(second).values(), strict=True)
        return {name: rank_correlation(one, other) for (name, one), other in pairs}

    def means(self) -> dict[str, Tensor]:
        """Give the running mean of every consumer's input, `(D,)` by weight name: what a cut folds."""
        return self._gates.means()

    def record(self) -> dict[str, Any]:
        """Give a JSON-able summary by group name.

        `r` and `p` of every channel; over the group the mean number of samples that drew a channel (`n`, forgotten ones
        counted in part), the dummies' mean and spread, and the reliability of the ranking.
        """
        relevance, p = self._by_group(self._means["relevance"].mean()), self.p_values()
        centre, spread = self._by_group(self._dummies().mean(0)), self._by_group(self._dummies().std(0))
        draws, reliability = self._by_group(self._means["draws"].totals[0]), self.reliability()
        return {
            name: {
                "r": _rounded(relevance[name]),
                "p": _rounded(p[name]),
                "n": round(float(draws[name].mean()), 1),
                "dummies_mean": float(centre[name].mean()),
                "dummies_spread": float(spread[name].mean()),
                "reliability": reliability[name],
            }
            for name in self._gates.sizes
        }

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
        for name, mean in self._means.items():
            if name in ("relevance", "draws", "rank"):
                mean.narrow(columns)
        self._means["dummies"].narrow(columns if self._how.soft else groups)
        self._graph, self._gates, self._pending = graph, after, []
        self._lay_out()

    def state_dict(self) -> dict[str, Any]:
        """Give everything that is needed to go on later, as plain tensors and numbers; batches under way are not."""
        return {
            "steps": self.steps,
            "estimator": self.estimator,
            "dummies": self._dummies_each,
            "sizes": dict(self._gates.sizes),
            "means": {name: mean.state_dict() for name, mean in self._means.items()},
            "gates": self._gates.state_dict(),
            "generator": self._generator.get_state(),
        }

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
        self._gates = Gates(self._graph, half_life=self._half_life)
        self._lay_out()
        for name, mean in self._means.items():
            mean.load_state_dict(state["means"][name])
        self._gates.load_state_dict(state["gates"])
        self._generator.set_state(state["generator"].cpu())
        self.steps, self._pending = int(state["steps"]), []


def _sum(values: Tensor) -> Increment:
    return Increment(values.float(), torch.ones_like(values, dtype=torch.float32))


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


def _watching(graph: ChannelGraph, half_life: float) -> Gates:
    """Give gates for every group that can be watched; the others are frozen."""
    gates = Gates(graph, half_life=half_life)
    unseen = [name for name in graph.sizes() if name not in gates.sizes]
    graph.freeze(unseen, "no module sees these channels at its input, so relevance cannot watch them")
    return gates


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


def _check(estimator: str, drop: float, dummies: int, half_life: float) -> None:
    if estimator not in ESTIMATORS:
        raise UnknownNameError("relevance estimator", estimator, ESTIMATORS)
    if not 0 < drop <= 0.5:
        raise RangeError("drop", drop, "(0, 0.5]")
    if dummies < 10:
        raise RangeError("dummies", dummies, "10, 11, ...; 100 are usual")
    if not half_life > 0:
        raise RangeError("half_life", half_life, "(0, inf) steps")
