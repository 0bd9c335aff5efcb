"""Draws the channels and dummies that a batch excludes, and makes the gates that exclude them.

Shape letters: B samples; N channels of all groups, side by side; G groups; D dummies of each group.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from compressor._utils import Ranks
from compressor.errors import InputError
from compressor.relevance.config import RelevanceConfig
from compressor.relevance.draws import subsample_blocks
from compressor.relevance.estimators import ESTIMATORS
from compressor.relevance.observation import Observation

RELEVANT_RATE = 0.5  # relevant channels are drawn so much less often than the undecided ones


class ChannelSampler:
    """Who is drawn, and how often.

    Args:
        config: the estimator, the share that is drawn, and the number of dummies.
        sizes: numbers of channels, group by group.
        generator: of all draws; it lives on the device of the model.
        dtype: of the gates.

    Attributes:
        group_of: `(N,)` int64, the group of every channel.
        relevant: `(N,)` bool, channels that are relevant beyond doubt. Set from outside.
    """

    def __init__(
        self, config: RelevanceConfig, sizes: Collection[int], generator: torch.Generator, dtype: torch.dtype
    ) -> None:
        self.generator = generator
        self._dtype = dtype
        self._estimator = ESTIMATORS[config.estimator]
        self._count = config.draw_one_in
        # Soft dummies are not drawn: they are made from the channels' own increments.
        self._dummies = 0 if self._estimator.soft else config.dummies
        self._set_sizes(sizes)
        self.relevant = torch.zeros_like(self.group_of, dtype=torch.bool)

    def _set_sizes(self, sizes: Collection[int]) -> None:
        counts = torch.tensor(list(sizes), device=self.generator.device)
        groups = torch.arange(len(counts), device=self.generator.device)
        self.group_of = groups.repeat_interleave(counts)
        # NOTE: Dummies stand behind the channels and are dealt together with those of their group, so that they are
        # drawn at the same rate and beside the same partners. Only then do they show what chance does to a channel.
        self._order = torch.cat([self.group_of, groups.repeat(self._dummies)])

    def sample(self, batch: int, share: float, ranks: Ranks) -> Observation:
        """Draw for one batch.

        Args:
            batch: `B`, on every rank.
            share: the part of its draws that a channel takes up now, in [0, 1].
            ranks: all draw the same for the batch of all, and each takes what is its own.
        """
        batch *= ranks.size
        samples = batch if self._estimator.per_sample else 1
        draw = self._estimator.draw(self._order, self._count, samples, self.generator)
        draw = subsample_blocks(draw, self._count, self._rate(share), self.generator).expand(batch, -1)
        out = draw[:, : len(self.group_of)]
        gates = torch.zeros(out.shape, dtype=self._dtype, device=out.device)
        if self._estimator.soft:
            gates.uniform_(generator=self.generator)
        gates = ranks.own_rows(gates.masked_fill_(~out, 1.0))
        return Observation(gates.requires_grad_(self._estimator.soft), ranks.own_rows(draw))

    def _rate(self, share: float) -> Tensor:
        """Return the share of its draws that every column takes up now: less in the warm-up, half if it is decided."""
        rate = torch.ones(len(self._order), device=self.group_of.device)
        # A channel that is relevant beyond doubt needs no more samples; where it sits out, the step trains it instead.
        # Not for the published method, which knows no such thing.
        if self._estimator.per_sample:
            rate[: len(self.group_of)][self.relevant] = RELEVANT_RATE
        return rate * share

    def narrow(self, columns: Tensor, sizes: Collection[int]) -> None:
        """Forget all but these columns of the channels, `(n,)`, which are of groups of these sizes from now on."""
        self._set_sizes(sizes)
        self.relevant = self.relevant[columns]

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of who is relevant, and the random state."""
        return {"relevant": self.relevant.clone(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.relevant = state["relevant"].to(self.relevant.device, copy=True)
        self.generator.set_state(state["generator"].cpu())


def kept_columns(
    before: Mapping[str, int], keep: Mapping[str, Tensor], after: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """Return where the channels and the groups of a model after a cut stood before it: `(n,)` and `(g,)` indices.

    Args:
        before, after: numbers of channels by group name, in the order in which the groups stand side by side.
        keep: by group name, the channels that stayed, `(n,)`; all of a group that is not named.

    Raises:
        InputError: `keep` does not lead from the one to the other.
    """
    names = list(before)
    columns = []
    starts = dict(zip(names, itertools.accumulate(before.values(), initial=0), strict=False))
    for name, size in after.items():
        if name not in before:
            raise InputError(f"group {name!r} was not watched before the cut: make a new Relevance for this graph")
        kept = keep[name].cpu() if name in keep else torch.arange(before[name])
        if len(kept) != size:
            raise InputError(
                f"keep leaves {len(kept)} channels of group {name!r}, the graph has {size}: pass both of one cut"
            )
        columns.append(starts[name] + kept)
    return torch.cat(columns), torch.tensor([names.index(name) for name in after])
