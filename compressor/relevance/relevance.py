"""Relevance: the loss that a channel saves, gathered from the training steps themselves.

In every step each sample draws a random share of the channels. They are excluded, wholly or in part, where consumers
see them, and the step trains with what is left. Its own losses and gate gradients are the observations. Dummies,
channels without any effect, are credited in the same way; a channel is relevant if it stands out from them.

    relevance = Relevance(graph)
    relevance.loss(model, x, y, F.cross_entropy).backward()
    optimizer.step()
    relevance.step()

Source: Novikov & Buryak (Moscow State University), after Räsänen & Pohjalainen, Interspeech 2013. The estimator
`source` is theirs; what the others do differently stands in `estimators.py` and `statistics.py`.

Shape letters: B samples; C channels of a group; N channels of all groups, side by side; G groups; D dummies.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor._utils import Ranks, count_samples, require_reduction, run_model
from compressor.errors import InputError
from compressor.graph import ChannelGraph
from compressor.relevance.config import RelevanceConfig
from compressor.relevance.estimators import ESTIMATORS
from compressor.relevance.evidence import Evidence
from compressor.relevance.gates import Gates
from compressor.relevance.loss_scale import LossScale
from compressor.relevance.observation import Observation, per_sample, preserve_buffers_and_rng
from compressor.relevance.reliability import split_half_reliability, warn_if_unreliable
from compressor.relevance.sampling import ChannelSampler, kept_columns
from compressor.relevance.schedule import ObservationSchedule

_ROUNDING = 1e-4  # by which two means of the same losses may differ
TRACK_EVERY = 8  # steps; on one in so many the means of the inputs are taken, which reads them all
CONTROL_EVERY = 4  # batches under gates; on one in so many the samples also run without, a third of a step's work
DECIDE_EVERY = 10  # batches under gates; after so many it is looked up which channels are relevant beyond doubt
logger = logging.getLogger(__name__)


class Relevance:
    """Watches training steps and scores the channels by the loss that they save.

    Args:
        graph: the channel graph of the model that trains, on its device. Groups whose consumers show no input cannot
            be watched and are frozen.
        config: what is observed and concluded. A half-life that is left open is 100 steps here, a warm-up 0.
        seed: of the draws.
        ranks: the processes that train the model together; each shows its part of every batch.

    Attributes:
        graph, config: as given; the graph of the last cut.
        steps: training steps so far.

    Raises:
        InputError: a graph in which no group can be watched.
    """

    def __init__(
        self, graph: ChannelGraph, config: RelevanceConfig | None = None, *, seed: int = 0, ranks: Ranks | None = None
    ) -> None:
        self.graph = graph
        self.config = config or RelevanceConfig()
        self.steps = 0
        self._ranks = ranks or Ranks()
        self._estimator = ESTIMATORS[self.config.estimator]
        self._schedule = ObservationSchedule.from_config(self.config)
        self._gates = self._watch_groups()
        parameter = next(graph.model.parameters())
        # Gates are float32 at least: under autocast the losses' sums would drown in half precision.
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        generator = torch.Generator(parameter.device).manual_seed(seed)
        self._sampler = ChannelSampler(self.config, self._gates.sizes.values(), generator, dtype)
        self._evidence = Evidence(self._estimator, self._sampler.group_of, self.config.dummies)
        self._scale = LossScale(self._estimator, parameter.device)
        self._pending: list[Observation] = []
        self._left_out = False  # whether a batch of this step was forgotten
        self._batches = 0

    def _watch_groups(self) -> Gates:
        """Return gates for every group that can be watched; the others are frozen."""
        gates = Gates(
            self.graph,
            half_life=self._schedule.half_life_in_batches,
            track_every=self._track_every,
            exclude=self.config.exclude or self._estimator.exclude,
        )
        unseen = [name for name in self.graph.sizes() if name not in gates.sizes]
        reason = "no module sees these channels at its input, so relevance cannot watch them"
        if unseen:
            logger.warning("frozen: %s: %s", ", ".join(unseen), reason)
        self.graph.freeze(unseen, reason)
        return gates

    @property
    def _track_every(self) -> int:
        return max(1, TRACK_EVERY // self._schedule.every)

    # -- one step

    @property
    def draws(self) -> bool:
        """Whether samples draw in this step."""
        return self._schedule.draws(self.steps)

    def loss(self, model: nn.Module, inputs: Any, targets: Any, loss_fn: Callable[..., Tensor]) -> Tensor:
        """Return the mean loss of one batch, run under gates if it is time, to call `backward` on; then call `step`.

        Args:
            model: the traced model or a wrapper around it, in training mode.
            inputs: `(B, ...)`, or a tuple or dict of such.
            targets: what `loss_fn` compares with.
            loss_fn: like `torch.nn.functional.cross_entropy`: takes outputs, targets and `reduction=`.

        Raises:
            InputError: a loss that is not one per sample or takes no `reduction=`; a model in evaluation mode, or one
                that was not traced.
        """
        if not self.draws:
            return loss_fn(run_model(model, inputs), targets)
        require_reduction(loss_fn)
        ungated = None
        if self._estimator.control_variate and (self._batches + len(self._pending)) % CONTROL_EVERY == 0:
            # Before the gated run, which then draws the same dropout: two runs that differ in it as well tell less.
            with preserve_buffers_and_rng(model):
                ungated = per_sample(loss_fn(run_model(model, inputs), targets, reduction="none"))
        with self.observe(count_samples(inputs)) as observation:
            outputs = run_model(model, inputs)
            losses = per_sample(loss_fn(outputs, targets, reduction="none"))
            observation.credit(losses, ungated)
        with torch.no_grad():
            scale = loss_fn(outputs, targets) / losses.mean()
        # With weights of classes, or targets that are ignored, a mean loss is over another number than that of samples:
        # of 100 pixels of which 75 are ignored, over 25.
        is_another = scale.isfinite() & ((scale - 1).abs() > _ROUNDING)
        return losses.mean() * torch.where(is_another, scale, 1.0)

    @contextmanager
    def observe(self, batch_size: int) -> Iterator[Observation]:
        """Run the forward pass of one batch in this `with`, for a loop of one's own; call `credit` with the losses.

        Gates and hooks are gone afterwards, whatever happened. A batch that was not credited is forgotten by estimators
        that read losses; "gate" and "soft" take its gradients alone, of whatever `backward()` starts from.
        """
        if self._gates.awaits_backward and self._pending and self._pending[-1].awaits_backward:
            raise InputError(
                "the model runs under torch.utils.checkpoint, and the batch before this one has not had its backward "
                "pass: call backward() after every batch, also where gradients are accumulated"
            )
        observation = self._sampler.sample(batch_size, self._schedule.share(self.steps), self._ranks)
        gating = self._gates.applied(observation.gates)
        with gating as observation.gated_modules:
            yield observation
        if self._gates.unseen:
            self._leave_out_unseen()
        elif observation.losses is not None or (observation.gated_modules and not self._estimator.reads_losses):
            self._pending.append(observation)

    def _leave_out_unseen(self) -> None:
        """Freeze the groups that the batch did not show sample by sample, and forget it: its gates were not all there.

        Boxes of all images in one dimension, say: nobody could tell whose loss a gate there would change. Where rows
        turn out to belong to samples, as those of windows do, the next batch is gated there.
        """
        self._left_out = True
        if self._gates.find_samples():
            return
        if len(self._gates.unseen) == len(self._gates.sizes):
            raise InputError(f"{next(iter(self._gates.unseen.values()))}; the same holds for every group")
        for name, reason in self._gates.unseen.items():
            logger.warning("group %s stays as it is: %s", name, reason)
            self.graph.freeze([name], reason)
        self.narrow({}, self.graph)

    @torch.no_grad()
    def step(self) -> None:
        """Count one step as done, and take in what its batches showed; call it after `backward`.

        Raises:
            InputError: there was no batch, or no backward pass.
        """
        self._gates.release()
        self._gates.agree(self._ranks)
        pending = self._pending
        self._pending = []
        if not pending and self.draws and not self._left_out:
            reads = "; this estimator reads losses: hand those of the samples to what observe() gives"
            raise InputError(
                "step() came without a batch: call loss(...) and backward() first"
                + (reads if self._estimator.reads_losses else "")
            )
        # A batch that a loop skips before its backward pass (its loss was not finite, say) showed nothing; the last one
        # has had it, or step() comes too early.
        self._left_out = False
        pending = [each for each in pending[:-1] if not each.awaits_backward] + pending[-1:]
        for observation in pending:
            self._add(observation)
        self.steps += 1

    def _add(self, observation: Observation) -> None:
        decay = self._schedule.decay
        observation = observation.gathered(self._ranks)
        factor = self._evidence.factor(observation.ungated is not None)
        batch = self._scale.normalised(observation, self._batches, decay, factor)
        self._evidence.add(self._batches, batch, decay, self._sampler.generator)
        self._batches += 1
        # Not after every batch: the test is made of D x N numbers, and who is relevant changes slowly.
        if self._batches % DECIDE_EVERY == 0:
            self._sampler.relevant = self._evidence.confidence() > self.config.confidence

    # -- what is known

    def scores(self) -> dict[str, Tensor]:
        """Return `(C,)` float32 by group name, larger means keep: what ranks the channels, comparable between groups.

        Relevance in deviations of the loss; for the estimator "gate" half the mean square of its slope.
        """
        return self._by_group(self._evidence.ranking())

    def _by_group(self, values: Tensor) -> dict[str, Tensor]:
        return self._gates.split(values.float())

    def confidence(self) -> dict[str, Tensor]:
        """Return `(C,)` by group name: the probability that a channel is more relevant than a dummy."""
        return self._by_group(self._evidence.confidence())

    def undecided(self) -> dict[str, Tensor]:
        """Return `(C,)` bool by group name: channels that cannot be told from chance, on either side.

        Neither they nor, with signs reversed, their opposites reach the configured confidence.
        """
        limit = self.config.confidence
        return {name: (each <= limit) & (each >= 1 - limit) for name, each in self.confidence().items()}

    def reliability(self) -> dict[str, float]:
        """Return by group name how well two halves of the steps agree on the ranking: their rank correlation.

        It is not corrected for the halves' length (Spearman-Brown). Below 0.3 the ranking is as good as random.
        """
        first, second = (self._gates.split(half) for half in self._evidence.halves())
        return split_half_reliability(first, second)

    def means(self) -> dict[str, Tensor]:
        """Return the running mean of every consumer's input, `(D,)` by weight name: what a cut folds."""
        return self._gates.means()

    def record(self) -> dict[str, Any]:
        """Return a JSON-able summary by group name.

        Of every channel its relevance `r`, its `confidence`, and the number of samples that drew it (`n`, forgotten
        ones counted in part); of its dummies the mean and the spread. Over the group the number of undecided channels,
        and the reliability of the ranking.
        """
        columns = {key: self._by_group(values) for key, values in self._evidence.record().items()}
        undecided, reliability = self.undecided(), self.reliability()
        return {
            name: {key: _rounded(groups[name]) for key, groups in columns.items()}
            | {"undecided": int(undecided[name].sum()), "reliability": reliability[name]}
            for name in self._gates.sizes
        }

    def required_steps(self, batch_size: int) -> int:
        """Return how many steps it takes at least to resolve a channel that saves one deviation of the loss."""
        return self._schedule.required_steps(batch_size)

    def set_period(self, period: int, batch_size: int, half_life: float) -> None:
        """Draw often enough to resolve in `period` steps what can be resolved, if `observe_every` was left open.

        Args:
            period: steps between two cuts, at least `required_steps`.
            batch_size: samples in a step.
            half_life: from now on.
        """
        self._schedule.fit(period, batch_size, half_life)
        self._gates.half_life = self._schedule.half_life_in_batches
        self._gates.track_every = self._track_every

    # -- cuts and checkpoints

    def narrow(self, keep: Mapping[str, Tensor], graph: ChannelGraph) -> None:
        """Forget the channels that were cut, and the groups that were frozen; warn of groups cut by chance alone.

        Args:
            keep: by group name, the channels that stayed, `(n,)`, sorted, as `compressor.cut` keeps them.
            graph: the graph after the cut.

        Raises:
            InputError: `keep` does not lead to this graph. Nothing was changed.
        """
        before = self._gates.sizes
        after = self._gates.narrowed(keep, graph)
        columns, groups = (each.to(self._sampler.group_of.device) for each in kept_columns(before, keep, after.sizes))
        cut = {name for name, kept in keep.items() if len(kept) < before.get(name, 0)}
        warn_if_unreliable(self.reliability(), cut)
        self.graph = graph
        self._gates = after
        self._pending = []
        self._sampler.narrow(columns, after.sizes.values())
        self._evidence.narrow(columns, groups, self._sampler.group_of)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is needed to go on later, as plain tensors and numbers; batches under way are not."""
        return {
            "steps": self.steps,
            "batches": self._batches,
            "estimator": self.config.estimator,
            "observe_every": self._schedule.every,
            "dummies": self.config.dummies,
            "half_life": self._schedule.half_life,
            "sizes": dict(self._gates.sizes),
            "evidence": self._evidence.state_dict(),
            "loss_scale": self._scale.state_dict(),
            "gates": self._gates.state_dict(),
            "sampler": self._sampler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`. Groups that it does not know had been frozen, and are frozen again.

        Raises:
            InputError: the state is of another estimator, or of a model with other groups. Nothing was changed.
        """
        sizes = {name: size for name, size in self._gates.sizes.items() if name in state["sizes"]}
        mine = {"estimator": self.config.estimator, "dummies": self.config.dummies, "sizes": sizes}
        for name, value in mine.items():
            if state[name] != value:
                raise InputError(f"this state is of {name} {state[name]}, not {value}: make Relevance as it was made")
        self.graph.freeze(self._gates.sizes.keys() - sizes.keys(), "frozen before the run was interrupted")
        self._schedule.half_life = state["half_life"]
        self._schedule.every = int(state["observe_every"])
        # Made anew: gates and sums have the shapes of all groups of the graph, also of those that were just frozen.
        self._gates = self._watch_groups()
        self._sampler.narrow(torch.arange(sum(sizes.values())), sizes.values())
        self._evidence = Evidence(self._estimator, self._sampler.group_of, self.config.dummies)
        self._evidence.load_state_dict(state["evidence"])
        self._scale.load_state_dict(state["loss_scale"])
        self._gates.load_state_dict(state["gates"])
        self._sampler.load_state_dict(state["sampler"])
        self.steps = int(state["steps"])
        self._batches = int(state["batches"])
        self._pending = []


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
