"""What a trace leaves behind so that a cut can be held against it: every operation, and the channels on its results.

The trail is a script that never changes (operations, and which axis stands where) and the axes themselves, one array of
channel classes each. A cut takes positions out of the arrays; what the cut model must do follows from that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from compressor.graph.axes import FIXED, FREE, Axis, Blank, BoolArray, IntArray, Labels
from compressor.graph.context import Axes, Flow, Known, Origin, Source

Slot: TypeAlias = int | Blank


class Form(NamedTuple):
    """What a result looked like: its axes, sizes, type, and the order of its dimensions in memory (None: any other)."""

    slots: tuple[Slot, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class Step:
    """One operation.

    Attributes:
        func: the operation itself; `op` is its plain name, `module` where it ran.
        plain: its arguments that are no tensors, in order.
        inputs: where its tensors came from, in order.
        taken: the axes of its tensors.
        results: the form of each result.
        written: whether its result is its first argument, written in place.
        steady: whether channels that are gone from its tensors are gone from its results in the same way, whatever
            they are; its results are known then without running it.
    """

    func: Any
    op: str
    module: str
    plain: tuple[Any, ...]
    inputs: tuple[Origin, ...]
    taken: tuple[tuple[Slot, ...], ...]
    results: tuple[Form, ...]
    written: bool
    steady: bool


class Script:
    """Everything of a trail that no cut changes.

    Attributes:
        steps: in the order in which they ran.
        journal: every axis that was handed out, in order.
        parameters: the axes of every parameter and buffer that was used, by name.
        indices: by name of a buffer of positions, the axis whose positions they are.
        arrays: the labelled axes as they were recorded, by slot.
        meta: whether the model ran on tensors without data.
        loose_from: the first step after which sizes may depend on values; None where none do.
    """

    def __init__(self, meta: bool) -> None:
        self.loose_from: int | None = None
        self.steps: list[Step] = []
        self.journal: list[tuple[Slot, ...]] = []
        self.parameters: dict[str, tuple[Slot, ...]] = {}
        self.indices: dict[str, int] = {}
        self.arrays: list[IntArray] = []
        self.meta = meta
        self._slots: dict[int, int] = {}

    def slots(self, axes: Iterable[Axis]) -> tuple[Slot, ...]:
        """Give the slot of each axis; an array seen for the first time gets the next one, and is kept alive."""
        return tuple(self.slot(axis) if isinstance(axis, np.ndarray) else axis for axis in axes)

    def slot(self, axis: IntArray) -> int:
        """Give the slot of one labelled axis."""
        found = self._slots.get(id(axis))
        if found is None:
            found = self._slots[id(axis)] = len(self.arrays)
            self.arrays.append(axis)
        return found


@dataclass(frozen=True, eq=False)
class Trail:
    """A script, and the axes as they are now.

    Attributes:
        script: what ran.
        flat: the channel classes of all axes, one behind the other; slot `s` is `flat[starts[s]:starts[s + 1]]`.
        starts: `(slots + 1,)`.
        channels: by group name, the class of each channel, `(C,)`.
        live: `(classes,)` which classes are channels of groups.
        end: how many steps there are up to the last one where a channel of a group stands.
    """

    script: Script
    flat: IntArray
    starts: IntArray
    channels: Mapping[str, IntArray]
    live: BoolArray
    end: int
    sizes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """Compute the length of every axis once."""
        object.__setattr__(self, "sizes", np.diff(self.starts).tolist())

    @staticmethod
    def of(script: Script, of: IntArray, channels: Mapping[str, IntArray]) -> Trail:
        """Make the trail of a trace, from the class of each label."""
        starts = np.cumsum([0, *map(len, script.arrays)])
        flat = of[np.concatenate([*script.arrays, np.empty(0, dtype=np.int64)])]
        live = np.zeros(int(of.max(initial=-1)) + 1, dtype=bool)
        live[np.concatenate([*channels.values(), np.empty(0, dtype=np.int64)])] = True
        before = np.concatenate([[0], np.cumsum(live[flat])])
        alive = (before[starts[1:]] > before[starts[:-1]]).tolist()
        end = len(script.steps)
        while end and not any(alive[slot] for slot in _slots_of(script.steps[end - 1])):
            end -= 1
        return Trail(script, flat, starts, channels, live, end)

    def without(self, removed: BoolArray) -> Trail:
        """Give the trail of the model from which these classes, `(classes,)`, were removed."""
        stays = ~removed[self.flat]
        before = np.concatenate([[0], np.cumsum(stays)])
        channels = {name: each[~removed[each]] for name, each in self.channels.items()}
        return replace(self, flat=self.flat[stays], starts=before[self.starts], channels=channels)

    def axis(self, slot: Slot) -> Axis:
        """Give the axis in a slot, as classes."""
        return slot if isinstance(slot, Blank) else self.classes_in(slot)

    def classes_in(self, slot: int) -> IntArray:
        """Give the classes in the slot of a labelled axis, position by position."""
        return self.flat[self.starts[slot] : self.starts[slot + 1]]

    def shape(self, form: Form) -> list[int]:
        """Give the shape that a result has now. Sizes of FREE axes are as they were."""
        return [
            size if isinstance(slot, Blank) else self.sizes[slot]
            for slot, size in zip(form.slots, form.shape, strict=True)
        ]

    def renumbered(self, removed: BoolArray) -> dict[str, IntArray]:
        """Give, by name of a buffer of positions, the new number of each old position; -1 for one that goes."""
        found = {}
        for name, slot in self.script.indices.items():
            gone = removed[self.classes_in(slot)]
            if gone.any():
                found[name] = np.where(gone, -1, np.cumsum(~gone) - 1)
        return found

    def is_loose(self, at: int) -> bool:
        """Tell whether sizes that are no channels may depend on values at a step."""
        loose_from = self.script.loose_from
        return loose_from is not None and at >= loose_from

    def alike(self, at: int, after: Trail, kind: Callable[[str], object]) -> list[int]:
        """Give the steps that are the same operation in the code of the same kind of module, where sizes change too.

        What fails in one block of a network fails in all of them. The step itself is always among them.

        Args:
            at: the number of a step.
            after: the trail after the cut.
            kind: gives the kind of a module by its name.
        """
        step, turns = self.script.steps[at], self._turns
        same = [
            number
            for number, other in enumerate(self.script.steps)
            if (other.op, turns[number]) == (step.op, turns[at]) and kind(other.module) == kind(step.module)
        ]
        return [number for number in same if number == at or self._changes_at(number, after)]

    def _changes_at(self, number: int, after: Trail) -> bool:
        return any(self.sizes[slot] != after.sizes[slot] for slot in _slots_of(self.script.steps[number]))

    @cached_property
    def _turns(self) -> list[int]:
        """Give, for every step, the how many-th it is in the code of its module."""
        counts: Counter[str] = Counter()
        turns = []
        for step in self.script.steps:
            turns.append(counts[step.module])
            counts[step.module] += 1
        return turns

    def changes(self, module: str, after: Trail) -> dict[int, int]:
        """Give sizes of axes where a module's own code has sizes in arguments, and what a cut makes of them.

        Axes that keep their size do not count, and a size that became several others is left out.
        """
        found: dict[int, set[int]] = {}
        for step in (step for step in self.script.steps if step.module == module and not step.steady):
            for slot in _slots_of(step):
                if self.sizes[slot] != after.sizes[slot]:
                    found.setdefault(self.sizes[slot], set()).add(after.sizes[slot])
        return {size: min(now) for size, now in found.items() if len(now) == 1}

    def blamed(self, at: int, removed: BoolArray) -> list[str]:
        """Give the names of groups that lose channels and stand at a step, or else at the nearest step before it."""
        for step in self.script.steps[at::-1]:
            arrays = [self.classes_in(slot) for slot in _slots_of(step)]
            here = np.zeros_like(removed)
            here[np.concatenate([*arrays, np.empty(0, dtype=np.int64)])] = True
            here &= removed
            if here.any():
                return [name for name, classes in self.channels.items() if here[classes].any()]
        return [name for name, classes in self.channels.items() if removed[classes].any()]


def _slots_of(step: Step) -> list[int]:
    """Give the slots of labelled axes at a step."""
    axes = (*step.taken, *(form.slots for form in step.results))
    return [slot for each in axes for slot in each if not isinstance(slot, Blank)]


class Mismatch(Exception):
    """The cut model did something that the trace does not explain; `step` is where."""

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(reason)
        self.step = step


class ReplayLabels(Labels):
    """Hands out what the journal says, as it is after the cut, and finds nothing out anew."""

    def __init__(self, trail: Trail, here: Callable[[], int]) -> None:
        super().__init__()
        self._trail, self._here, self._read = trail, here, 0

    def _next(self, sizes: Sequence[int]) -> list[Axis]:
        journal = self._trail.script.journal
        if self._read >= len(journal):
            raise Mismatch("the cut model does more than the whole one did", self._here())
        found = [self._trail.axis(slot) for slot in journal[self._read]]
        if len(found) > len(sizes):  # an axis that the cut left one position of is no axis of its own any more
            found = [axis for axis in found if not isinstance(axis, np.ndarray) or len(axis) > 1]
        if len(found) != len(sizes):
            raise Mismatch(f"a view into {tuple(sizes)} has other dimensions than before the cut", self._here())
        self._read += 1
        return [self._fitting(axis, size) for axis, size in zip(found, sizes, strict=True)]

    def _fitting(self, axis: Axis, size: int) -> Axis:
        if not isinstance(axis, np.ndarray) or len(axis) == size:
            return axis
        if self._trail.is_loose(self._here()) and not self._trail.live[axis].any():
            return np.full(size, axis[0])  # no channels: what counts is that it is not one
        raise Mismatch(f"a size of {size} stands where the cut leaves {len(axis)}", self._here())

    def fresh(self, size: int) -> IntArray:
        """Give what was given here the first time, less the removed channels."""
        return _array(self._next([size])[0])

    def join(self, arrays: Sequence[IntArray]) -> IntArray:
        """Give what was given here the first time, less the removed channels."""
        return _array(self._next([int(np.prod([len(array) for array in arrays]))])[0])

    def part(self, axis: IntArray, sizes: Sequence[int]) -> list[Axis]:
        """Give what was given here the first time, less the removed channels."""
        return self._next(sizes)

    def tie(self, first: IntArray, second: IntArray) -> None:
        """Everything is tied already: what meets must be the same channels."""
        if not np.array_equal(first, second) and not self._trail.is_loose(self._here()):
            raise Mismatch("channels meet that do not belong together", self._here())

    def freeze(self, axis: Axis, reason: str) -> None:
        """Nothing is found out anew."""

    def mark_inexact(self, axis: Axis) -> None:
        """Nothing is found out anew."""

    def mark_mixed(self, axis: Axis) -> None:
        """Nothing is found out anew."""


class ReplayFlow(Flow):
    """A notebook that follows a trail; roles, sites and costs are known already.

    Attributes:
        at: the number of the step that comes next.
    """

    def __init__(self, trail: Trail) -> None:
        self.at = 0
        super().__init__(ReplayLabels(trail, lambda: self.at))
        self._trail = trail

    def enter(self, tensor: Tensor, name: str, shape: Sequence[int]) -> None:
        """Give the labels that this parameter has left."""
        axes = tuple(self._trail.axis(slot) for slot in self._trail.script.parameters[name])
        self.know(tensor, Known(axes, weight=name))

    def known(self, tensor: Tensor) -> Known:
        """Give what is known of a tensor; the axes of a result that was not run stand in the script."""
        found = self._known.get(id(tensor))
        origin = self.origins.get(id(tensor))
        if found is None and origin and origin[0] == "step":
            form = self._trail.script.steps[origin[1]].results[origin[2]]
            found = Known(tuple(self._trail.axis(slot) for slot in form.slots))
        return found or super().known(tensor)

    def came_from(self, tensor: Tensor, origin: Origin) -> None:
        """Know of a tensor only where it comes from."""
        self.origins[id(tensor)] = origin
        self._known.pop(id(tensor), None)

    def rectangle(self, axis: Axis, rows: int, tie: int) -> Axis:
        """Blocks are tied already; those that are equal only now need not be."""
        if not isinstance(axis, np.ndarray):
            return axis
        block = axis.reshape(rows, -1)
        return block[0] if tie == 0 else block[:, 0]

    def hold(self, tensor: Tensor, dim: int) -> None:
        """Refuse another size than before the cut of an expanded dimension."""
        origin = self.origins.get(id(tensor), ("constant",))
        if origin[0] != "step" or self._trail.is_loose(self.at):
            return
        form = self._trail.script.steps[origin[1]].results[origin[2]]
        if form.slots[dim] is FREE and form.shape[dim] != tensor.shape[dim]:
            raise Mismatch(
                f"its result depends on a size that was {form.shape[dim]} and is {tensor.shape[dim]}", self.at
            )

    def renumber(self, tensor: Tensor, axis: IntArray) -> bool:
        """Which buffers hold positions is known already."""
        return self.weight(tensor) in self._trail.script.indices

    def source(self, axis: Axis) -> Source | None:
        """Roles are known already."""
        return None

    def freeze(self, axes: object, why: str) -> None:
        """Nothing is found out anew."""


def compare(trail: Trail, index: int, op: str, axes: Sequence[Axes], results: Sequence[Tensor]) -> None:
    """Hold what an operation of the cut model gave against the trail of the cut. Raises Mismatch."""
    if index >= len(trail.script.steps):
        raise Mismatch("the cut model runs more operations than the whole one did", index)
    before = trail.script.steps[index]
    if before.op != op or len(before.results) != len(results):
        raise Mismatch(f"{op} runs where {before.op} ran before the cut", index)
    for form, now, result in zip(before.results, axes, results, strict=True):
        for dim, (slot, size) in enumerate(zip(form.slots, form.shape, strict=True)):
            wanted = trail.axis(slot)
            if trail.is_loose(index) and not (isinstance(wanted, np.ndarray) and trail.live[wanted].any()):
                continue
            found = result.shape[dim] if dim < result.dim() else None
            if not _same(wanted, size, now[dim] if dim < len(now) else FIXED, found):
                left = len(wanted) if isinstance(wanted, np.ndarray) else size
                shown = "other channels" if found == left else f"a size of {found}"
                raise Mismatch(f"dimension {dim} of its result has {shown} where the cut leaves {left}", index)


def _same(wanted: Axis, before: int, now: Axis, size: int | None) -> bool:
    if isinstance(wanted, np.ndarray):
        return np.array_equal(wanted, now) if isinstance(now, np.ndarray) else len(wanted) == size == 1
    return wanted is not FIXED or size == before


def _array(axis: Axis) -> IntArray:
    assert isinstance(axis, np.ndarray)
    return axis
