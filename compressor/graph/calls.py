"""One call of an operation: what is taken apart of it, so that it can be written down and compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from compressor.graph.context import Axes, Origin


class Call(NamedTuple):
    """One call of an operation: its arguments that are no tensors, its tensors, where they came from, their axes."""

    func: Any
    op: str
    non_tensor_args: tuple[Any, ...]
    inputs: list[Tensor]
    origins: tuple[Origin, ...]
    input_axes: tuple[Axes, ...]


def comparable_args(op: str, others: list[Any], tensors: list[Tensor]) -> tuple[Any, ...]:
    """Return an operation's arguments that are no tensors, as they stay when channels are removed."""
    # A depthwise convolution has as many blocks as channels: after a cut the number is another, and means the same.
    if op == "aten.convolution" and others[-1] == tensors[0].shape[1] > 1:
        return (*others[:-1], "channels")
    return tuple(others)


def partition_tensors(value: Any) -> tuple[list[Tensor], list[Any]]:
    """Return the tensors among an operation's arguments or results, and everything else, each in order."""
    tensors: list[Tensor] = []
    others: list[Any] = []
    _collect(value, tensors, others)
    return tensors, others


def _collect(value: Any, tensors: list[Tensor], others: list[Any]) -> None:
    # By hand: torch's pytree takes several times as long, and this runs twice for every operation.
    if isinstance(value, Tensor):
        tensors.append(value)
    elif isinstance(value, list | tuple):
        for each in value:
            _collect(each, tensors, others)
    elif isinstance(value, dict):
        for key, each in value.items():
            others.append(key)
            _collect(each, tensors, others)
    else:
        others.append(value)


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the dimensions from the slowest to the fastest in memory, or None where there are gaps or overlaps."""
    if tensor.is_contiguous():
        return tuple(range(tensor.dim()))
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda dim: -strides[dim]))
    expected = 1
    for dim in reversed(order):
        if tensor.shape[dim] != 1 and strides[dim] != expected:
            return None
        expected *= tensor.shape[dim]
    return order


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in a model's result, whatever container or object holds it; a generator among them runs."""
    waiting = [value]
    seen: set[int] = set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, Tensor):
            yield each
        elif id(each) not in seen and not isinstance(each, _NO_CONTAINERS):
            seen.add(id(each))
            waiting += _parts(each)


# Of these nobody hides a tensor in; an array has left torch for good.
_NO_CONTAINERS = (str, bytes, bytearray, int, float, complex, bool, type(None), type, np.ndarray, nn.Module)
_MOST_PARTS = 10_000  # of an iterable that may have no end


def _parts(value: Any) -> list[Any]:
    """Return what a container or an object holds: values of a mapping, elements, attributes, slots."""
    if isinstance(value, Mapping):
        return list(value.values())
    slots = [name for kind in type(value).__mro__ for name in _names(getattr(kind, "__slots__", ()))]
    found = [*vars(value).values()] if hasattr(value, "__dict__") else []
    found += [getattr(value, name) for name in slots if hasattr(value, name)]
    return found + _elements(value, required=not found)


def _elements(value: Any, required: bool) -> list[Any]:
    """Return what an object yields; where that fails, and it has parts besides, nothing."""
    if not isinstance(value, Iterable):
        return []
    try:
        return list(islice(value, _MOST_PARTS))
    except Exception:
        if required:
            raise
        return []


def _names(slots: str | Iterable[str]) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)
