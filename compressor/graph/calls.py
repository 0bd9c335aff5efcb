"""One call of an operation: what is taken apart of it, so that it can be written down and compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_flatten

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
    """Return every tensor in a model's result, whatever container or object holds it."""
    for leaf in tree_flatten(value)[0]:
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):
            yield from tensors_in(dict(vars(leaf)))
