"""The context of a run of the cut model: it looks up in the recording what the trace found out, and compares.

A rule that is applied anew asks its context for labels, ties and roles. Here the labels come from the recording, less
what was removed, and a tie is a question: are these the same channels?
"""

# A worked example: h.view(-1, 8, 4) behind a convolution a (3 -> 4) on two images of 2 x 4. The trace recorded
#
#   no. 2   aten.view   (2, 4, 2, 4) -> (2, 8, 4)    axes (-, [0 0 1 1 2 2 3 3], -)
#
# If channels 1 and 3 are removed, the recording says (2, 4, 4) with (-, [0 0 2 2], -). The code says 8 all the same:
#
#   view(-1, 8, 4) makes (1, 8, 4) of the 32 numbers that are left, and the rule of `view` splits and merges labels of
#   another shape: `compare` raises Mismatch("dimension 0 of its result has a size of 1 where the cut leaves 2", 2).
#   view(2, 8, 4) fails in torch itself: "shape '[2, 8, 4]' is invalid for input of size 32".
#
# Both times the cut is taken back, and the group is frozen with that reason.

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from compressor.graph.axes import BROADCAST, UNPRUNABLE, Axis, IntArray, Labels, Unlabeled, unlabeled
from compressor.graph.context import Axes, Origin, ParameterDim, TensorInfo, TraceContext
from compressor.graph.recording import Recording


class Mismatch(Exception):
    """The cut model did something that the recording does not explain.

    Attributes:
        index: the number of the operation.
        module: whose code raised, where it was not an operation that went wrong but the code before it.
    """

    def __init__(self, reason: str, index: int, module: str | None = None) -> None:
        super().__init__(reason)
        self.index = index
        self.module = module


class ReplayLabels(Labels):
    """Returns what the journal has next, as it is after the cut, and finds nothing out anew."""

    def __init__(self, recording: Recording, current_index: Callable[[], int]) -> None:
        super().__init__()
        self._recording = recording
        self._current_index = current_index
        self._position = 0

    def _next(self, sizes: Sequence[int], keep_single: bool = False) -> list[Axis]:
        journal = self._recording.log.journal
        if self._position >= len(journal):
            raise Mismatch("the cut model does more than the whole one did", self._current_index())
        found = [self._recording.axis(slot) for slot in journal[self._position]]
        # A view drops sizes of one, so an axis that the cut left one position of is no axis of its own any more.
        every = found
        if len(found) > len(sizes):
            found = [axis for axis in found if not isinstance(axis, np.ndarray) or len(axis) > 1]
        if len(found) != len(sizes):
            raise Mismatch(
                f"a view into {tuple(sizes)} has other dimensions than before the cut", self._current_index()
            )
        self._position += 1
        checked = [self._checked(axis, size) for axis, size in zip(found, sizes, strict=True)]
        if not keep_single or len(every) == len(found):
            return checked
        remaining = iter(checked)
        return [axis if isinstance(axis, np.ndarray) and len(axis) == 1 else next(remaining) for axis in every]

    def _checked(self, axis: Axis, size: int) -> Axis:
        if not isinstance(axis, np.ndarray) or len(axis) == size:
            return axis
        index = self._current_index()
        if self._recording.is_data_dependent(index) and not self._recording.prunable[axis].any():
            # As many as the values ask for this time. One class for all: what matters is that none is a channel.
            return np.full(size, axis[0])
        raise Mismatch(f"a size of {size} stands where the cut leaves {len(axis)}", index)

    def new_axis(self, size: int) -> IntArray:
        """Return what was returned here while tracing, less the removed channels."""
        return _array(self._next([size])[0])

    def merge_arrays(self, arrays: Sequence[IntArray]) -> IntArray:
        """Return what was returned here while tracing, less the removed channels."""
        return _array(self._next([int(np.prod([len(array) for array in arrays]))])[0])

    def split(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """Return what was returned here while tracing; an axis of which one position is left keeps its label."""
        if not isinstance(axis, np.ndarray) or len(sizes) == 1:
            return super().split(axis, sizes)
        if self.depends_on_image_size(axis, sizes):
            return [unlabeled(size) for size in sizes]
        found = self._next([size for size in sizes if size > 1], keep_single=True)
        result: list[Axis] = []
        for size in sizes:
            is_next = bool(found) and (size > 1 or (isinstance(found[0], np.ndarray) and len(found[0]) == 1))
            result.append(found.pop(0) if is_next else unlabeled(size))
        return result

    def split_array(self, axis: IntArray, sizes: Sequence[int]) -> list[Axis]:
        """Return what was returned here while tracing, less the removed channels."""
        return self._next(sizes)

    def tie(self, first: IntArray, second: IntArray) -> None:
        """Raise Mismatch unless these are the same channels already."""
        index = self._current_index()
        if not np.array_equal(first, second) and not self._recording.is_data_dependent(index):
            raise Mismatch("channels meet that do not belong together", index)

    def freeze(self, axis: Axis, reason: str) -> None:
        """Do nothing: the trace found this out."""

    def mark_inexact(self, axis: Axis) -> None:
        """Do nothing: the trace found this out."""

    def mark_contracted(self, axis: Axis) -> None:
        """Do nothing: the trace found this out."""


class ReplayContext(TraceContext):
    """A context that follows a recording; roles, sites and costs are known already.

    Attributes:
        index: the number of the operation that comes next.
    """

    def __init__(self, recording: Recording) -> None:
        self.index = 0
        super().__init__(ReplayLabels(recording, lambda: self.index))
        self._recording = recording

    def label_parameter(self, tensor: Tensor, name: str, shape: Sequence[int]) -> None:
        """Give a parameter the labels that it has left."""
        axes = tuple(self._recording.axis(slot) for slot in self._recording.log.parameters[name])
        self.set_labels(tensor, TensorInfo(axes, weight=name))

    def info(self, tensor: Tensor) -> TensorInfo:
        """Return what is known of a tensor; the axes of a result that was not run stand in the log."""
        found = self._info.get(id(tensor))
        origin = self.origins.get(id(tensor))
        if found is None and origin and origin[0] == "op":
            result = self._recording.log.records[origin[1]].results[origin[2]]
            found = TensorInfo(tuple(self._recording.axis(slot) for slot in result.slots))
        return found or super().info(tensor)

    def set_origin(self, tensor: Tensor, origin: Origin) -> None:
        """Remember where a tensor comes from, from which its axes follow when someone asks for them."""
        self.origins[id(tensor)] = origin
        self._info.pop(id(tensor), None)  # an operation in place made other axes of the same tensor

    def rectangle(self, axis: Axis, rows: int, tie: int) -> Axis:
        """Return one column or row. Blocks are tied already; those that are equal only now need not be."""
        if not isinstance(axis, np.ndarray):
            return axis
        block = axis.reshape(rows, -1)
        return block[0] if tie == 0 else block[:, 0]

    def was_labelled(self, tensor: Tensor, dim: int) -> bool:
        """Return whether `dim` of the result carried channels before the cut, if that left the tensor smaller.

        Where nothing went, a dimension of size one is none that a cut left, and is read as it was in the trace.
        """
        origin = self.origins.get(id(tensor), ("constant",))
        records = self._recording.log.records
        if self.index >= len(records):
            return False
        if origin[0] == "op" and records[origin[1]].results[origin[2]].shape == tuple(tensor.shape):
            return False
        slots = records[self.index].results[0].slots
        return dim < len(slots) and not isinstance(slots[dim], Unlabeled)

    def require_size(self, tensor: Tensor, dim: int) -> None:
        """Raise Mismatch where an expanded dimension has another size than before the cut."""
        origin = self.origins.get(id(tensor), ("constant",))
        if origin[0] != "op" or self._recording.is_data_dependent(self.index):
            return
        before = self._recording.log.records[origin[1]].results[origin[2]]
        if before.slots[dim] is BROADCAST and before.shape[dim] != tensor.shape[dim]:
            raise Mismatch(
                f"its result depends on a size that was {before.shape[dim]} and is {tensor.shape[dim]}", self.index
            )

    def register_index_buffer(self, tensor: Tensor, axis: IntArray) -> bool:
        """Return whether the trace found that this buffer holds positions."""
        return self.weight(tensor) in self._recording.log.indices

    def parameter_dim(self, axis: Axis) -> ParameterDim | None:
        """Return None: roles are known already."""
        return None

    def freeze(self, axes: object, why: str) -> None:
        """Do nothing: the trace found this out."""

    def note(self, op: str, text: str) -> None:
        """Do nothing: the trace found this out."""


VIEWS = frozenset({"aten.view", "aten._unsafe_view"})  # of memory that lies as it is wanted, or of a copy of it


def compare(recording: Recording, index: int, op: str, axes: Sequence[Axes], results: Sequence[Tensor]) -> None:
    """Hold what an operation of the cut model returned against the recording of the cut. Raises Mismatch."""
    if index >= len(recording.log.records):
        raise Mismatch("the cut model runs more operations than the whole one did", index)
    before = recording.log.records[index]
    is_same_op = before.op == op or {before.op, op} <= VIEWS
    if not is_same_op or len(before.results) != len(results):
        raise Mismatch(f"{op} runs where {before.op} ran before the cut", index)
    for record, found, result in zip(before.results, axes, results, strict=True):
        for dim, (slot, size_before) in enumerate(zip(record.slots, record.shape, strict=True)):
            expected = recording.axis(slot)
            # Where values decide, any size may do, but channels must still be the right ones.
            has_channels = isinstance(expected, np.ndarray) and recording.prunable[expected].any()
            if recording.is_data_dependent(index) and not has_channels:
                continue
            size = result.shape[dim] if dim < result.dim() else None
            if not _same(expected, size_before, found[dim] if dim < len(found) else UNPRUNABLE, size):
                left = len(expected) if isinstance(expected, np.ndarray) else size_before
                problem = "other channels" if size == left else f"a size of {size}"
                raise Mismatch(f"dimension {dim} of its result has {problem} where the cut leaves {left}", index)


def _same(expected: Axis, size_before: int, found: Axis, size: int | None) -> bool:
    if isinstance(expected, np.ndarray):
        # One channel that is left looks like a size of one, which carries no labels.
        return np.array_equal(expected, found) if isinstance(found, np.ndarray) else len(expected) == size == 1
    # An expanded axis may follow whatever it meets; `require_size` refuses where its size itself matters.
    return expected is not UNPRUNABLE or size == size_before


def _array(axis: Axis) -> IntArray:
    assert isinstance(axis, np.ndarray)
    return axis
