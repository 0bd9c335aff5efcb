"""What a rule may do: read the axes of tensors, tie them, freeze them, and note roles and costs.

`Flow` is the notebook of one trace. The tracer fills in which operation runs and in which module; a rule (see
`compressor.graph.rules`) reads the axes of the operation's inputs and gives the axes of its outputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.graph.axes import FIXED, FREE, Axis, IntArray, Labels, blank
from compressor.graph.group import Offset, Role

Axes = tuple[Axis, ...]
Origin: TypeAlias = tuple[Any, ...]
Rule = Callable[..., Axes | list[Axes]]


class Source(NamedTuple):
    """One dimension of a parameter or buffer."""

    tensor: str
    dim: int


@dataclass(frozen=True, eq=False)
class Site:
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
class Known:
    """What the trace knows of one tensor.

    Attributes:
        axes: one entry per dimension.
        weight: the parameter or buffer it is a view or function of, where it depends on nothing else.
        made_by: the weight whose operation made it, as long as nothing else happened to it.
    """

    axes: Axes
    weight: str | None = None
    made_by: str | None = None


@dataclass(eq=False)
class Flow:
    """The notebook of one trace.

    Attributes:
        labels: all labels, and what is known of them.
        sources: the labels of every dimension of a parameter or buffer.
        parameters: the axes of every parameter and buffer that was used, by name.
        roles: which sources are an output or an input side of a weight.
        sites: where consumers see channels.
        costs: multiply-adds.
        offsets: by weight name, where a constant on its output can be put.
        kernels: sources that are no channels at all.
        normalised: by weight name, its result, where a BatchNorm reads it.
        indices: by name of a buffer of whole numbers, the axis whose positions they are.
        origins: by `id` of a tensor, where it comes from: an input, a parameter or constant, or a step of the trail.
        op, module: what runs now.
        says: tells whether the running module has a whole number of that value among its attributes.
    """

    labels: Labels = field(default_factory=Labels)
    sources: dict[Source, IntArray] = field(default_factory=dict)
    parameters: dict[str, Axes] = field(default_factory=dict)
    roles: dict[Source, Role] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    offsets: dict[str, Offset] = field(default_factory=dict)
    kernels: set[Source] = field(default_factory=set)
    normalised: dict[str, Tensor] = field(default_factory=dict)
    indices: dict[str, IntArray] = field(default_factory=dict)
    origins: dict[int, Origin] = field(default_factory=dict)
    op: str = ""
    module: str = ""
    says: Callable[[int], bool] = field(default=lambda value: False)
    _known: dict[int, Known] = field(default_factory=dict)
    _alive: dict[int, Any] = field(default_factory=dict)
    _starts: list[int] = field(default_factory=list)
    _ordered: list[Source] = field(default_factory=list)
    _uses: dict[int, int] = field(default_factory=dict)
    _sighted: set[str] = field(default_factory=set)
    _numbers: dict[int, Tensor] = field(default_factory=dict)

    # -- tensors

    def know(self, tensor: Tensor, known: Known) -> None:
        """Remember what is known of a tensor, as long as it lives; one without data is kept, so that its id stays."""
        number = id(tensor)
        if number not in self._known:
            self._alive[number] = tensor if tensor.is_meta else weakref.ref(tensor, lambda _: self.forget(number))
        self._known[number] = known

    def forget(self, number: int) -> None:
        """Know nothing any more of the tensor that had this id."""
        for table in (self._known, self._alive, self.origins, self._uses, self._numbers):
            table.pop(number, None)

    def takes_part(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is one of the run: an input, a stand-in or a result, and not a constant."""
        return id(tensor) in self._known or id(tensor) in self.origins

    def known(self, tensor: Tensor) -> Known:
        """Give what is known of a tensor; a tensor never seen is a constant without channels."""
        found = self._known.get(id(tensor))
        return found or Known(tuple(blank(size) for size in tensor.shape))

    def axes(self, tensor: Tensor) -> Axes:
        """Give the axes of a tensor, one per dimension."""
        return self.known(tensor).axes

    def weight(self, tensor: Tensor) -> str | None:
        """Give the name of the parameter that a tensor is made of alone, or None for activations and constants."""
        return self.known(tensor).weight

    def enter(self, tensor: Tensor, name: str, shape: Sequence[int]) -> None:
        """Give labels to every dimension of a parameter or buffer, the first time it is used."""
        axes = tuple(FREE if size == 1 else self._source(Source(name, dim), size) for dim, size in enumerate(shape))
        self.parameters[name] = axes
        self.know(tensor, Known(axes, weight=name))

    def _source(self, source: Source, size: int) -> IntArray:
        labels = self.sources[source] = self.labels.new(size)
        self._starts.append(int(labels[0]))
        self._ordered.append(source)
        return labels

    def keep_numbers(self, twin: Tensor, original: Tensor) -> None:
        """Remember the values behind a tensor without data, if they are whole numbers."""
        if not original.is_floating_point() and original.dtype != torch.bool:
            self._numbers[id(twin)] = original

    def positions(self, tensor: Tensor) -> NDArray[np.int64] | None:
        """Give the whole numbers in a buffer of the model, `(n,)`, or None where they are not known."""
        original = self._numbers.get(id(tensor))
        if original is None or original.is_meta or self.weight(tensor) is None or original.dim() != 1:
            return None
        return original.detach().cpu().numpy().astype(np.int64)

    def renumber(self, tensor: Tensor, axis: IntArray) -> bool:
        """Let a cut renumber the positions in a buffer; false if they are those of another axis already."""
        name = self.weight(tensor)
        assert name is not None
        return self.indices.setdefault(name, axis) is axis

    def source(self, axis: Axis) -> Source | None:
        """Give the parameter dimension whose labels these are (all or some of them), if they are a parameter's own."""
        if not isinstance(axis, np.ndarray):
            return None
        index = int(np.searchsorted(self._starts, axis[0], side="right")) - 1
        source = self._ordered[index] if index >= 0 else None
        inside = source and axis[0] <= self.sources[source][-1]
        return source if inside else None

    # -- channels

    def tie(self, *axes: Axis) -> Axis:
        """Tie axes position by position and give the common axis. What meets a FIXED axis is frozen."""
        arrays = [axis for axis in axes if isinstance(axis, np.ndarray)]
        if any(axis is FIXED for axis in axes):
            for array in arrays:
                self.freeze(array, "meets an axis without channels (batch, space, model input or a constant)")
            return FIXED if not arrays else arrays[0]
        for array in arrays[1:]:
            self.labels.tie(arrays[0], array)
        return arrays[0] if arrays else FREE

    def freeze(self, axes: Axis | Iterable[Axis], why: str) -> None:
        """Forbid every cut of these channels; the reason names the operation and the module."""
        reason = f"{self.op} in {self.module or 'the model'}: {why}" if self.op else why
        for axis in [axes] if isinstance(axes, np.ndarray) or not isinstance(axes, Iterable) else axes:
            self.labels.freeze(axis, reason)

    def no_channels(self, axes: Iterable[Axis]) -> None:
        """Note parameter dimensions that are no channels at all (the extent of a kernel): not worth a report."""
        for axis in axes:
            self.labels.freeze(axis, "not a channel dimension")
            source = self.source(axis)
            if source:
                self.kernels.add(source)

    def rectangle(self, axis: Axis, rows: int, tie: int) -> Axis:
        """Read an axis as `(rows, len // rows)`, tie along dimension `tie` (0: down the columns, 1: along the rows).

        Gives the labels of what is left: one per column, or one per row.
        """
        if not isinstance(axis, np.ndarray):
            return axis
        block = axis.reshape(rows, -1)
        first = np.take(block, [0], axis=tie)
        self.labels.tie(np.broadcast_to(first, block.shape).ravel(), block.ravel())
        return np.ascontiguousarray(first).ravel()

    def hold(self, tensor: Tensor, dim: int) -> None:
        """Note that a result depends on the size of a dimension; an expanded one can have any, so a cut checks it."""

    # -- roles, sites and costs

    def produce(self, axis: Axis) -> None:
        """Note that this axis of a weight is its output side."""
        self._role(axis, "producer")

    def consume(self, axis: Axis) -> None:
        """Note that this axis of a weight is its input side."""
        self._role(axis, "consumer")

    def _role(self, axis: Axis, role: Role) -> None:
        source = self.source(axis)
        if source:
            self.roles.setdefault(source, role)

    def see(self, weight: str | None, dim: int, axis: Axis) -> None:
        """Note that the module that owns `weight`, and is running now, sees these channels on dimension `dim`."""
        # NOTE: A module with several weights (attention) reads several inputs; its first one is not the whole story.
        if not weight or weight in self._sighted or weight != f"{self.module}.weight".removeprefix("."):
            return
        if isinstance(axis, np.ndarray):
            self._sighted.add(weight)
            self.sites.append(Site(weight, dim, axis))

    def cost(self, constant: int, axes: Iterable[tuple[Axis, int]]) -> None:
        """Note `constant` times the product of axes, each given with its size now."""
        arrays = []
        for axis, size in axes:
            if isinstance(axis, np.ndarray):
                arrays.append(axis)
            else:
                constant *= size
        self.costs.append(Cost(constant, tuple(arrays)))

    def sure_offsets(self) -> dict[str, Offset]:
        """Give the offsets, less running means behind a result that something else than the BatchNorm reads too."""
        shared = {weight for weight, result in self.normalised.items() if self._uses.get(id(result), 0) > 1}
        return {weight: offset for weight, offset in self.offsets.items() if weight not in shared or offset.sign > 0}

    def use(self, tensors: Iterable[Tensor]) -> None:
        """Count one more reader for each of these tensors."""
        for tensor in tensors:
            self._uses[id(tensor)] = self._uses.get(id(tensor), 0) + 1
