"""The books of a pruning: what there was before it, what is left, and whether the budget is met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.budget.costs import CostModel
from compressor.budget.selection import Budget
from compressor.graph import ChannelGraph


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
    """The books of a pruning: what there was before, and what there is now.

    Attributes:
        graph: read anew for every answer.
        widths: by group, the number of channels before.
        before: by measure, the count before.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.widths = graph.sizes()
        self._known = dict(self.widths)
        self.before = self._counts()

    def _sizes(self) -> dict[str, int]:
        """Give the number of channels of every group now; of one that has left the graph, its number until then."""
        self._known |= {name: size for name, size in self.graph.sizes().items() if name in self.widths}
        return self._known

    def _outside(self) -> int:
        """Give the number of channels in groups that have left the graph: refused, or narrowed to a single channel."""
        return sum(size for name, size in self._sizes().items() if name not in self.graph.sizes())

    def refused(self) -> list[str]:
        """List the groups that were frozen meanwhile; a lone channel is no group when the graph is made anew."""
        return [name for name, size in self._sizes().items() if name not in self.graph.sizes() and size > 1]

    def _counts(self) -> dict[str, int]:
        costs, sizes = CostModel(self.graph), self.graph.sizes()
        return {
            "params": costs.params(sizes),
            "macs": costs.macs(sizes),
            "channels": costs.channels(sizes) + self._outside(),
        }

    def remaining(self, budget: Budget) -> Budget | None:
        """Give the budget, a share of the whole model, as a share of what is left.

        None where it is met, or nothing is left to cut.

        Groups that were frozen meanwhile count as channels of the whole model, but can lose none.
        """
        stuck = self._outside() if budget.measure == "channels" else 0
        goal = budget.goal(self.before[budget.measure]) - stuck
        now = CostModel(self.graph).dense[budget.measure]
        if now <= goal or not now:
            return None
        share = (now - goal) / now * (1 - 1e-12)  # not one more because of a rounded last digit
        return Budget(min(share, 1 - 1e-9), budget.measure)

    def result(self, budget: Budget, blocked: Sequence[str] = ()) -> PruneResult:
        """Balance the books."""
        now, sizes = self._counts(), self._sizes()
        whole = self.before[budget.measure]
        removed = 1 - now[budget.measure] / whole if whole else 0.0
        reached = now[budget.measure] <= budget.goal(whole)
        return PruneResult(
            reached=reached,
            measure=budget.measure,
            asked=budget.sparsity,
            removed=removed,
            params=(self.before["params"], now["params"]),
            macs=(self.before["macs"], now["macs"]),
            channels=(self.before["channels"], now["channels"]),
            widths={name: (width, sizes[name]) for name, width in self.widths.items()},
            blocked=() if reached else (*blocked, *(f"{name}: its cut was refused" for name in self.refused())),
        )

    def state_dict(self) -> dict[str, Any]:
        """Give the books as plain numbers."""
        return {"widths": dict(self.widths), "before": dict(self.before), "sizes": dict(self._sizes())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the books of `state_dict()`."""
        self.widths, self.before, self._known = dict(state["widths"]), dict(state["before"]), dict(state["sizes"])
