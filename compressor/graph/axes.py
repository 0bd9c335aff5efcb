"""Channel identity along an axis: labels, merging, splitting. Pure index algebra, no model in sight.

Every axis of every tensor is one of three things:

* an array of *labels*, one per position: two positions with the same label are the same channel;
* `Unlabeled.UNPRUNABLE`: positions that nobody cuts (batch, space, model inputs);
* `Unlabeled.BROADCAST`: the same value at every position (size one, expanded, filled): it fits whatever it meets.

Labels are only ever tied, frozen or marked while a model runs; `Labels.solve` then finds the classes at once. Every
axis of labels that was returned is kept in a journal, in order, so that a run of the cut model can be compared with it.

Merging two labelled axes, or splitting one into two, makes a *rectangle*: position `(i, j)` of the merged axis belongs
to row `i` and column `j`. A cut must leave a rectangle, so either rows or columns can go, not both. Which one is
decided last, when everything that forbids one of them is known.
"""

# A worked example: a residual block of four channels on images of 2 x 2; "-" is UNPRUNABLE.
#
#   conv1.weight (4, 3, 1, 1)   dim 0: [0 1 2 3]    dim 1: [4 5 6]
#   h = conv1(x)                (-, [0 1 2 3], -, -)        [4 5 6] meets the model's input, and is frozen
#   conv2.weight (4, 4, 1, 1)   dim 0: [7 8 9 10]   dim 1: [11 12 13 14]
#   y = conv2(h)                (-, [7 8 9 10], -, -)       ties 0-11 1-12 2-13 3-14: conv2 reads h
#   h + y                       (-, [0 1 2 3], -, -)        ties 0-7 1-8 2-9 3-10
#
# `solve` finds four classes that can be cut, {0 7 11}, {1 8 12}, {2 9 13}, {3 10 14}: both convolutions lose an output
# together, and conv2 the input at the same position.
#
#   (h + y).flatten(1)          (-, [0 0 0 0 1 1 1 1 2 2 2 2 3 3 3 3])
#
# A merge with space repeats labels: 16 positions, four for each channel (K = 4). A channel shuffle by hand splits:
#
#   h.view(b, 2, 2, h, w)       (-, [15 16], [17 18], -, -)            17 18
#                                                                   15  0  1
#                                                                   16  2  3
#   .transpose(1, 2)            (-, [17 18], [15 16], -, -)
#   .reshape(b, 4, h, w)        (-, [0 2 1 3], -, -)        the same rectangle, read down its columns: no new labels
#
# If rows go, {0 1 15} and {2 3 16} are the channels, and 17, 18 are frozen; if columns, {0 2 17} and {1 3 18}.

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


class Unlabeled(enum.Enum):
    """An axis without channels."""

    UNPRUNABLE = "unprunable"
    BROADCAST = "broadcast"


UNPRUNABLE, BROADCAST = Unlabeled.UNPRUNABLE, Unlabeled.BROADCAST
Axis: TypeAlias = IntArray | Unlabeled


def unlabeled(size: int) -> Unlabeled:
    """Return the axis of that size that carries no channels."""
    return BROADCAST if size == 1 else UNPRUNABLE


@dataclass(frozen=True, eq=False)
class Rectangle:
    """An axis and its factors: `merged`, reshaped to their lengths, is at `[i, j, ...]` what is on row i, column j."""

    merged: IntArray
    factors: tuple[IntArray, ...]

    def ties(self, side: int) -> tuple[IntArray, IntArray]:
        """Return two equally long arrays: the merged axis' labels, and the label of one factor at each of them."""
        shape = [len(factor) for factor in self.factors]
        line = [1] * len(shape)
        line[side] = shape[side]
        return self.merged, np.broadcast_to(self.factors[side].reshape(line), shape).ravel()


@dataclass(frozen=True, eq=False)
class Classes:
    """The solved labels.

    Attributes:
        class_ids: `(number of labels,)` the class of each label.
        inexact: classes for which masking and cutting differ.
        blocks: classes of the side of a rectangle that is cut: heads, say.
    """

    class_ids: IntArray
    inexact: frozenset[int]
    blocks: IntArray
    _reason_ids: IntArray
    _reasons: list[str]

    @property
    def frozen(self) -> BoolArray:
        """Which classes are frozen, `(classes,)`."""
        is_frozen: BoolArray = self._reason_ids < len(self._reasons)
        return is_frozen

    def reason(self, class_id: int) -> str:
        """Return why a class is frozen."""
        return self._reasons[int(self._reason_ids[class_id])]


class Labels:
    """All labels of one trace, and what is known about them."""

    def __init__(self) -> None:
        self.count = 0
        self.journal: list[list[Axis]] = []
        self.rectangles: list[Rectangle] = []
        self._ties: list[tuple[IntArray, IntArray]] = []
        self._frozen: list[tuple[IntArray, str]] = []
        self._inexact: list[IntArray] = []
        self._contracted: list[IntArray] = []
        # The latest rectangle by the first label of its merged axis, and of each factor. Whoever looks one up compares
        # all labels: an entry that was overwritten costs a second rectangle, never a wrong one.
        self._by_merged: dict[int, Rectangle] = {}
        self._by_factor: dict[int, tuple[Rectangle, int]] = {}
        # By `id` of a merged axis, the axis itself (so that the id stays) and where channels begin and end in it.
        self._merged_with_space: dict[int, tuple[IntArray, list[tuple[int, int]]]] = {}

    # -- what is recorded while the model runs

    def new_axis(self, size: int) -> IntArray:
        """Return labels that nothing else has, and write them into the journal."""
        labels = self.allocate(size)
        self.journal.append([labels])
        return labels

    def allocate(self, size: int) -> IntArray:
        """Return labels that nothing else has; the journal does not know them."""
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def tie(self, first: IntArray, second: IntArray) -> None:
        """Make two equally long arrays of labels the same channels, position by position."""
        if first is not second:  # an array tied to itself says nothing, and is most of what element-wise ops tie
            self._ties.append((first, second))

    def freeze(self, axis: Axis, reason: str) -> None:
        """Forbid every cut of these channels."""
        if isinstance(axis, np.ndarray):
            self._frozen.append((axis, reason))

    def mark_inexact(self, axis: Axis) -> None:
        """Note that channels of this axis are mixed without a weight: masking is not cutting."""
        if isinstance(axis, np.ndarray):
            self._inexact.append(axis)

    def mark_contracted(self, axis: Axis) -> None:
        """Note that two activations are contracted over this axis: of a rectangle, rather cut another side."""
        if isinstance(axis, np.ndarray):
            self._contracted.append(axis)
            self._inexact.append(axis)

    # -- merging and splitting

    def merge(self, axes: Sequence[Axis], sizes: Sequence[int]) -> Axis:
        """Return the axis that flattening `axes` (first one slowest) results in."""
        arrays = [axis for axis in axes if isinstance(axis, np.ndarray)]
        if not arrays:
            return BROADCAST if all(axis is BROADCAST for axis in axes) else UNPRUNABLE
        labelled = arrays[0] if len(arrays) == 1 else self.merge_arrays(arrays)
        shape = [size if isinstance(axis, np.ndarray) else 1 for axis, size in zip(axes, sizes, strict=True)]
        result = np.broadcast_to(labelled.reshape(shape), sizes).ravel()
        if any(axis is UNPRUNABLE for axis in axes):
            self._merged_with_space[id(result)] = result, _channel_runs(axes, sizes)
        return result

    def split(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """Return the axes that unflattening `axis` into `sizes` results in; the inverse of `merge`."""
        if not isinstance(axis, np.ndarray):
            return [BROADCAST if size == 1 else axis for size in sizes]
        if len(sizes) == 1:
            return [axis]
        if self.depends_on_image_size(axis, sizes):
            self.freeze(axis, "a view splits channels from where space ends, which moves with the size of the image")
            return [unlabeled(size) for size in sizes]
        result: list[Axis] = [unlabeled(size) for size in sizes]
        wide = [index for index, size in enumerate(sizes) if size > 1]
        factors = self.split_array(axis, [sizes[index] for index in wide])
        for index, factor in zip(wide, factors, strict=True):
            result[index] = factor
        return result

    def depends_on_image_size(self, axis: IntArray, sizes: Sequence[int]) -> bool:
        """Return whether a split takes channels apart from where space ends.

        Channels beside 4 x 4 pixels, [16 64] read as [64 4 4]: right for images of this size, and of no other.
        """
        _, runs = self._merged_with_space.get(id(axis), (axis, []))
        ends = {1, *np.cumprod(sizes).tolist()}
        return any(start not in ends and any(start < end < stop for end in ends) for start, stop in runs)

    def merge_arrays(self, arrays: Sequence[IntArray]) -> IntArray:
        """Return the labels of several labelled axes flattened into one."""
        merged = self._undo_split(arrays)
        if merged is None:
            merged = self._rectangle(self.allocate(math.prod(map(len, arrays))), arrays).merged
        self.journal.append([merged])
        return merged

    def split_array(self, axis: IntArray, sizes: Sequence[int]) -> list[Axis]:
        """Return the axes of a labelled axis reshaped to `sizes`, all of them larger than one."""
        factors = self._factors(axis, sizes)
        self.journal.append(factors)
        return factors

    def _factors(self, axis: IntArray, sizes: Sequence[int]) -> list[Axis]:
        if len(sizes) == 1:
            return [axis]
        block = axis.reshape(tuple(sizes))
        # Labels that vary along one dimension only are channels merged with space, taken apart again: no rectangle.
        for index in range(len(sizes)):
            line = block[tuple(slice(None) if i == index else 0 for i in range(len(sizes)))]
            if (np.moveaxis(block, index, -1) == line).all():
                return [line if i == index else UNPRUNABLE for i in range(len(sizes))]
        # The same split twice (queries and keys of one tensor) must find the same factors, or heads would not meet.
        known = self._by_merged.get(int(axis[0]))
        if known and [len(f) for f in known.factors] == list(sizes) and np.array_equal(known.merged, axis):
            return list(known.factors)
        return list(self._rectangle(axis, [self.allocate(size) for size in sizes]).factors)

    def _undo_split(self, arrays: Sequence[IntArray]) -> IntArray | None:
        """Return the axis that was split into these, in whatever order they come (a channel shuffle swaps them)."""
        found = [self._by_factor.get(int(array[0])) for array in arrays]
        rectangle = found[0][0] if found[0] else None
        if rectangle is None or any(each is None or each[0] is not rectangle for each in found):
            return None
        order = [each[1] for each in found if each]
        same = all(np.array_equal(rectangle.factors[i], a) for i, a in zip(order, arrays, strict=True))
        if sorted(order) != list(range(len(rectangle.factors))) or not same:
            return None
        return rectangle.merged.reshape([len(f) for f in rectangle.factors]).transpose(order).ravel()

    def _rectangle(self, merged: IntArray, factors: Sequence[IntArray]) -> Rectangle:
        rectangle = Rectangle(merged, tuple(factors))
        self.rectangles.append(rectangle)
        self._by_merged[int(merged[0])] = rectangle
        for index, factor in enumerate(factors):
            self._by_factor[int(factor[0])] = (rectangle, index)
        return rectangle

    # -- solving

    def solve(self) -> Classes:
        """Find the classes of labels, decide the side of every rectangle, and spread freezing over each class."""
        solver = _Solver(self.count, self._ties)
        for axis, reason in self._frozen:
            solver.freeze(axis, reason)
        contracted = np.concatenate([*self._contracted, np.empty(0, dtype=np.int64)])
        chosen: list[IntArray] = [np.empty(0, dtype=np.int64)]
        # NOTE: In the order of the model. Each choice freezes the other side, and later choices see that.
        for rectangle in self.rectangles:
            side = self._choose_side(solver, rectangle, contracted, chosen)
            solver.tie(*rectangle.ties(side))
            chosen.append(rectangle.factors[side])
            for index, factor in enumerate(rectangle.factors):
                if index != side:
                    solver.freeze(factor, "the other side of a rectangle (a view into blocks) is the one that is cut")
        inexact = np.concatenate([*self._inexact, np.empty(0, dtype=np.int64)])
        inexact_ids = frozenset(np.unique(solver.classes(inexact)).tolist())
        class_ids = solver.class_ids()
        count = int(class_ids.max(initial=-1)) + 1  # the last ones may have been merged into others
        blocks = np.unique(class_ids[np.concatenate(chosen)])
        return Classes(class_ids, inexact_ids, blocks, solver.reason_ids[:count], solver.reasons)

    @staticmethod
    def _choose_side(solver: _Solver, rectangle: Rectangle, contracted: IntArray, chosen: list[IntArray]) -> int:
        """Return the best side: it can be cut, an earlier rectangle took it, nothing contracts it, it is longest."""
        is_contracted = solver.marked(contracted)
        is_chosen = solver.marked(np.concatenate(chosen))

        def merit(side: int) -> tuple[bool, bool, bool, int]:
            classes = solver.classes(rectangle.factors[side])
            # Queries, keys and values are three rectangles with common heads: they must take the same side, or each
            # would freeze the others'. Of heads and their width, the width is contracted (q @ k), so heads go.
            return (
                not solver.is_frozen(classes).all(),
                bool(is_chosen[classes].any()),
                not is_contracted[classes].any(),
                len(rectangle.factors[side]),
            )

        return max(range(len(rectangle.factors)), key=merit)


def _channel_runs(axes: Sequence[Axis], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return of every run of channels how many blocks there are in front of it, and with it: (16, 1024) of [16 64]."""
    ends = np.cumprod([1, *sizes]).tolist()
    return [(ends[i], ends[i + 1]) for i, axis in enumerate(axes) if isinstance(axis, np.ndarray)]


_NO_REASON = np.iinfo(np.int64).max


class _Solver:
    """Union-find over arrays: one pass for all ties of the trace, then few more for the rectangles."""

    def __init__(self, count: int, ties: list[tuple[IntArray, IntArray]]) -> None:
        first = np.concatenate([*(tie[0] for tie in ties), np.empty(0, dtype=np.int64)])
        second = np.concatenate([*(tie[1] for tie in ties), np.empty(0, dtype=np.int64)])
        self._base = _components(count, first, second)
        self._merged = np.arange(int(self._base.max(initial=-1)) + 1, dtype=np.int64)
        self.reasons: list[str] = []
        self.reason_ids = np.full(len(self._merged), _NO_REASON, dtype=np.int64)  # by class, a place in `reasons`

    def classes(self, labels: IntArray) -> IntArray:
        """Return the class of each label as known now."""
        return self._merged[self._base[labels]]

    def class_ids(self) -> IntArray:
        """Return the class of every label."""
        return self._merged[self._base]

    def freeze(self, labels: IntArray, reason: str) -> None:
        """Freeze the classes of these labels; the first reason stays."""
        classes = self.classes(labels)
        self.reason_ids[classes[~self.is_frozen(classes)]] = len(self.reasons)
        self.reasons.append(reason)

    def is_frozen(self, classes: IntArray) -> BoolArray:
        """Tell of each class whether it is frozen."""
        is_frozen: BoolArray = self.reason_ids[classes] != _NO_REASON
        return is_frozen

    def marked(self, labels: IntArray) -> BoolArray:
        """Tell of every class whether one of these labels is in it, `(classes,)`."""
        marks = np.zeros(len(self._merged), dtype=bool)
        marks[self.classes(labels)] = True
        return marks

    def tie(self, first: IntArray, second: IntArray) -> None:
        """Make more labels the same, and carry freezing along."""
        both = np.stack([self.classes(first), self.classes(second)])
        # Only the classes that the tie touches are solved again; a rectangle has few of all that a network has.
        touched, index = np.unique(both, return_inverse=True)
        index = index.reshape(both.shape)
        components = _components(len(touched), index[0], index[1])
        representative = np.full(int(components.max(initial=-1)) + 1, np.iinfo(np.int64).max, dtype=np.int64)
        np.minimum.at(representative, components, touched)
        merge = np.arange(len(self._merged), dtype=np.int64)
        merge[touched] = representative[components]
        self._merged = merge[self._merged]
        # Of all the reasons in a class, the one that was given first.
        reason_ids, self.reason_ids[touched] = self.reason_ids[touched], _NO_REASON
        np.minimum.at(self.reason_ids, merge[touched], reason_ids)


def _components(count: int, first: IntArray, second: IntArray) -> IntArray:
    """Return the connected component of each of `count` nodes under the edges `first[i] - second[i]`."""
    # NOTE: ones as float64. Equal edges are summed, and 256 of them in bytes are no edge at all.
    edges = coo_array((np.ones(len(first)), (first, second)), shape=(count, count))
    components: IntArray = connected_components(edges, directed=False)[1].astype(np.int64)
    return components
