"""What a trace leaves behind so that a cut can be verified: every operation, and the channels on its results.

The recording is a log that never changes (operations, and which axis stands where) and the axes themselves, one array
of channel classes each. A cut takes positions out of the arrays; what the cut model must do follows from that.
"""

# A worked example: h = relu(a(x)) with a convolution a (3 -> 4, 1 x 1, no bias) on one image of 2 x 2, then a Linear b
# (16 -> 2, no bias) on h.flatten(1). The trace leaves five labelled axes, each in a slot:
#
#   slot  where                             flat                                          starts
#   0     a.weight dim 0, h dim 1           0 1 2 3                                       0
#   1     a.weight dim 1                    4 5 6                                         4
#   2     h.flatten(1) dim 1                0 0 0 0 1 1 1 1 2 2 2 2 3 3 3 3               7
#   3     b.weight dim 1                    0 0 0 0 1 1 1 1 2 2 2 2 3 3 3 3               23
#   4     b.weight dim 0, the output        7 8                                           39, and 41 at the end
#
#   channels = {"a": [0 1 2 3]}: the classes 0 to 3 are the channels of group "a"; 4 to 8 are in no group.
#
# `without` class 2 leaves  0 1 3 | 4 5 6 | 0 0 0 0 1 1 1 1 3 3 3 3 | the same again | 7 8  with starts 0 3 6 18 30 32.
# Classes keep their numbers, so that the axes of the cut model can be compared with these by equality.

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from compressor.graph.axes import Axis, BoolArray, IntArray, Unlabeled
from compressor.graph.context import Origin

Slot: TypeAlias = int | Unlabeled


class TensorRecord(NamedTuple):
    """What a result looked like: its axes, sizes, type, and the order of its dimensions in memory (None: any other)."""

    slots: tuple[Slot, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    memory_order: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class OpRecord:
    """One operation.

    Attributes:
        func: the operation itself; `op` is its plain name, `module` where it ran.
        non_tensor_args: its arguments that are no tensors, in order.
        origins: where its tensors came from, in order.
        input_slots: the axes of its tensors.
        results: what each result looked like.
        in_place: whether its result is its first argument, written in place.
        equivariant: whether removing channels from its tensors removes them from its results in the same way, whatever
            they are; its results are known then without running it.
        decision: of an operation whose result's size, or number, depends on values: that result, or the masks that it
            was made with. A run of the cut model takes the same, so that it goes the same way (boxes that were found).
    """

    func: Any
    op: str
    module: str
    non_tensor_args: tuple[Any, ...]
    origins: tuple[Origin, ...]
    input_slots: tuple[tuple[Slot, ...], ...]
    results: tuple[TensorRecord, ...]
    in_place: bool
    equivariant: bool
    decision: Any = None


class OpLog:
    """Everything of a recording that no cut changes.

    Attributes:
        records: the operations, in the order in which they ran.
        journal: every axis of labels that was returned to a rule, in order.
        parameters: the axes of every parameter and buffer that was used, by name.
        indices: by name of a buffer of positions, the axis whose positions they are.
        arrays: the labelled axes as they were recorded, by slot.
        meta: whether the model ran on tensors without data.
        data_dependent_from: the first operation after which sizes may depend on values; None where none do.
    """

    def __init__(self, meta: bool) -> None:
        self.data_dependent_from: int | None = None
        self.records: list[OpRecord] = []
        self.journal: list[tuple[Slot, ...]] = []
        self.parameters: dict[str, tuple[Slot, ...]] = {}
        self.indices: dict[str, int] = {}
        self.arrays: list[IntArray] = []
        self.meta = meta
        self._slots: dict[int, int] = {}

    def slots(self, axes: Iterable[Axis]) -> tuple[Slot, ...]:
        """Return the slot of each axis; an array seen for the first time gets the next one, and is kept alive."""
        return tuple(self.slot(axis) if isinstance(axis, np.ndarray) else axis for axis in axes)

    def slot(self, axis: IntArray) -> int:
        """Return the slot of one labelled axis."""
        # By identity, not by content: most operations hand on the very array that they got, and comparing costs more
        # than the few slots it would save.
        found = self._slots.get(id(axis))
        if found is None:
            found = self._slots[id(axis)] = len(self.arrays)
            self.arrays.append(axis)
        return found


@dataclass(frozen=True, eq=False)
class Recording:
    """A log, and the axes as they are now.

    Attributes:
        log: what ran.
        flat: the channel classes of all axes, one behind the other; slot `s` is `flat[starts[s]:starts[s + 1]]`.
        starts: `(slots + 1,)`.
        channels: by group name, the class of each channel, `(C,)`.
        prunable: `(classes,)` which classes are channels of groups.
        end: how many records there are up to the last one where a channel of a group stands.
    """

    log: OpLog
    flat: IntArray
    starts: IntArray
    channels: Mapping[str, IntArray]
    prunable: BoolArray
    end: int
    sizes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """Compute the length of every axis once."""
        object.__setattr__(self, "sizes", np.diff(self.starts).tolist())

    @staticmethod
    def from_log(log: OpLog, class_ids: IntArray, channels: Mapping[str, IntArray]) -> Recording:
        """Return the recording of a trace, from the class of each label."""
        starts = np.cumsum([0, *map(len, log.arrays)])
        flat = class_ids[np.concatenate([*log.arrays, np.empty(0, dtype=np.int64)])]
        prunable = np.zeros(int(class_ids.max(initial=-1)) + 1, dtype=bool)
        prunable[np.concatenate([*channels.values(), np.empty(0, dtype=np.int64)])] = True
        before = np.concatenate([[0], np.cumsum(prunable[flat])])
        has_channels = (before[starts[1:]] > before[starts[:-1]]).tolist()
        end = len(log.records)
        while end and not any(has_channels[slot] for slot in _slots_of(log.records[end - 1])):
            end -= 1
        return Recording(log, flat, starts, channels, prunable, end)

    @staticmethod
    def empty() -> Recording:
        """Return the recording of a model that runs nothing."""
        return Recording.from_log(OpLog(meta=True), np.empty(0, dtype=np.int64), {})

    def without(self, removed: BoolArray) -> Recording:
        """Return the recording of the model from which these classes, `(classes,)`, were removed."""
        kept = ~removed[self.flat]
        before = np.concatenate([[0], np.cumsum(kept)])
        channels = {name: each[~removed[each]] for name, each in self.channels.items()}
        return replace(self, flat=self.flat[kept], starts=before[self.starts], channels=channels)

    def axis(self, slot: Slot) -> Axis:
        """Return the axis in a slot, as classes."""
        return slot if isinstance(slot, Unlabeled) else self.classes_in(slot)

    def classes_in(self, slot: int) -> IntArray:
        """Return the classes in the slot of a labelled axis, position by position."""
        return self.flat[self.starts[slot] : self.starts[slot + 1]]

    def shape(self, record: TensorRecord) -> list[int]:
        """Return the shape that a result has now. Sizes of BROADCAST axes are as they were."""
        return [
            size if isinstance(slot, Unlabeled) else self.sizes[slot]
            for slot, size in zip(record.slots, record.shape, strict=True)
        ]

    def renumbered(self, removed: BoolArray) -> dict[str, IntArray]:
        """Return, by name of a buffer of positions, the new number of each old position; -1 for one that is removed."""
        found = {}
        for name, slot in self.log.indices.items():
            here = removed[self.classes_in(slot)]
            if here.any():
                found[name] = np.where(here, -1, np.cumsum(~here) - 1)
        return found

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that tell this network's code from another's with tensors of the same shapes."""
        lines = (f"{each.op} {each.module} {[result.shape for result in each.results]}" for each in self.log.records)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    # -- looking for the cause of a mismatch

    def is_data_dependent(self, index: int) -> bool:
        """Return whether sizes that are no channels may depend on values at an operation."""
        start = self.log.data_dependent_from
        return start is not None and index >= start

    def same_op_elsewhere(self, index: int, after: Recording, kind: Callable[[str], object]) -> list[int]:
        """Return the operations that are the same in the code of the same kind of module, where sizes change too.

        What fails in one block of a network fails in all of them. The operation itself is always among them.

        Args:
            index: the number of an operation.
            after: the recording after the cut.
            kind: returns the kind of a module by its name.
        """
        record = self.log.records[index]
        ordinals = self._ordinals
        same = [
            other
            for other, candidate in enumerate(self.log.records)
            if (candidate.op, ordinals[other]) == (record.op, ordinals[index])
            and kind(candidate.module) == kind(record.module)
        ]
        return [other for other in same if other == index or self._changes_at(other, after)]

    def _changes_at(self, index: int, after: Recording) -> bool:
        return any(self.sizes[slot] != after.sizes[slot] for slot in _slots_of(self.log.records[index]))

    @cached_property
    def _ordinals(self) -> list[int]:
        """Return for every operation how many ran before it in the code of its module."""
        counts: Counter[str] = Counter()
        ordinals = []
        for record in self.log.records:
            ordinals.append(counts[record.module])
            counts[record.module] += 1
        return ordinals

    def changed_sizes(self, module: str, after: Recording) -> dict[int, int]:
        """Return sizes of axes where a module's own code has sizes in arguments, and what a cut makes of them.

        Axes that keep their size do not count, and a size that became several others is left out.
        """
        own = (each for each in self.log.records if each.module == module and not each.equivariant)
        return self._changed_sizes(own, after)

    def changed_sizes_within(self, module: str, after: Recording) -> dict[int, int]:
        """Return the same of all axes in a module and its submodules: code may read any (`assert x.shape[1] == c`)."""
        prefix = f"{module}." if module else ""
        inside = (each for each in self.log.records if each.module == module or each.module.startswith(prefix))
        return self._changed_sizes(inside, after) | self.changed_sizes(module, after)

    def _changed_sizes(self, records: Iterable[OpRecord], after: Recording) -> dict[int, int]:
        found: dict[int, set[int]] = {}
        for record in records:
            for slot in _slots_of(record):
                if self.sizes[slot] != after.sizes[slot]:
                    found.setdefault(self.sizes[slot], set()).add(after.sizes[slot])
        return {size: min(now) for size, now in found.items() if len(now) == 1}

    def modules_of(self, name: str) -> set[str]:
        """Return the modules in whose own code a group stands where sizes or positions are arguments."""
        return {each.module for each in self.log.records if not each.equivariant and self._stands_at(name, each)}

    def groups_within(self, modules: Iterable[str]) -> list[str]:
        """Return the groups that stand somewhere in these modules or their submodules."""
        inside = [
            record
            for record in self.log.records
            if any(record.module == each or record.module.startswith(f"{each}.") for each in modules if each)
        ]
        return [name for name in self.channels if any(self._stands_at(name, record) for record in inside)]

    def _stands_at(self, name: str, record: OpRecord) -> bool:
        first = self.channels[name][:1]  # one channel stands for all: they live on the same axes
        return any(np.isin(first, self.classes_in(slot)).any() for slot in _slots_of(record))

    def groups_at(self, index: int, removed: BoolArray) -> list[str]:
        """Return the groups that lose channels and stand at an operation, or else at the nearest one before it."""
        for record in self.log.records[index::-1]:
            arrays = [self.classes_in(slot) for slot in _slots_of(record)]
            here = np.zeros_like(removed)
            here[np.concatenate([*arrays, np.empty(0, dtype=np.int64)])] = True
            here &= removed
            if here.any():
                return [name for name, classes in self.channels.items() if here[classes].any()]
        return [name for name, classes in self.channels.items() if removed[classes].any()]


def _slots_of(record: OpRecord) -> list[int]:
    """Return the slots of labelled axes at an operation."""
    axes = (*record.input_slots, *(result.slots for result in record.results))
    return [slot for each in axes for slot in each if not isinstance(slot, Unlabeled)]
