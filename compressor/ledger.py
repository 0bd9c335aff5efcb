"""The books of a pruning: what there was before it, what is left, and whether the budget is met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressor.costs import CostModel
from compressor.graph.group import ChannelGraph
from compressor.selection import Budget


@dataclass(frozen=True)
class PruneResult:
    """What a pruning did.

    Attributes:
        reached: whether at least the asked share was removed.
        measure, asked, removed: the measure, the share that was asked for, the share that is gone.
        params, macs, channels: counts before and after; `macs` are multiply-adds for the example inputs.
        widths: by group name, the number of channels before and after.
        blocked: where the target was not reached, what stands in the way.
        notes: what else there is to know.
    """

    reached: bool
    measure: str
    asked: float
    removed: float
    params: tuple[int, int]
    macs: tuple[int, int]
    channels: tuple[int, int]
    widths: Mapping[str, tuple[int, int]]
    blocked: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Ledger:
    """The books of a pruning: what there was before, and what there is now."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.widths = graph.sizes()
        self.before = self._counts()

    def _counts(self) -> dict[str, int]:
        costs, sizes = CostModel(self.graph), self.graph.sizes()
        fixed = sum(width for name, width in self.widths.items() if name not in sizes)
        return {
            "params": costs.params(sizes),
            "macs": costs.macs(sizes),
            "channels": costs.channels(sizes) + fixed,
        }

    def remaining(self, budget: Budget) -> Budget | None:
        """Give the budget, a share of the whole model, as a share of what is left.

        None where it is met, or nothing is left to cut.

        Groups that were frozen meanwhile count as channels of the whole model, but can lose none.
        """
        sizes = self.graph.sizes()
        stuck = sum(width for name, width in self.widths.items() if name not in sizes)
        goal = budget.goal(self.before[budget.measure]) - (stuck if budget.measure == "channels" else 0)
        now = CostModel(self.graph).dense[budget.measure]
        if now <= goal or not now:
            return None
        share = (now - goal) / now * (1 - 1e-12)  # not one more because of a rounded last digit
        return Budget(min(share, 1 - 1e-9), budget.measure)

    def result(self, budget: Budget, blocked: Sequence[str] = ()) -> PruneResult:
        """Balance the books."""
        now, sizes = self._counts(), self.graph.sizes()
        pairs = {measure: (self.before[measure], now[measure]) for measure in now}
        whole = self.before[budget.measure]
        removed = 1 - now[budget.measure] / whole if whole else 0.0
        reached = now[budget.measure] <= budget.goal(whole)
        refused = [f"{name}: its cut was refused" for name in self.widths if name not in sizes]
        return PruneResult(
            reached=reached,
            measure=budget.measure,
            asked=budget.sparsity,
            removed=removed,
            widths={name: (width, sizes.get(name, width)) for name, width in self.widths.items()},
            params=pairs["params"],
            macs=pairs["macs"],
            channels=pairs["channels"],
            blocked=() if reached else (*blocked, *refused),
        )
