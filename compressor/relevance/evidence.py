"""What the training steps have shown of every channel so far, and of dummies, channels without any effect.

Shape letters: N channels of all groups, side by side; G groups; D dummies of each group; M columns of dummies: G where
dummies are drawn beside the channels of a group, N where every channel has its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.relevance.estimators import BatchRecord, Estimator
from compressor.relevance.statistics import Increment, RunningMean, confidence


class Evidence:
    """Running means of what an estimator says, for channels and dummies alike.

    Args:
        estimator: the estimator.
        group_of: `(N,)` int64, the group of every channel.
        dummies: `D`.
    """

    def __init__(self, estimator: Estimator, group_of: Tensor, dummies: int) -> None:
        self._estimator = estimator
        self._dummies_each = dummies
        channels = len(group_of)
        groups = int(group_of.max()) + 1
        device = group_of.device
        self._group_of = group_of
        # What ranks is kept in two halves of the steps: their agreement is the reliability of the ranking.
        self._means = {
            "relevance": RunningMean(channels, parts=2, device=device),
            "dummies": RunningMean(dummies, channels if estimator.soft else groups, device=device),
            "draws": RunningMean(channels, device=device),
        }
        if estimator.rank:
            self._means["rank"] = RunningMean(channels, parts=2, device=device)
        if estimator.learn:
            self._means["factor"] = RunningMean(channels, parts=2, device=device)

    def add(self, number: int, batch: BatchRecord, decay: float, generator: torch.Generator) -> None:
        """Take in what batch `number` showed; what was shown before counts `decay` times as much from now on."""
        channels = len(self._group_of)
        measured = self._estimator.measure(batch)
        draws = batch.draw[:, :channels].sum(0).float()
        increments = {
            "relevance": Increment(measured.totals[:channels], measured.weights[:channels]),
            "dummies": self._dummy_increment(measured, generator),
            "draws": Increment(draws, torch.ones_like(draws)),
        }
        if self._estimator.rank:
            increments["rank"] = self._estimator.rank(batch)
        for name, increment in increments.items():
            self._means[name].add(number, increment, decay)
        if self._estimator.learn:
            # Not by turns: with a control variate the losses resolve more, and deserve a larger factor of their own.
            self._means["factor"].add(int(batch.controlled), self._estimator.learn(batch), decay)

    def _dummy_increment(self, measured: Increment, generator: torch.Generator) -> Increment:
        """Return what the dummies add: those that were drawn along, or channels' own increments with random signs."""
        # A gate that reaches no weight has a gradient of 0, so a soft dummy cannot be drawn: it is a channel's own
        # increment without its sign.
        if self._estimator.soft:
            return measured.with_random_signs(self._dummies_each, generator)
        # NOTE: Hard dummies come from the same draw as the channels. Drawn apart, at another rate or another moment,
        # 13 to 21 % of channels without effect pass instead of 1 %, and whole layers pass or fail together.
        drawn_along = slice(len(self._group_of), None)
        shape = (self._dummies_each, -1)
        return Increment(measured.totals[drawn_along].view(shape), measured.weights[drawn_along].view(shape))

    def factor(self, controlled: bool) -> Tensor:
        """Return by how much losses are to correct gradients, `(N,)`; more where there is a control variate."""
        if "factor" not in self._means:
            return torch.zeros_like(self._group_of, dtype=torch.float32)
        return self._means["factor"].halves()[int(controlled)]

    # -- what is known

    def relevance(self) -> Tensor:
        """Return the mean of what the estimator measures, `(N,)`."""
        return self._means["relevance"].mean()

    def ranking(self) -> Tensor:
        """Return what ranks the channels, `(N,)`, larger means keep."""
        if self._estimator.rank:
            return self._means["rank"].mean()
        above = self.relevance() - self.dummies().mean(0)
        return above if self._estimator.soft else above * self._own_share()

    def _own_share(self) -> Tensor:
        """Return the share of a channel's distance from its dummies that is its own effect, `(N,)`.

        Of `n` channels and dummies of a group equally many are out, whoever is: one that is not drawn is replaced by
        another, so that losses with it out less losses with it in are its effect less the others' mean. For a dummy
        that is less the mean of all. The distance is `n / (n - 1)` times the effect.
        """
        together = torch.bincount(self._group_of) + self._dummies_each
        return (1 - 1 / together)[self._group_of]

    def halves(self) -> Tensor:
        """Return what ranks the channels from each of two interleaved halves of the steps, `(2, N)`."""
        return self._means["rank" if self._estimator.rank else "relevance"].halves()

    def dummies(self) -> Tensor:
        """Return the dummies that each channel is compared with, `(D, N)`."""
        dummies = self._means["dummies"].mean()
        if self._estimator.soft:
            return dummies
        # NOTE: Dummies are drawn at the full rate. A channel that was drawn less often is that much less certain.
        full = self._means["dummies"].weights[0].mean(0)[self._group_of]
        own = self._means["relevance"].weights.sum(0)
        wider = torch.where(own > 0, full / own, 1.0).sqrt()
        centre = dummies.mean(0)
        return centre[self._group_of] + (dummies - centre)[:, self._group_of] * wider

    def confidence(self) -> Tensor:
        """Return the probability that each channel saves more loss than a dummy, `(N,)` in `[0, 1]`."""
        return confidence(self.relevance(), self.dummies())

    def record(self) -> dict[str, Tensor]:
        """Return every figure that there is of each channel, `(N,)` by its name in the log."""
        return {
            "r": self.relevance(),
            "confidence": self.confidence(),
            "n": self._means["draws"].totals[0],
            "dummies_mean": self.dummies().mean(0),
            "dummies_spread": self.dummies().std(0),
        }

    # -- cuts and checkpoints

    def narrow(self, columns: Tensor, groups: Tensor, group_of: Tensor) -> None:
        """Forget all but these columns of the channels and these groups.

        Args:
            columns: `(n,)`, the channels that stay.
            groups: `(g,)`, the groups that stay.
            group_of: `(n,)`, the group of every channel from now on.
        """
        for name, mean in self._means.items():
            mean.narrow(groups if name == "dummies" and not self._estimator.soft else columns)
        self._group_of = group_of

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all sums."""
        return {name: mean.state_dict() for name, mean in self._means.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        for name, mean in self._means.items():
            mean.load_state_dict(state[name])
