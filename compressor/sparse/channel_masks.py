"""Masks on whole channels: a channel is off when the weights of all its consumers are zero for it.

Masked where it is consumed, a channel that is off is exactly a channel that was cut. Its consumers' gradients stay
dense and say whether it would help; and a channel that comes back comes with zeros in its consumers, so that it changes
nothing at first, like a single weight that grows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.budget import Budget, CostModel, SelectionOptions, select
from compressor.errors import BudgetError, InputError
from compressor.graph import ChannelGraph, Group
from compressor.sparse.allocation import relative_density
from compressor.sparse.config import MaskAllocation
from compressor.sparse.units import MaskedUnits, Masks, grad_magnitude
from compressor.surgery import cut, require_held, retry_without_refused, try_cut

logger = logging.getLogger(__name__)


class ChannelMasks(MaskedUnits):
    """Which channels are on, `(C,)` by group.

    Args:
        graph, optimizers, budget, copies: as for `MaskedUnits`. Groups whose channels cannot be masked at their
            consumers are frozen, with the reason.
        allocation: "erk" or "uniform" say how sparse each group is; "global" ranks all channels together.
        round_to: groups that lose channels end with a multiple of this, as in `SelectionOptions`.
        shares: by group, the share of its own channels that is off, whatever the budget.

    Raises:
        InputError: no channel can be switched, or an optimizer does not hold a consumer's weight.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        optimizers: Sequence[Optimizer],
        budget: Budget,
        allocation: MaskAllocation,
        round_to: int | None,
        shares: Mapping[str, float],
        copies: Sequence[nn.Module],
    ) -> None:
        super().__init__(graph, optimizers, budget, copies)
        self._is_erk = allocation == "erk"
        self._options = SelectionOptions("uniform" if allocation == "uniform" else "global", round_to)
        self._shares = shares
        _freeze_unmaskable(graph)
        consumers = [member.tensor for group in graph.groups for member in group.of_role("consumer")]
        require_held(graph.model, self._optimizers, consumers)
        self._all_on()

    def _all_on(self) -> None:
        parameters = self._parameters()
        device = next(iter(parameters.values())).device
        self.masks = {
            group.name: torch.ones(group.size, dtype=torch.bool, device=device) for group in self.graph.groups
        }

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.graph.model.named_parameters())

    def values(self) -> dict[str, Tensor]:
        """Return the Euclidean norm of each channel's weights in its consumers."""
        return self._norms(lambda parameter: parameter.detach())

    def grad_magnitudes(self) -> dict[str, Tensor]:
        """Return the Euclidean norm of the gradient by those weights."""
        return self._norms(grad_magnitude)

    def _norms(self, read: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        parameters = self._parameters()
        names = {member.tensor for group in self.graph.groups for member in group.of_role("consumer")}
        tensors = {name: read(parameters[name]) for name in names}
        return {
            group.name: torch.linalg.vector_norm(group.rows(tensors, "consumer"), dim=1) for group in self.graph.groups
        }

    def topk_masks(self, scores: Mapping[str, Tensor], share: float = 1.0) -> Masks:
        """Return the masks that meet the due share of the budget, as `compressor.budget.select` does.

        Raises:
            BudgetError: no choice of channels can meet it.
        """
        due = self._budget.scaled(share)
        selection = select(
            self.graph,
            self._erk_places(scores) if self._is_erk else scores,
            due,
            costs=CostModel(self.graph),
            options=self._options,
            shares={name: mine * share for name, mine in self._shares.items() if name in self.masks},
            normalise=not self._is_erk,
        )
        if not selection.reached:
            raise BudgetError(due.counts, due.sparsity, selection.removed, selection.blocked)
        return {name: _marked(mask, selection.keep.get(name)) for name, mask in self.masks.items()}

    def _erk_places(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return scores that order one queue of all channels so that any front of it leaves densities as ERK has them.

        With a density of `min(1, scale * p)`, the best `scale * p * C` channels of a group stay: a channel of which a
        share `q` of its group is no better goes when `scale` falls below `(1 - q) / p`.
        """
        places = {}
        for group in self.graph.groups:
            rank = scores[group.name].argsort(stable=True).argsort().double()
            places[group.name] = (rank + 0.5 - group.size) / group.size / self._density(group)
        return places

    def _density(self, group: Group) -> float:
        tensors = self._parameters()
        shapes = [tensors[member.tensor].shape for member in group.of_role("producer") if member.tensor in tensors]
        return relative_density(shapes[0]) if shapes else 1.0

    def zeros(self) -> dict[str, Tensor]:
        """Return where consumers' weights belong to a channel that is off."""
        parameters = self._parameters()
        zeros = dict[str, Tensor]()
        for group in self.graph.groups:
            off = (~self.masks[group.name]).cpu()
            for member in group.of_role("consumer"):
                weight = parameters[member.tensor]
                along = torch.zeros(weight.shape[member.dim], dtype=torch.bool)
                along[member.positions[off].flatten()] = True
                shape = [-1 if dim == member.dim else 1 for dim in range(weight.dim())]
                where = along.view(shape).to(weight.device)
                zeros[member.tensor] = zeros[member.tensor] | where if member.tensor in zeros else where
        return {name: where for name, where in zeros.items() if where.any()}

    def freeze_uncuttable(self) -> None:
        """Try to cut half of every group and take it back; groups that refuse are frozen.

        Raises:
            BudgetError: without them it cannot be met.
        """

        def attempt() -> None:
            half = {name: torch.arange((size + 1) // 2) for name, size in self.graph.sizes().items()}
            try_cut(self.graph, half, self._optimizers, self._copies)

        retry_without_refused(self.graph, attempt, self._forget)
        self.topk_masks(self.values())

    def cut(self) -> None:
        """Remove the channels that are off. A group that refuses stays whole: its channels are switched on again."""

        def attempt() -> None:
            cut(self.graph, _kept(self.masks), self._optimizers, copies=self._copies)

        retry_without_refused(self.graph, attempt, self._forget)
        self._all_on()
        self.set_masks(self.masks)

    def _forget(self, names: Sequence[str]) -> None:
        """Take the masks of refused groups away; their channels are on from now on."""
        logger.info("channels of %s are switched on for good", ", ".join(names))
        self.masks = {name: mask for name, mask in self.masks.items() if name not in names}


def _freeze_unmaskable(graph: ChannelGraph) -> None:
    """Freeze the groups whose channels cannot be switched at their consumers.

    Raises:
        InputError: no group is left.
    """
    parameters = dict(graph.model.named_parameters())
    reasons = {group.name: _why_unmaskable(group, parameters) for group in graph.groups}
    for name, reason in reasons.items():
        if reason:
            graph.freeze([name], reason)
    if not graph.groups:
        why = "; ".join(sorted(set(reasons.values()))) or "every channel is frozen, as `graph.frozen` says"
        raise InputError(
            f"{type(graph.model).__name__} has no channel that can be switched off ({why}): use granularity 'weight'"
        )


def _why_unmaskable(group: Group, parameters: Mapping[str, nn.Parameter]) -> str:
    """Say why the channels of a group cannot be switched at their consumers; nothing if they can."""
    consumers = [member.tensor for member in group.of_role("consumer")]
    if not group.exact:
        return "a channel that is off is not one that was cut: others depend on it"
    trains = all(name in parameters and parameters[name].requires_grad for name in consumers)
    return "" if trains else "a weight that reads these channels does not train"


def _marked(like: Tensor, kept: Tensor | None) -> Tensor:
    mask = torch.ones_like(like) if kept is None else torch.zeros_like(like)
    if kept is not None:
        mask[kept.to(mask.device)] = True
    return mask


def _kept(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask.nonzero().flatten().cpu() for name, mask in masks.items()}
