"""All or nothing: tensors, gradients, optimizer state and attributes are written here, and can all be put back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from compressor._utils import memory_format
from compressor.errors import CutError, InputError
from compressor.graph import (
    named_model_tensors,
    numeric_attributes,
    replace_data,
    set_numeric_attributes,
    sync_size_attributes,
)

# What torch's optimizers call their running mean of gradients or steps.
_FIRST_MOMENTS = {"momentum_buffer", "exp_avg"}


class Transaction:
    """Writes a model, copies of it and the optimizers' state, and remembers how to put everything back.

    Args:
        model: the model that is cut.
        copies: models with tensors of the same names and shapes, which get the same cuts.
        optimizers: whose state follows.

    Attributes:
        tensors: parameters and buffers by name, of the model and of each copy.

    Raises:
        InputError: a copy of another model.
    """

    def __init__(self, model: nn.Module, copies: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
        self._copies = copies
        self._optimizers = optimizers
        self._modules = [dict(each.named_modules()) for each in (model, *copies)]
        self.tensors = [named_model_tensors(modules) for modules in self._modules]
        require_alike(self.tensors[0], copies)
        self._data: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        self._state: list[tuple[dict[str, Any], str, Any]] = []
        every = [module for modules in self._modules for module in modules.values()]
        self._attributes = [(module, type(module), dict(vars(module))) for module in every]
        numbered = self._modules[0] if copies else {}
        self._numbers = {name: copy.deepcopy(numeric_attributes(each)) for name, each in numbered.items()}

    def narrow(self, name: str, stays: Mapping[int, Tensor]) -> None:
        """Leave only some positions along dimensions of a tensor, its gradient and its optimizer state."""
        for tensor in (tensors[name] for tensors in self.tensors):
            self._remember(tensor)
            gradient, shape = tensor.grad, tensor.shape
            tensor.grad = None
            self._narrow_state(name, tensor, shape, stays)
            replace_data(tensor, _taken(tensor.data, stays))
            if gradient is not None:
                tensor.grad = _taken(gradient, stays)

    def _narrow_state(self, name: str, tensor: Tensor, shape: torch.Size, stays: Mapping[int, Tensor]) -> None:
        for optimizer in self._optimizers:
            state = optimizer.state.get(tensor, {})
            for key, value in list(state.items()):
                if not isinstance(value, Tensor):
                    _require_no_tensors(optimizer, name, key, value)
                    continue
                if value.numel() == 1:
                    continue
                if value.shape != shape:
                    raise CutError(
                        f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for {name!r} of shape "
                        f"{tuple(shape)}, which does not say what belongs to a channel; use SGD, Adam(W) or RMSprop"
                    )
                self._state.append((state, key, value))
                state[key] = _taken(value, stays)

    def add(self, tensor: Tensor, amount: Tensor) -> None:
        """Add to a tensor, into new memory so that the old values can come back."""
        self._remember(tensor)
        tensor.data = tensor.data + amount.to(tensor)

    def add_linear(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Add a linear function of itself to a weight, and to every first moment that an optimizer keeps of it.

        Momentum is a sum of steps of the weight, so it moves as the weight does; a second moment has no direction.
        The gradient stays: the slope by a weight does not depend on what was added to it.
        """
        for tensors in self.tensors:
            tensor = tensors[name]
            self._remember(tensor)
            tensor.data = tensor.data + change(tensor.data)
            for optimizer in self._optimizers:
                state = optimizer.state.get(tensor, {})
                for key in _FIRST_MOMENTS & state.keys():
                    if isinstance(value := state[key], Tensor) and value.shape == tensor.shape:
                        self._state.append((state, key, value))
                        state[key] = value + change(value)

    def renumber(self, name: str, new: Tensor) -> None:
        """Replace every position in a buffer of positions by its new number."""
        for tensor in (tensors[name] for tensors in self.tensors):
            self._remember(tensor)
            tensor.data = new.to(tensor.device)[tensor.data.long()].to(tensor.dtype)

    def refit_copies(self) -> None:
        """Give the copies the numbers that changed among the model's attributes; others, a dropout's, are their own."""
        changed = {}
        for name, before in self._numbers.items():
            now = numeric_attributes(self._modules[0][name])
            changed[name] = {key: value for key, value in now.items() if before.get(key) != value}
        for each, modules in zip(self._copies, self._modules[1:], strict=True):
            sync_size_attributes(each)
            for name, module in modules.items():
                set_numeric_attributes(module, changed.get(name, {}))

    def _remember(self, tensor: Tensor) -> None:
        self._data.setdefault(id(tensor), (tensor, tensor.data, tensor.grad))

    def undo(self) -> None:
        """Put everything back, bit for bit."""
        for tensor, data, gradient in self._data.values():
            tensor.grad = None
            replace_data(tensor, data)
            tensor.grad = gradient
        for state, key, value in reversed(self._state):
            state[key] = value
        for module, kind, attributes in self._attributes:
            module.__class__ = kind
            module.__dict__.update(attributes)


def _taken(tensor: Tensor, stays: Mapping[int, Tensor]) -> Tensor:
    # NOTE: All dimensions of a tensor at once, so that what lies between is given back before the next one is made:
    # on a CPU, fresh memory takes longer than filling it.
    order = memory_format(tensor)
    for dim, positions in sorted(stays.items()):
        tensor = tensor.index_select(dim, positions.to(tensor.device))
    return tensor.contiguous(memory_format=order)


def _require_no_tensors(optimizer: Optimizer, name: str, key: str, value: Any) -> None:
    if any(isinstance(leaf, Tensor) and leaf.numel() > 1 for leaf in tree_leaves(value)):
        kind = type(value).__name__
        raise CutError(
            f"{type(optimizer).__name__} keeps {key!r}, a {kind} of tensors, for {name!r}, which does not say what "
            "belongs to a channel; use SGD, Adam(W) or RMSprop"
        )


def require_alike(tensors: Mapping[str, Tensor], copies: Iterable[nn.Module]) -> None:
    """Raise InputError if a copy has not the parameters and buffers of these names and shapes."""
    for each in copies:
        others = named_model_tensors(dict(each.named_modules()))
        shapes = [{name: tuple(tensor.shape) for name, tensor in found.items()} for found in (tensors, others)]
        for name in sorted(shapes[0].keys() | shapes[1].keys()):
            here, there = (found.get(name, "absent") for found in shapes)
            if here != there:
                raise InputError(
                    f"{type(each).__name__} is no copy of the model: {name!r} is {there} there and {here} in the "
                    "model; of an AveragedModel pass its .module"
                )
