"""Masks on single weights of convolutions and Linears, as the methods were published.

Norms and biases are never masked, nor are weights that do not train, or that are made of others (weight_norm). The
budget is a share of all weights of convolutions and Linears, those included: where 40 of 100 do not train, a budget of
0.5 switches 50 of the other 60 off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.budget import Budget
from compressor.errors import BudgetError, InputError
from compressor.graph import ChannelGraph, stored_weight
from compressor.sparse.allocation import ALLOCATIONS, counts_off
from compressor.sparse.config import MaskAllocation
from compressor.sparse.empty import without_weight
from compressor.sparse.regrowth import lowest
from compressor.sparse.units import MaskedUnits, Masks, grad_magnitude
from compressor.surgery import cut, input_means, removed_channels, require_held, retry_without_refused


class WeightMasks(MaskedUnits):
    """Which single weights are on.

    Args:
        graph, optimizers, budget, copies: as for `MaskedUnits`; the budget is a share of all maskable weights.
        allocation: "erk" or "uniform" say how sparse each layer is; "global" ranks all weights together.

    Raises:
        InputError: no convolution or Linear to mask, or an optimizer that does not hold one.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        optimizers: Sequence[Optimizer],
        budget: Budget,
        allocation: MaskAllocation,
        copies: Sequence[nn.Module],
    ) -> None:
        super().__init__(graph, optimizers, budget, copies)
        self._allocation = allocation
        self._weights = maskable(graph.model)
        require_held(graph.model, self._optimizers, self._weights)
        self.masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self._weights.items()}

    @property
    def fixed(self) -> int:
        """The number of weights of convolutions and Linears that are on for good."""
        return sum(weight.numel() for weight in _all_weights(self.graph.model).values()) - self.size

    def values(self) -> dict[str, Tensor]:
        """Return the weights."""
        return {name: weight.detach() for name, weight in self._weights.items()}

    def grad_magnitudes(self) -> dict[str, Tensor]:
        """Return the magnitude of each weight's gradient."""
        return {name: grad_magnitude(weight) for name, weight in self._weights.items()}

    def topk_masks(self, scores: Mapping[str, Tensor], share: float = 1.0) -> Masks:
        """Return the masks that leave exactly the due share of all weights off, those that score lowest.

        Raises:
            BudgetError: too many weights are not masked.
        """
        due = Budget(self._budget.sparsity * share)
        total = self.whole - due.goal(self.whole)
        if total > self.size - len(self.masks):
            reason = f"{self.fixed:,} of {self.whole:,} weights do not train, or are made of others, and are not masked"
            raise BudgetError("weights", due.sparsity, (self.size - len(self.masks)) / self.whole, (reason,))
        due = Budget(total / self.size)
        if self._allocation == "global":
            return _split(_on(torch.cat([scores[name].flatten() for name in self.masks]), total), self.masks)
        shapes = {name: tuple(mask.shape) for name, mask in self.masks.items()}
        sizes = {name: mask.numel() for name, mask in self.masks.items()}
        off = counts_off(sizes, ALLOCATIONS[self._allocation](shapes, due.sparsity), total)
        return {name: _on(scores[name], off[name]) for name in self.masks}

    def zeros(self) -> dict[str, Tensor]:
        """Return where weights are off."""
        return {name: ~mask for name, mask in self.masks.items()}

    def freeze_uncuttable(self) -> None:
        """Look whether the allocation is possible at all."""
        self.topk_masks(self.values())

    def cut(self) -> None:
        """Remove the channels that no weight writes or no weight reads.

        What a channel without a writing weight still is, a constant made by biases, is folded into the next bias.
        """

        def attempt() -> Mapping[tuple[str, int], Tensor]:
            # A refused group leaves the graph, so what is empty is looked up anew: its channels count as in use then.
            keep = self._to_keep()
            positions = _kept_positions(self.graph, keep)
            if keep:
                # NOTE: Every example gives the same means, as what is empty is a constant whatever comes in.
                means = input_means(self.graph, [self.graph.example_inputs])
                cut(self.graph, keep, self._optimizers, means, copies=self._copies)
            return positions

        positions = retry_without_refused(self.graph, attempt)
        if positions:
            self.set_masks({name: _narrowed(mask, name, positions) for name, mask in self.masks.items()})

    def _to_keep(self) -> dict[str, Tensor]:
        empty = without_weight(self.graph, self.masks)
        return {name: (~gone).nonzero().flatten() for name, gone in empty.items() if gone.any()}


def _all_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weight of every convolution and Linear by name, each once, whatever it is made of."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    named = {f"{name}.weight".lstrip("."): each for name, each in model.named_modules() if isinstance(each, kinds)}
    found = {name: stored_weight(module) for name, module in named.items()}
    return {name: weight for name, weight in found.items() if weight is not None}


def maskable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of all convolutions and Linears that train, by name, in the order of the model's modules.

    Raises:
        InputError: there are none.
    """
    weights = _all_weights(model)
    found = {name: weight for name, weight in model.named_parameters() if name in weights and weight.requires_grad}
    if not found:
        raise InputError(
            f"{type(model).__name__} has no convolution or Linear whose weight trains, so there is nothing to mask: "
            "give a model with some, or prune channels by a criterion, l1 say"
        )
    return found


def _on(scores: Tensor, off: int) -> Tensor:
    """Return the mask without the `off` units that score lowest."""
    return ~lowest(scores, torch.ones_like(scores, dtype=torch.bool), off)


def _split(side_by_side: Tensor, like: Masks) -> Masks:
    parts = torch.split(side_by_side, [mask.numel() for mask in like.values()])
    return {name: part.view_as(mask) for (name, mask), part in zip(like.items(), parts, strict=True)}


def _kept_positions(graph: ChannelGraph, keep: Mapping[str, Tensor]) -> dict[tuple[str, int], Tensor]:
    """Return, for every tensor dimension that a cut narrows, which positions stay: bool."""
    tensors = dict(graph.model.named_parameters())
    stays: dict[tuple[str, int], Tensor] = {}
    for name, kept in keep.items():
        for member in graph[name].members:
            if member.tensor in tensors:
                size = tensors[member.tensor].shape[member.dim]
                along = stays.setdefault((member.tensor, member.dim), torch.ones(size, dtype=torch.bool))
                along[member.positions[removed_channels(graph[name], kept)].flatten()] = False
    return stays


def _narrowed(mask: Tensor, name: str, stays: Mapping[tuple[str, int], Tensor]) -> Tensor:
    for (tensor, dim), along in stays.items():
        if tensor == name:
            mask = mask.index_select(dim, along.nonzero().flatten().to(mask.device))
    return mask
