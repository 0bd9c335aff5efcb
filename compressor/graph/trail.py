"""What a trace leaves behind so that a cut can be held against it: every operation, and the channels on its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from compressor.graph.axes import FIXED, Axis, BoolArray, IntArray, Labels
from compressor.graph.flow import Axes, Flow, Known, Source


@dataclass(frozen=True, eq=False)
class Step:
    """One operation: its name, the module it ran in, the axes of its inputs and results, and the results' shapes."""

    op: str
    module: str
    inputs: tuple[Axes, ...]
    results: tuple[Axes, ...]
    shapes: tuple[tuple[int, ...], ...]


@dataclass(eq=False)
class Trail:
    """All steps of a trace.

    Attributes:
        steps: in the order in which they ran.
        journal: every axis that was handed out, in order.
        of: the class of each label that steps and journal use.
        parameters: the axes of every parameter and buffer that was used, by name.
        channels: by group name, the class of each channel, `(C,)`.
        meta: whether the model ran on tensors without data.
    """

    steps: list[Step] = field(default_factory=list)
    journal: list[list[Axis]] = field(default_factory=list)
    parameters: dict[str, Axes] = field(default_factory=dict)
    of: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    channels: dict[str, IntArray] = field(default_factory=dict)
    meta: bool = True

    def after(self, axis: Axis, removed: BoolArray) -> Axis:
        """Give an axis as it must be when the removed classes are gone."""
        if not isinstance(axis, np.ndarray):
            return axis
        classes = self.of[axis]
        return classes[~removed[classes]]

    def groups_at(self, steps: Sequence[Step], removed: BoolArray) -> list[str]:
        """Give the names of groups that lose channels and stand on an axis of one of these steps."""
        axes = [axis for step in steps for each in (*step.inputs, *step.results) for axis in each]
        arrays = [self.of[axis] for axis in axes if isinstance(axis, np.ndarray)]
        here = np.zeros_like(removed)
        here[np.concatenate([*arrays, np.empty(0, dtype=np.int64)])] = True
        here &= removed
        return [name for name, classes in self.channels.items() if here[classes].any()]


class Mismatch(Exception):
    """The cut model did something that the trace does not explain; `step` is where."""

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(reason)
        self.step = step


class ReplayLabels(Labels):
    """Hands out what the journal says, less the removed channels, and finds nothing out anew."""

    def __init__(self, trail: Trail, removed: BoolArray, here: Callable[[], int]) -> None:
        super().__init__()
        self._trail, self._removed, self._here = trail, removed, here

    def _next(self, sizes: Sequence[int]) -> list[Axis]:
        if len(self.journal) >= len(self._trail.journal):
            raise Mismatch("the cut model does more than the whole one did", self._here())
        found = [self._trail.after(axis, self._removed) for axis in self._trail.journal[len(self.journal)]]
        for axis, size in zip(found, sizes, strict=True):
            if isinstance(axis, np.ndarray) and len(axis) != size:
                raise Mismatch(f"a size of {size} stands where the cut leaves {len(axis)}", self._here())
        self.journal.append(found)
        return found

    def fresh(self, size: int) -> IntArray:
        """Give what was given here the first time, less the removed channels."""
        return _array(self._next([size])[0])

    def join(self, arrays: Sequence[IntArray]) -> IntArray:
        """Give what was given here the first time, less the removed channels."""
        return _array(self._next([int(np.prod([len(array) for array in arrays]))])[0])

    def part(self, axis: IntArray, sizes: Sequence[int]) -> list[Axis]:
        """Give what was given here the first time, less the removed channels."""
        if len(sizes) != len(self._trail.journal[min(len(self.journal), len(self._trail.journal) - 1)]):
            raise Mismatch(f"a view into {tuple(sizes)} has other dimensions than before the cut", self._here())
        return self._next(sizes)

    def tie(self, first: IntArray, second: IntArray) -> None:
        """Everything is tied already: what meets must be the same channels."""
        if not np.array_equal(first, second):
            raise Mismatch("channels meet that do not belong together", self._here())

    def freeze(self, axis: Axis, reason: str) -> None:
        """Nothing is found out anew."""

    def mark_inexact(self, axis: Axis) -> None:
        """Nothing is found out anew."""

    def mark_mixed(self, axis: Axis) -> None:
        """Nothing is found out anew."""


class ReplayFlow(Flow):
    """A notebook that follows a trail; roles, sites and costs are known already."""

    def __init__(self, trail: Trail, removed: BoolArray) -> None:
        self.steps: list[Step] = []
        super().__init__(ReplayLabels(trail, removed, lambda: len(self.steps)))
        self._trail, self._removed = trail, removed

    def enter(self, tensor: Tensor, name: str, shape: Sequence[int]) -> None:
        """Give the labels that this parameter had, less the removed channels."""
        axes = tuple(self._trail.after(axis, self._removed) for axis in self._trail.parameters[name])
        self.parameters[name] = axes
        self.know(tensor, Known(axes, weight=name))

    def source(self, axis: Axis) -> Source | None:
        """Roles are known already."""
        return None

    def freeze(self, axes: object, why: str) -> None:
        """Nothing is found out anew."""


def compare(trail: Trail, index: int, step: Step, removed: BoolArray) -> None:
    """Hold one step of the cut model against the same step of the whole one. Raises Mismatch."""
    if index >= len(trail.steps):
        raise Mismatch("the cut model runs more operations than the whole one did", index)
    before = trail.steps[index]
    if before.op != step.op or len(before.results) != len(step.results):
        raise Mismatch(f"{step.op} runs where {before.op} ran before the cut", index)
    for axes, shape, now, size in zip(before.results, before.shapes, step.results, step.shapes, strict=True):
        for dim, axis in enumerate(axes):
            wanted = trail.after(axis, removed)
            if not _same(wanted, shape[dim], now[dim] if dim < len(now) else FIXED, size[dim]):
                left = len(wanted) if isinstance(wanted, np.ndarray) else shape[dim]
                found = "other channels" if size[dim] == left else f"a size of {size[dim]}"
                raise Mismatch(f"dimension {dim} of its result has {found} where the cut leaves {left}", index)


def _same(wanted: Axis, before: int, now: Axis, size: int) -> bool:
    if isinstance(wanted, np.ndarray):
        return np.array_equal(wanted, now) if isinstance(now, np.ndarray) else len(wanted) == size == 1
    return wanted is not FIXED or size == before


def _array(axis: Axis) -> IntArray:
    assert isinstance(axis, np.ndarray)
    return axis


def shapes_of(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Give the shapes of tensors as plain tuples."""
    return tuple(tuple(tensor.shape) for tensor in tensors)
