"""Towards a budget: select, cut, and go around what refuses. What `prune`, `Pruner` and their like share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor._utils import uncompiled
from compressor.budget import Budget, CostModel, Ledger, Selection, select
from compressor.errors import BudgetError, CutError, InputError
from compressor.graph import ChannelGraph, Group, trace
from compressor.surgery import cut, verified_cut


def traced(model: nn.Module, example_inputs: Any) -> ChannelGraph:
    """Give the channel graph of a model that has something to prune.

    Raises:
        InputError: the model has no parameters.
        TraceError: the model does not run on the example inputs.
    """
    if next(model.parameters(), None) is None:
        raise InputError(
            f"{type(model).__name__} has no parameters, so there is nothing to prune: pass the whole model"
        )
    return trace(uncompiled(model), example_inputs)


@dataclass(frozen=True)
class How:
    """How cuts are made: the same for all cuts of one pruning.

    Attributes:
        scope, round_to, shares: as for `select`.
        optimizers, copies: what is cut along, as for `cut`.
        verify: whether every cut is compared with the silenced model.
    """

    scope: str
    round_to: int
    shares: Mapping[str, float]
    optimizers: Sequence[Optimizer]
    copies: Sequence[nn.Module]
    verify: bool

    @staticmethod
    def of(
        scope: str,
        round_to: int,
        shares: Mapping[str, float],
        optimizer: Optimizer | Iterable[Optimizer] | None,
        copies: Iterable[nn.Module],
        verify: bool,
    ) -> How:
        """Take one optimizer, several or none."""
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
        return How(scope, round_to, shares, optimizers, list(copies), verify)


def cut_to(
    ledger: Ledger,
    scores: Callable[[Sequence[Group]], Mapping[str, Tensor]],
    budget: Budget,
    how: How,
    *,
    due: float = 1.0,
    means: Mapping[str, Tensor] | None = None,
    normalise: bool = True,
    real_inputs: Any = None,
) -> Selection | None:
    """Select and cut; a group that refuses is frozen with the reason, and the selection is made again without it.

    Args:
        ledger: the books, with the graph.
        scores: gives the scores of groups, each asked for once.
        budget: what is to be gone by now, as a share of the whole model.
        how: how cuts are made.
        due: the part of the groups' own shares that may be gone by now.
        means: to be folded, as for `cut`.
        normalise: as for `select`.
        real_inputs: what a verified cut is compared on.

    Returns:
        The selection that was cut, None where all was done before.
    """
    graph = ledger.graph
    shares = {name: share * due for name, share in how.shares.items()}
    if ledger.remaining(budget) is None and not any(shares.values()):
        return None
    known = scores([group for group in graph.groups if shares.get(group.name) != 0])
    while True:
        selection = select(
            graph,
            {name: each for name, each in known.items() if name in graph.sizes()},
            ledger.remaining(budget) or Budget(0.0, budget.measure),
            costs=CostModel(graph),
            scope=how.scope,
            round_to=how.round_to,
            whole=ledger.widths,
            shares=shares,
            normalise=normalise,
        )
        try:
            if how.verify:
                verified_cut(graph, selection.keep, real_inputs, how.optimizers, means, how.copies)
            else:
                cut(graph, selection.keep, how.optimizers, means, copies=how.copies)
            return selection
        except CutError as refusal:
            if not refusal.groups:
                raise
            graph.freeze(refusal.groups, refusal.reason)


def require_reachable(
    graph: ChannelGraph,
    budget: Budget,
    scope: str = "global",
    round_to: int = 1,
    shares: Mapping[str, float] | None = None,
) -> None:
    """Raise BudgetError if no choice of channels can reach the budget; what blocks it is in the message."""
    zeros = {group.name: torch.zeros(group.size) for group in graph.groups}
    costs = CostModel(graph)
    selection = select(graph, zeros, budget, scope=scope, round_to=round_to, costs=costs, shares=shares)
    if not selection.reached:
        raise BudgetError(budget.measure, budget.sparsity, selection.removed, selection.blocked)
