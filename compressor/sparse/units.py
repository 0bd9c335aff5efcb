"""What a mask switches on and off: the units of a model, single weights or whole channels.

A unit that is off is a zero in weights, and a zero in the optimizers' state for them. Gradients are left alone: they
stay dense, and say which unit would help if it were on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.budget import Budget
from compressor.graph import ChannelGraph, named_model_tensors
from compressor.surgery import require_alike

Masks = dict[str, Tensor]


class MaskedUnits(ABC):
    """The units of one model, and which of them are on.

    Args:
        graph: the channel graph of the model.
        optimizers: those that train it.
        budget: what is off at the end.
        copies: models with the same tensors that get the same zeros and cuts, as for `compressor.cut`.

    Attributes:
        masks: by name of a layer (or group), bool, True where a unit is on. Change them by `set_masks` alone.
    """

    def __init__(
        self, graph: ChannelGraph, optimizers: Sequence[Optimizer], budget: Budget, copies: Sequence[nn.Module]
    ) -> None:
        self.graph = graph
        self.masks = Masks()
        self._budget = budget
        self._optimizers = optimizers
        self._copies = copies
        require_alike(named_model_tensors(dict(graph.model.named_modules())), copies)
        self._zeros = dict[str, Tensor]()

    @abstractmethod
    def values(self) -> dict[str, Tensor]:
        """Return what each unit is now, of the masks' shapes: signed for weights, a norm for channels."""

    @abstractmethod
    def grad_magnitudes(self) -> dict[str, Tensor]:
        """Return the magnitude of the loss's gradient by each unit, on or off, of the masks' shapes."""

    @abstractmethod
    def topk_masks(self, scores: Mapping[str, Tensor], share: float = 1.0) -> Masks:
        """Return the masks that meet that share of the budget and leave those units on that score highest.

        Raises:
            BudgetError: no masks can meet it.
        """

    @abstractmethod
    def zeros(self) -> dict[str, Tensor]:
        """Return by parameter, where the masks want zeros: bool, broadcastable to its shape."""

    @abstractmethod
    def freeze_uncuttable(self) -> None:
        """Find out which channels cannot go and freeze them, before anything is switched off.

        Raises:
            BudgetError: without them the budget cannot be met.
        """

    @abstractmethod
    def cut(self) -> None:
        """Remove the channels that the masks left without weight, for good; writes model, optimizers, graph, masks."""

    @property
    def size(self) -> int:
        """The number of units."""
        return sum(mask.numel() for mask in self.masks.values())

    @property
    def fixed(self) -> int:
        """The number of units that no mask can switch off."""
        return 0

    @property
    def whole(self) -> int:
        """The number of all units, of which the budget is a share."""
        return self.size + self.fixed

    @property
    def off(self) -> int:
        """The number of units that are off."""
        return self.size - sum(int(mask.sum()) for mask in self.masks.values())

    def magnitudes(self) -> dict[str, Tensor]:
        """Return the magnitudes of `values()`; a unit that is off lies below all that are on, even if they are zero."""
        values = self.values()
        least = {name: torch.finfo(value.dtype).tiny for name, value in values.items()}
        return {name: torch.where(self.masks[name], values[name].abs() + least[name], 0.0) for name in values}

    def dropped(self, share: float) -> Masks:
        """Return masks that meet that share of the budget by dropping alone: what is off stays off."""
        wanted = self.topk_masks(self.magnitudes(), share)
        return {name: mask & wanted[name] for name, mask in self.masks.items()}

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Take other masks, and write the zeros that they want."""
        self.masks = dict(masks)
        self._zeros = self.zeros()
        self.enforce()

    @torch.no_grad()
    def enforce(self) -> None:
        """Write zeros wherever a unit is off: in the weights, their copies and what optimizers keep for them."""
        parameters = dict(self.graph.model.named_parameters())
        copies = [dict(copy.named_parameters()) for copy in self._copies]
        # NOTE: Momentum that stays where a unit is off would push the weight away from zero again in the next step, and
        # a unit that grows later would begin with the direction of long ago.
        for name, where in self._zeros.items():
            for weights in (parameters, *copies):
                weights[name].masked_fill_(where, 0)
            for optimizer in self._optimizers:
                for value in optimizer.state.get(parameters[name], {}).values():
                    if isinstance(value, Tensor) and value.shape == parameters[name].shape:
                        value.masked_fill_(where, 0)


def grad_magnitude(parameter: nn.Parameter) -> Tensor:
    """Return `|gradient|` of a parameter; zeros where it has none or it is not a number."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad.detach().abs().nan_to_num(nan=0.0)
