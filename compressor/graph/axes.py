"""Channel identity along an axis: labels, merging, splitting. Pure index algebra, no model in sight.

Every axis of every tensor is one of three things:

* an array of *labels*, one per position: two positions with the same label are the same channel;
* `Blank.FIXED`: positions that nobody cuts (batch, space, model inputs);
* `Blank.FREE`: the same value at every position (size one, expanded, filled): it fits whatever it meets.

Labels are only ever tied, frozen or marked while a model runs; `Labels.solve` then finds the classes at once. What was
handed out is kept in a journal, in order, so that a run of the cut model can be held against it.

Merging two labelled axes, or splitting one into two, gives a *rectangle*: position `(i, j)` of the whole belongs to row
`i` and column `j`. A cut must leave a rectangle, so either rows or columns can go, not both. Which one is decided
last, when everything that forbids one of them is known.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

IntArray: TypeAlias = NDArray[np.int64]
BoolArray: TypeAlias = NDArray[np.bool_]


class Blank(enum.Enum):
    """An axis without channels."""

    FIXED = "fixed"
    FREE = "free"


FIXED, FREE = Blank.FIXED, Blank.FREE
Axis: TypeAlias = IntArray | Blank


def blank(size: int) -> Blank:
    """Give the axis of that size that carries no channels."""
    return FREE if size == 1 else FIXED


@dataclass(frozen=True, eq=False)
class Rectangle:
    """An axis and its factors: `whole`, reshaped to their lengths, is at `[i, j, ...]` what is on row i, column j."""

    whole: IntArray
    factors: tuple[IntArray, ...]

    def rows(self, chosen: int) -> tuple[IntArray, IntArray]:
        """Give two equally long arrays: the whole's labels, and the chosen factor's label at each of them."""
        shape = [len(factor) for factor in self.factors]
        lines = [1] * len(shape)
        lines[chosen] = shape[chosen]
        return self.whole, np.broadcast_to(self.factors[chosen].reshape(lines), shape).ravel()


@dataclass(frozen=True, eq=False)
class Classes:
    """The solved labels.

    Attributes:
        of: `(number of labels,)` the class of each label.
        reasons: by class that is frozen, why.
        inexact: classes for which silencing and cutting differ.
    """

    of: IntArray
    reasons: dict[int, str]
    inexact: frozenset[int]


class Labels:
    """All labels of one trace, and what is known about them."""

    def __init__(self) -> None:
        self.count = 0
        self.journal: list[list[Axis]] = []
        self.rectangles: list[Rectangle] = []
        self._ties: list[tuple[IntArray, IntArray]] = []
        self._frozen: list[tuple[IntArray, str]] = []
        self._inexact: list[IntArray] = []
        self._mixed: list[IntArray] = []
        self._whole: dict[int, Rectangle] = {}
        self._corner: dict[int, tuple[Rectangle, int]] = {}

    # -- what is recorded while the model runs

    def fresh(self, size: int) -> IntArray:
        """Give labels that nothing else has, and write them into the journal."""
        labels = self.new(size)
        self.journal.append([labels])
        return labels

    def new(self, size: int) -> IntArray:
        """Give labels that nothing else has."""
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def tie(self, first: IntArray, second: IntArray) -> None:
        """Make two equally long arrays of labels the same channels, position by position."""
        if first is not second:
            self._ties.append((first, second))

    def freeze(self, axis: Axis, reason: str) -> None:
        """Forbid every cut of these channels."""
        if isinstance(axis, np.ndarray):
            self._frozen.append((axis, reason))

    def mark_inexact(self, axis: Axis) -> None:
        """Note that channels of this axis are mixed without a weight: silencing is not cutting."""
        if isinstance(axis, np.ndarray):
            self._inexact.append(axis)

    def mark_mixed(self, axis: Axis) -> None:
        """Note that two activations are contracted over this axis: of a rectangle, rather cut another side."""
        if isinstance(axis, np.ndarray):
            self._mixed.append(axis)
            self._inexact.append(axis)

    # -- merging and splitting

    def merge(self, axes: Sequence[Axis], sizes: Sequence[int]) -> Axis:
        """Give the axis that flattening `axes` (first one slowest) results in."""
        arrays = [axis for axis in axes if isinstance(axis, np.ndarray)]
        if not arrays:
            return FREE if all(axis is FREE for axis in axes) else FIXED
        core = arrays[0] if len(arrays) == 1 else self.join(arrays)
        shape = [size if isinstance(axis, np.ndarray) else 1 for axis, size in zip(axes, sizes, strict=True)]
        return np.broadcast_to(core.reshape(shape), sizes).ravel()

    def split(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """Give the axes that unflattening `axis` into `sizes` results in; the inverse of `merge`."""
        if not isinstance(axis, np.ndarray):
            return [FREE if size == 1 else axis for size in sizes]
        if len(sizes) == 1:
            return [axis]
        result: list[Axis] = [blank(size) for size in sizes]
        wide = [index for index, size in enumerate(sizes) if size > 1]
        kept = self.part(axis, [sizes[index] for index in wide])
        for index, factor in zip(wide, kept, strict=True):
            result[index] = factor
        return result

    def join(self, arrays: Sequence[IntArray]) -> IntArray:
        """Give the labels of several labelled axes flattened into one."""
        whole = self._known_whole(arrays)
        if whole is None:
            whole = self._rectangle(self.new(math.prod(map(len, arrays))), arrays).whole
        self.journal.append([whole])
        return whole

    def part(self, axis: IntArray, sizes: Sequence[int]) -> list[Axis]:
        """Give the axes of a labelled axis reshaped to `sizes`, all of them larger than one."""
        factors = self._parted(axis, sizes)
        self.journal.append(factors)
        return factors

    def _parted(self, axis: IntArray, sizes: Sequence[int]) -> list[Axis]:
        if len(sizes) == 1:
            return [axis]
        block = axis.reshape(tuple(sizes))
        for index in range(len(sizes)):
            line = block[tuple(slice(None) if i == index else 0 for i in range(len(sizes)))]
            if (np.moveaxis(block, index, -1) == line).all():
                return [line if i == index else FIXED for i in range(len(sizes))]
        known = self._whole.get(int(axis[0]))
        if known and [len(f) for f in known.factors] == list(sizes) and np.array_equal(known.whole, axis):
            return list(known.factors)
        return list(self._rectangle(axis, [self.new(size) for size in sizes]).factors)

    def _known_whole(self, arrays: Sequence[IntArray]) -> IntArray | None:
        """Undo an earlier split, in whatever order its sides come back (a channel shuffle swaps them)."""
        corners = [self._corner.get(int(array[0])) for array in arrays]
        rectangle = corners[0][0] if corners[0] else None
        if rectangle is None or any(corner is None or corner[0] is not rectangle for corner in corners):
            return None
        order = [corner[1] for corner in corners if corner]
        same = all(np.array_equal(rectangle.factors[i], a) for i, a in zip(order, arrays, strict=True))
        if sorted(order) != list(range(len(rectangle.factors))) or not same:
            return None
        return rectangle.whole.reshape([len(f) for f in rectangle.factors]).transpose(order).ravel()

    def _rectangle(self, whole: IntArray, factors: Sequence[IntArray]) -> Rectangle:
        rectangle = Rectangle(whole, tuple(factors))
        self.rectangles.append(rectangle)
        self._whole[int(whole[0])] = rectangle
        for index, factor in enumerate(factors):
            self._corner[int(factor[0])] = (rectangle, index)
        return rectangle

    # -- solving

    def solve(self) -> Classes:
        """Find the classes of labels, decide the side of every rectangle, and spread freezing over each class."""
        solver = _Solver(self.count, self._ties)
        for axis, reason in self._frozen:
            solver.freeze(axis, reason)
        mixed = np.concatenate([*self._mixed, np.empty(0, dtype=np.int64)])
        chosen: list[IntArray] = [np.empty(0, dtype=np.int64)]
        for rectangle in self.rectangles:
            side = self._side(solver, rectangle, mixed, chosen)
            solver.tie(*rectangle.rows(side))
            chosen.append(rectangle.factors[side])
            for index, factor in enumerate(rectangle.factors):
                if index != side:
                    solver.freeze(factor, "the other side of a rectangle (a view into blocks) is the one that is cut")
        inexact = np.concatenate([*self._inexact, np.empty(0, dtype=np.int64)])
        return Classes(solver.of(), solver.reasons, frozenset(np.unique(solver.classes(inexact)).tolist()))

    @staticmethod
    def _side(solver: _Solver, rectangle: Rectangle, mixed: IntArray, chosen: list[IntArray]) -> int:
        """Prefer a side that an earlier rectangle took; then one that can be cut, is not mixed, and is the longest."""
        busy = set(solver.classes(mixed).tolist())
        taken = set(solver.classes(np.concatenate(chosen)).tolist())

        def merit(side: int) -> tuple[bool, bool, bool, int]:
            classes = set(solver.classes(rectangle.factors[side]).tolist())
            free = any(found not in solver.reasons for found in classes)
            return free, bool(classes & taken), not (classes & busy), len(rectangle.factors[side])

        return max(range(len(rectangle.factors)), key=merit)


class _Solver:
    """Union-find over arrays: one pass for all ties of the trace, then few more for the rectangles."""

    def __init__(self, count: int, ties: list[tuple[IntArray, IntArray]]) -> None:
        first = np.concatenate([*(tie[0] for tie in ties), np.empty(0, dtype=np.int64)])
        second = np.concatenate([*(tie[1] for tie in ties), np.empty(0, dtype=np.int64)])
        self._base = _components(count, first, second)
        self._merged = np.arange(int(self._base.max(initial=-1)) + 1, dtype=np.int64)
        self.reasons: dict[int, str] = {}

    def classes(self, labels: IntArray) -> IntArray:
        """Give the class of each label as known now."""
        return self._merged[self._base[labels]]

    def of(self) -> IntArray:
        """Give the class of every label."""
        return self._merged[self._base]

    def freeze(self, labels: IntArray, reason: str) -> None:
        """Freeze the classes of these labels; the first reason stays."""
        for found in np.unique(self.classes(labels)).tolist():
            self.reasons.setdefault(found, reason)

    def tie(self, first: IntArray, second: IntArray) -> None:
        """Make more labels the same, and carry freezing along."""
        both = np.stack([self.classes(first), self.classes(second)])
        touched, index = np.unique(both, return_inverse=True)
        index = index.reshape(both.shape)
        parts = _components(len(touched), index[0], index[1])
        leader = np.full(int(parts.max(initial=-1)) + 1, np.iinfo(np.int64).max, dtype=np.int64)
        np.minimum.at(leader, parts, touched)
        step = np.arange(len(self._merged), dtype=np.int64)
        step[touched] = leader[parts]
        self._merged = step[self._merged]
        self.reasons = {int(step[found]): reason for found, reason in reversed(self.reasons.items())}


def _components(count: int, first: IntArray, second: IntArray) -> IntArray:
    """Give the connected component of each of `count` nodes under the edges `first[i] - second[i]`."""
    edges = coo_array((np.ones(len(first)), (first, second)), shape=(count, count))
    found: IntArray = connected_components(edges, directed=False)[1].astype(np.int64)
    return found
