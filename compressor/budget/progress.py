"""The progress of a pruning: params, MACs and channels before and after, and whether the budget is met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.budget.budget import Budget
from compressor.budget.costs import CostModel
from compressor.budget.threshold import Threshold
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
        threshold: what channels went by, where it was not by a budget; then any removed share is what was asked.
        measured: the share that is gone of what was measured on the whole model, where `removed` is a prediction.
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
    threshold: float | None = None
    measured: float | None = None


def cut_event(result: PruneResult, before: Mapping[str, int], *, step: int, target: float) -> dict[str, Any] | None:
    """Return a cut as a record for the log, of JSON values, or None where nothing was cut.

    Args:
        result: where the pruning stands after the cut.
        before: by group, the number of channels before this cut.
        step: training steps done.
        target: the share of the measure that should be gone by now.

    Returns:
        `{"event": "cut", "step", "target", "widths": {group: [before, after]}, "removed", "params", "macs"}`.
    """
    after = {name: result.widths[name][1] for name in before if name in result.widths}
    narrower = {name: [before[name], size] for name, size in after.items() if size != before[name]}
    if not narrower:
        return None
    event = {"event": "cut", "step": step, "target": target, "widths": narrower}
    return event | {"removed": result.removed, "params": result.params[1], "macs": result.macs[1]}


class PruningProgress:
    """Params, MACs and channels before a pruning, and now.

    Attributes:
        threshold: what channels go by, if not by a budget.
        graph: read anew for every answer.
        widths: by group, the number of channels before.
        before: by measure, the count before.
    """

    def __init__(self, graph: ChannelGraph, budget: Budget, threshold: Threshold | None = None) -> None:
        self.graph = graph
        self._budget = budget
        self.threshold = threshold
        self.widths = graph.sizes()
        self._known = dict(self.widths)
        self.before = self._counts()

    def _sizes(self) -> dict[str, int]:
        """Return the number of channels of every group now; of one that has left the graph, its number until then."""
        self._known |= {name: size for name, size in self.graph.sizes().items() if name in self.widths}
        return self._known

    def _outside(self) -> int:
        """Return the number of channels in groups that left the graph: refused, or narrowed to a single channel."""
        return sum(size for name, size in self._sizes().items() if name not in self.graph.sizes())

    def has_changed(self) -> bool:
        """Return whether any group has lost a channel."""
        return self._sizes() != self.widths

    def refused(self) -> list[str]:
        """List the groups that were frozen meanwhile; a lone channel is no group when the graph is made anew."""
        return [name for name, size in self._sizes().items() if name not in self.graph.sizes() and size > 1]

    def _counts(self) -> dict[str, int]:
        costs = CostModel(self.graph)
        sizes = self.graph.sizes()
        return {
            self._budget.counts: costs.measure(self._budget.measure, sizes),
            "params": costs.params(sizes),
            "macs": costs.macs(sizes),
            "channels": costs.channels(sizes) + self._outside(),
        }

    def now(self) -> int:
        """Return what the budget counts of the model as it is."""
        return self._counts()[self._budget.counts]

    def removed(self) -> float:
        """Return the share of what the budget counts that is gone."""
        whole = self.before[self._budget.counts]
        return 1 - self.now() / whole if whole else 0.0

    def remaining(self, budget: Budget) -> Budget | None:
        """Return the budget, a share of the whole model, as a share of what is left.

        None where it is met, or nothing is left to cut.

        Groups that were frozen meanwhile count as channels of the whole model, but can lose none.
        """
        stuck = self._outside() if budget.measure == "channels" else 0
        goal = budget.goal(self.before[budget.counts]) - stuck
        now = CostModel(self.graph).measure(budget.measure, {})
        if now <= goal or not now:
            return None
        share = (now - goal) / now * (1 - 1e-12)  # not one more because of a rounded last digit
        return Budget(min(share, 1 - 1e-9), budget.measure)

    def result(
        self, budget: Budget, blocked: Sequence[str] = (), measured: float | None = None, *, reached: bool | None = None
    ) -> PruneResult:
        """Return where the pruning stands against a budget.

        Args:
            budget: what was asked.
            blocked: lines that add to what stands in its way.
            measured: the share that is gone of what can be measured.
            reached: whether that is enough.
        """
        now, sizes = self._counts(), self._sizes()
        whole = self.before[budget.counts]
        removed = 1 - now[budget.counts] / whole if whole else 0.0
        if reached is None:
            reached = now[budget.counts] <= budget.goal(whole)
        return PruneResult(
            reached=reached,
            measure=budget.counts,
            measured=measured,
            asked=budget.sparsity,
            removed=removed,
            params=(self.before["params"], now["params"]),
            macs=(self.before["macs"], now["macs"]),
            channels=(self.before["channels"], now["channels"]),
            widths={name: (width, sizes[name]) for name, width in self.widths.items()},
            blocked=() if reached else (*blocked, *(f"{name}: its cut was refused" for name in self.refused())),
            notes=self.graph.notes,
            threshold=self.threshold.value if self.threshold else None,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return widths and counts as plain numbers."""
        return {"widths": dict(self.widths), "before": dict(self.before), "sizes": dict(self._sizes())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.widths, self.before, self._known = dict(state["widths"]), dict(state["before"]), dict(state["sizes"])
