"""Towards a budget: select, cut, and go around what refuses. What `prune` and `Pruner` share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor._utils import unwrap_compiled
from compressor.budget import Budget, CostModel, PruningProgress, Selection, SelectionOptions, Threshold, select
from compressor.errors import BudgetError, InputError
from compressor.graph import ChannelGraph, Group, trace
from compressor.surgery import Moments, couple_blocks, cut, retry_without_refused, verified_cut

logger = logging.getLogger(__name__)


def traced(model: nn.Module, example_inputs: Any, outputs: Callable[[Any], Any] | None = None) -> ChannelGraph:
    """Return the channel graph of a model that has something to prune.

    Raises:
        InputError: the model has no parameters, or some that nothing can write.
        TraceError: the model does not run on the example inputs.
    """
    if next(model.parameters(), None) is None:
        raise InputError(
            f"{type(model).__name__} has no parameters, so there is nothing to prune: pass the whole model"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise InputError(
            f"{type(model).__name__} was made inside torch.inference_mode(), where weights stay as they are: make or "
            "load it outside"
        )
    graph = trace(unwrap_compiled(model), example_inputs, outputs=outputs)
    couple_blocks(graph)
    return graph


@dataclass(frozen=True)
class CutOptions:
    """How cuts are made: the same for all cuts of one pruning.

    Attributes:
        selection: how channels are chosen.
        shares: by group, the share of its own channels that goes in the end, whatever the budget is.
        optimizers, copies: what is cut along, as for `cut`.
        verify: whether every cut is compared with the masked model.
        threshold: what goes by its score alone; the groups' own shares come first.
        inclusive: whether a score that equals the threshold goes too.
    """

    selection: SelectionOptions = field(default_factory=SelectionOptions)
    shares: Mapping[str, float] = field(default_factory=dict)
    optimizers: Sequence[Optimizer] = ()
    copies: Sequence[nn.Module] = ()
    verify: bool = False
    threshold: Threshold | None = None
    inclusive: bool = False


def prune_to_budget(
    progress: PruningProgress,
    scores: Callable[[Sequence[Group]], Mapping[str, Tensor]],
    budget: Budget,
    options: CutOptions,
    *,
    due: float = 1.0,
    means: Mapping[str, Tensor] | Moments | None = None,
    normalise: bool = True,
    real_inputs: Any = None,
    allocation: Callable[[Sequence[Group]], Mapping[str, Tensor]] | None = None,
) -> Selection | None:
    """Select and cut; a group that refuses is frozen with the reason, and the selection is made again without it.

    Args:
        progress: what is gone already, with the graph.
        scores: returns the scores of groups, each asked for once.
        budget: what is to be gone by now, as a share of the whole model.
        options: how cuts are made.
        due: the part of the groups' own shares that may be gone by now.
        means: to be folded, as for `cut`.
        normalise: as for `select`.
        real_inputs: what a verified cut is compared on.
        allocation: returns the scores that say how much of each group goes, where those are not `scores`.

    Returns:
        The selection that was cut, None where all was done before.

    Raises:
        InputError: a parameter is not finite: whatever were kept of such a model is of no use.
    """
    _require_finite(progress.graph.model)
    graph = progress.graph
    shares = {name: share * due for name, share in options.shares.items()}
    if progress.remaining(budget) is None and not any(shares.values()) and not options.threshold:
        return None
    groups = [group for group in graph.groups if shares.get(group.name) != 0]
    known = scores(groups)
    if options.threshold:
        below, lines = options.threshold.shares(
            known, progress.widths, options.selection.floor, inclusive=options.inclusive
        )
        shares = below | shares
        graph.note(line for line in lines if line not in graph.notes)
    decide = {name: each for name, each in allocation(groups).items() if name in known} if allocation else known

    def attempt() -> Selection:
        selection = select(
            graph,
            {name: each for name, each in decide.items() if name in graph.sizes()},
            progress.remaining(budget) or Budget(0.0, budget.measure),
            costs=CostModel(graph),
            options=options.selection,
            whole=progress.widths,
            shares=shares,
            normalise=normalise,
        )
        if allocation:
            selection = replace(selection, keep=_best(known, selection.keep))
        if options.verify:
            verified_cut(graph, selection.keep, real_inputs, options.optimizers, means, options.copies)
        else:
            cut(graph, selection.keep, options.optimizers, means, copies=options.copies)
        return selection

    made = retry_without_refused(graph, attempt)
    for line in made.blocked:
        logger.warning("the budget is not reached: %s", line)
    return made


def _best(scores: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return as many channels of each group as `keep` has, those of the highest scores; of equal ones the later."""
    best = {name: scores[name].argsort(stable=True)[len(scores[name]) - len(kept) :] for name, kept in keep.items()}
    return {name: each.sort().values.cpu() for name, each in best.items()}


def _require_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not torch.isfinite(parameter.detach()).all():
            raise InputError(f"{name!r} holds NaN or inf: go back to weights from before the training diverged")


def require_reachable(
    graph: ChannelGraph, budget: Budget, options: SelectionOptions, shares: Mapping[str, float] | None = None
) -> None:
    """Raise BudgetError if no choice of channels can reach the budget; what blocks it is in the message."""
    zeros = {group.name: torch.zeros(group.size) for group in graph.groups}
    selection = select(graph, zeros, budget, costs=CostModel(graph), options=options, shares=shares)
    if not selection.reached:
        raise BudgetError(budget.counts, budget.sparsity, selection.removed, selection.blocked)
