"""What a rule may do: read the axes of tensors, tie them, freeze them, and note roles and costs.

`TraceContext` is the state of one trace. The recorder says which operation runs and in which module; a rule (see
`compressor.graph.rules`) reads the axes of the operation's inputs and returns the axes of its outputs.
"""

# A worked example: what is in the context when the second of two convolutions (3 -> 4 -> 2, no bias, 1 x 1, named "0"
# and "1") has run on images of 8 x 8.
#
#   parameter_dims   ("0.weight", 0): [0 1 2 3]   ("0.weight", 1): [4 5 6]
#                    ("1.weight", 0): [7 8]       ("1.weight", 1): [9 10 11 12]        kernels of 1 x 1 are BROADCAST
#   roles            producer, consumer, producer, consumer
#   sites            ("1.weight", dim -3, [0 1 2 3])     where module "1" sees the four channels
#   costs            64 * 1 image * [0 1 2 3] * [4 5 6]   and   64 * 1 image * [7 8] * [9 10 11 12]   multiply-adds
#   labels           tied 0-9, 1-10, 2-11, 3-12; frozen 4 5 6 (the model's input), and at the end 7 8 (its output)

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.graph.axes import BROADCAST, UNPRUNABLE, Axis, IntArray, Labels, unlabeled
from compressor.graph.group import Offset, Role, owner

Axes = tuple[Axis, ...]
Origin: TypeAlias = tuple[Any, ...]
Rule = Callable[..., Axes | list[Axes]]


class ParameterDim(NamedTuple):
    """One dimension of a parameter or buffer, by its name."""

    tensor: str
    dim: int


@dataclass(frozen=True, eq=False)
class ConsumerSite:
    """An input of a module where a consumer sees channels: dimension `dim` (negative) carries `axis`."""

    weight: str
    dim: int
    axis: IntArray


@dataclass(frozen=True, eq=False)
class Cost:
    """Multiply-adds of one operation: `constant` times the sizes of these labelled axes."""

    constant: int
    axes: tuple[IntArray, ...]


@dataclass(eq=False)
class TensorInfo:
    """What the trace knows of one tensor.

    Attributes:
        axes: one entry per dimension.
        weight: the parameter or buffer it is a view or function of, where it depends on no activation. Of several (a
            weight and its mask) the first parameter.
        unchanged: whether it has the values of `weight`, in another order perhaps.
        produced_by: the weight whose operation made it, as long as nothing else happened to it.
        product_of: the weight of a matrix product that made it, which may still get a bias.
    """

    axes: Axes
    weight: str | None = None
    unchanged: bool = False
    produced_by: str | None = None
    product_of: str | None = None


def _constant_axis(size: int, stride: int) -> Axis:
    # What was expanded has no positions of its own: it fits whatever it meets.
    return BROADCAST if stride == 0 else unlabeled(size)


@dataclass(eq=False)
class TraceContext:
    """The state of one trace.

    Attributes:
        labels: all labels, and what is known of them.
        parameter_dims: the labels of every dimension of a parameter or buffer.
        parameters: the axes of every parameter and buffer that was used, by name.
        roles: which parameter dimensions are an output or an input side of a weight.
        sites: where consumers see channels.
        costs: multiply-adds.
        offsets: by weight name, where a constant on its output can be put.
        layouts: by weight name, `input_dim` and `share` of such an offset, where they are not the usual ones.
        kernel_dims: parameter dimensions that are no channels at all.
        batch_norm_inputs: by weight name, its result, where a BatchNorm reads it.
        bias_inputs: by weight name, its product, where an operation of its own adds a bias to it.
        indices: by name of a buffer of whole numbers, the axis whose positions they are.
        origins: by `id` of a tensor, where it comes from: an input, a parameter or constant, or an operation.
        notes: what the user should know, by the operation that it is about.
        buffers: names of the model's tensors that are no parameters.
        op, module: what runs now.
        has_size_attribute: tells whether the running module has a whole number of that value among its attributes.
    """

    labels: Labels = field(default_factory=Labels)
    parameter_dims: dict[ParameterDim, IntArray] = field(default_factory=dict)
    parameters: dict[str, Axes] = field(default_factory=dict)
    roles: dict[ParameterDim, Role] = field(default_factory=dict)
    sites: list[ConsumerSite] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    offsets: dict[str, Offset] = field(default_factory=dict)
    layouts: dict[str, tuple[Literal[0, 1], float]] = field(default_factory=dict)
    kernel_dims: set[ParameterDim] = field(default_factory=set)
    batch_norm_inputs: dict[str, Tensor] = field(default_factory=dict)
    bias_inputs: dict[str, Tensor] = field(default_factory=dict)
    indices: dict[str, IntArray] = field(default_factory=dict)
    origins: dict[int, Origin] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    buffers: Collection[str] = ()
    op: str = ""
    module: str = ""
    has_size_attribute: Callable[[int], bool] = field(default=lambda value: False)
    _info: dict[int, TensorInfo] = field(default_factory=dict)
    _alive: dict[int, Any] = field(default_factory=dict)
    _first_labels: list[int] = field(default_factory=list)
    _dims_in_order: list[ParameterDim] = field(default_factory=list)
    _uses: dict[int, int] = field(default_factory=dict)
    _weight_uses: Counter[str] = field(default_factory=Counter)
    _recorded_consumers: set[str] = field(default_factory=set)
    _integer_values: dict[int, Tensor] = field(default_factory=dict)

    # -- tensors

    def set_labels(self, tensor: Tensor, info: TensorInfo) -> None:
        """Remember what is known of a tensor, as long as it lives; one without data is kept, so that its id stays."""
        key = id(tensor)
        if key not in self._info:
            # Python gives the id of a dead object to the next one, which would inherit its labels. A meta tensor costs
            # nothing to keep alive; one with data does, so that what is known of it is dropped together with it.
            self._alive[key] = tensor if tensor.is_meta else weakref.ref(tensor, lambda _: self.forget(key))
        self._info[key] = info

    def forget(self, key: int) -> None:
        """Know nothing any more of the tensor that had this id."""
        for table in (self._info, self._alive, self.origins, self._uses, self._integer_values):
            table.pop(key, None)

    def is_traced(self, tensor: Tensor) -> bool:
        """Return whether a tensor is one of the run: an input, a stand-in or a result, and not a constant."""
        return id(tensor) in self._info or id(tensor) in self.origins

    def info(self, tensor: Tensor) -> TensorInfo:
        """Return what is known of a tensor; a tensor never seen is a constant without channels."""
        found = self._info.get(id(tensor))
        if found is not None:
            return found
        strides = tensor.stride() if tensor.layout == torch.strided else tensor.shape
        return TensorInfo(tuple(map(_constant_axis, tensor.shape, strides)))

    def axes(self, tensor: Tensor) -> Axes:
        """Return the axes of a tensor, one per dimension."""
        return self.info(tensor).axes

    def weight(self, tensor: Tensor) -> str | None:
        """Return the name of the parameter that a tensor is made of alone, or None for activations and constants."""
        return self.info(tensor).weight

    def main_weight(self, tensors: Sequence[Tensor]) -> str | None:
        """Return the name of the parameter, or else of the buffer, that tensors are made of alone; None for others."""
        names = [self.weight(tensor) for tensor in tensors]
        if not names or not all(names):
            return None
        return min(names, key=lambda name: name in self.buffers)

    def is_buffer(self, tensor: Tensor) -> bool:
        """Return whether a tensor is made of buffers alone: what a model keeps for its weights, such as a mask."""
        return self.weight(tensor) in self.buffers

    def label_parameter(self, tensor: Tensor, name: str, shape: Sequence[int]) -> None:
        """Give labels to every dimension of a parameter or buffer, the first time it is used."""
        axes = tuple(
            BROADCAST if size == 1 else self._labelled_dim(ParameterDim(name, dim), size)
            for dim, size in enumerate(shape)
        )
        self.parameters[name] = axes
        self.set_labels(tensor, TensorInfo(axes, weight=name, unchanged=True))

    def _labelled_dim(self, dim: ParameterDim, size: int) -> IntArray:
        labels = self.parameter_dims[dim] = self.labels.allocate(size)
        self._first_labels.append(int(labels[0]))
        self._dims_in_order.append(dim)
        return labels

    def keep_values(self, stand_in: Tensor, original: Tensor) -> None:
        """Remember the values behind a tensor without data, if they are whole numbers."""
        if not original.is_floating_point() and original.dtype != torch.bool:
            self._integer_values[id(stand_in)] = original

    def index_values(self, tensor: Tensor) -> NDArray[np.int64] | None:
        """Return the whole numbers in a buffer of the model, `(n,)`, or None where they are not known."""
        original = self._integer_values.get(id(tensor))
        if original is None or original.is_meta or self.weight(tensor) is None or original.dim() != 1:
            return None
        return original.detach().cpu().numpy().astype(np.int64)

    def register_index_buffer(self, tensor: Tensor, axis: IntArray) -> bool:
        """Let a cut renumber the positions in a buffer; false if they are those of another axis already."""
        name = self.weight(tensor)
        assert name is not None
        return self.indices.setdefault(name, axis) is axis

    def parameter_dim(self, axis: Axis) -> ParameterDim | None:
        """Return the parameter dimension whose labels these are (all or some), if they are a parameter's own."""
        if not isinstance(axis, np.ndarray):
            return None
        # Labels are handed out in order, so that the dimension they belong to is found by bisection.
        index = bisect_right(self._first_labels, axis[0]) - 1
        dim = self._dims_in_order[index] if index >= 0 else None
        inside = dim and axis[0] <= self.parameter_dims[dim][-1]
        return dim if inside else None

    # -- channels

    def tie(self, *axes: Axis) -> Axis:
        """Tie axes position by position and return the common axis. What meets an UNPRUNABLE axis is frozen."""
        arrays = [axis for axis in axes if isinstance(axis, np.ndarray)]
        # Labels stay on the axis that is frozen: what it meets later must hear of the reason, not stay prunable.
        if any(axis is UNPRUNABLE for axis in axes):
            for array in arrays:
                self.freeze(array, "meets an axis without channels (batch, space, model input or a constant)")
            return UNPRUNABLE if not arrays else arrays[0]
        for array in arrays[1:]:
            self.labels.tie(arrays[0], array)
        return arrays[0] if arrays else BROADCAST

    def freeze(self, axes: Axis | Iterable[Axis], why: str) -> None:
        """Forbid every cut of these channels; the reason names the operation and the module."""
        reason = f"{self.op} in {self.module or 'the model'}: {why}" if self.op else why
        for axis in [axes] if isinstance(axes, np.ndarray) or not isinstance(axes, Iterable) else axes:
            self.labels.freeze(axis, reason)

    def note(self, op: str, text: str) -> None:
        """Keep what the user should know about an operation, once for each."""
        self.notes.setdefault(op, text)

    def mark_kernel_dims(self, axes: Iterable[Axis]) -> None:
        """Note parameter dimensions that are no channels at all (the extent of a kernel): not worth a report."""
        for axis in axes:
            self.labels.freeze(axis, "not a channel dimension")
            dim = self.parameter_dim(axis)
            if dim:
                self.kernel_dims.add(dim)

    def rectangle(self, axis: Axis, rows: int, tie: int) -> Axis:
        """Read an axis as `(rows, len // rows)`, tie along dimension `tie` (0: down the columns, 1: along the rows).

        Returns:
            The labels of what is left: one per column, or one per row.
        """
        if not isinstance(axis, np.ndarray) or (1, len(axis))[tie] == rows:
            return axis  # nothing is tied: one row down its columns, or rows of one
        block = axis.reshape(rows, -1)
        first = np.take(block, [0], axis=tie)
        self.labels.tie(np.broadcast_to(first, block.shape).ravel(), block.ravel())
        return np.ascontiguousarray(first).ravel()

    def was_labelled(self, tensor: Tensor, dim: int) -> bool:
        """Return whether `dim` of the result carried channels before a cut that left this tensor smaller."""
        return False

    def require_size(self, tensor: Tensor, dim: int) -> None:
        """Note that a result depends on the size of a dimension; an expanded one can have any, so a cut checks it."""

    # -- roles, sites and costs

    def mark_producer(self, axis: Axis) -> None:
        """Note that this axis of a weight is its output side."""
        self._role(axis, "producer")

    def mark_consumer(self, axis: Axis) -> None:
        """Note that this axis of a weight is its input side."""
        self._role(axis, "consumer")

    def _role(self, axis: Axis, role: Role) -> None:
        dim = self.parameter_dim(axis)
        if dim:
            self.roles.setdefault(dim, role)

    def record_consumer(self, weight: str | None, dim: int, axis: Axis) -> None:
        """Note that the module that owns `weight`, and is running now, sees these channels on dimension `dim`."""
        # NOTE: A module with several weights (attention) reads several inputs; its first one is not the whole story.
        if weight and owner(weight) != (self.module, "weight"):
            # By another module, to which it is tied, or by a function: its owner's input is not all that it multiplies.
            self._recorded_consumers.add(weight)
            self.sites = [site for site in self.sites if site.weight != weight]
            return
        if not weight or weight in self._recorded_consumers:
            return
        if isinstance(axis, np.ndarray):
            self._recorded_consumers.add(weight)
            self.sites.append(ConsumerSite(weight, dim, axis))

    def cost(self, constant: int, axes: Iterable[tuple[Axis, int]]) -> None:
        """Note `constant` times the product of axes, each given with its size now."""
        arrays = []
        for axis, size in axes:
            if isinstance(axis, np.ndarray):
                arrays.append(axis)
            else:
                constant *= size
        self.costs.append(Cost(constant, tuple(arrays)))

    def unshared_offsets(self) -> dict[str, Offset]:
        """Return the offsets, less those behind a result that is also read by something that they do not reach.

        And less those that somebody else reads: a BatchNorm that is called behind two convolutions has one running mean
        for both.
        """
        # A bias in the operation reaches all readers of the result; a running mean the BatchNorm alone, a bias that is
        # added afterwards the sum alone, and others would differ.
        shared = {weight for weight, result in self.batch_norm_inputs.items() if self._uses.get(id(result), 0) > 1}
        early = {weight for weight, result in self.bias_inputs.items() if self._uses.get(id(result), 0) > 1}
        # A weight that is used twice (two modules share it, or one is called twice) has an input mean at each use.
        read_twice = {
            str(at[1]) for key, at in self.origins.items() if at[0] == "tensor" and self._uses.get(key, 0) > 1
        }
        once = {
            weight: offset
            for weight, offset in self.offsets.items()
            if self._weight_uses[weight] == 1 and weight not in early and offset.tensor not in read_twice
        }
        return {weight: offset for weight, offset in once.items() if weight not in shared or offset.sign > 0}

    def set_offset(self, weight: str | None, offset: Offset | None) -> None:
        """Note a use of a weight, and where a constant on its output can be put, if there is such a place."""
        if weight:
            self._weight_uses[weight] += 1
            if offset:
                self.offsets[weight] = offset

    def remember_added_bias(self, one: Tensor, other: Tensor) -> None:
        """Note that a sum may be that of a product and its bias.

        So computes torch a Linear with a bias whose input does not lie in one piece: mm, _unsafe_view, add.
        """
        for product, bias in ((one, other), (other, one)):
            weight, target = self.info(product).product_of, self.info(bias)
            if weight and target.weight and target.unchanged and bias.shape == product.shape[-1:]:
                self.offsets[weight] = Offset(target.weight, 1, *self.layouts.get(weight, ()))
                self.bias_inputs[weight] = product

    def count_use(self, tensors: Iterable[Tensor]) -> None:
        """Count one more reader for each of these tensors."""
        for tensor in tensors:
            self._uses[id(tensor)] = self._uses.get(id(tensor), 0) + 1
