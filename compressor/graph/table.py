"""All members of all groups as arrays: which channel stands at which position of which place.

A *place* is one dimension of a parameter or buffer, or of the input at which a consumer sees channels. A network with
dense connections has tens of thousands of members; a cut narrows them all at once here, and `Member` objects are made
for those that someone asks for.

Shape letters: P places, G groups, N rows (one for each position that a channel holds), E entries (a group on a place).
"""

# A worked example: conv a (3 -> 4), BatchNorm bn, conv c (4 -> 2). One group "a" of four channels (G = 1) on eight
# places where it stands (P also counts those where it does not; they have no rows):
#
#   place   tensor            dim  role        position  channel
#   0       a.weight          0    producer    0 1 2 3   0 1 2 3
#   2       a.bias            0    follower    0 1 2 3   0 1 2 3
#   3..6    bn.weight, ...    0    follower    0 1 2 3   0 1 2 3       weight, bias, running_mean, running_var
#   8       c.weight          1    consumer    0 1 2 3   0 1 2 3
#   10      c.weight          -3   None        0 1 2 3   0 1 2 3       where the module c sees them
#
# N = 32 rows in E = 8 entries, start = [0 4 8 ... 32]. Keeping channels 0, 2, 3 removes channel 1 and with it one row
# of every entry: `kept_positions` says {"a.weight": {0: [0 2 3]}, ..., "c.weight": {1: [0 2 3]}}, and `without` counts
# anew what is left, so that position and channel read 0 1 2 again and start = [0 3 6 ... 24].
#
# Behind a flatten of 2 x 2 the last weight would have sixteen rows: position 0 1 2 ... 15, channel 0 0 0 0 1 1 1 1 ...

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import torch

from compressor.graph.axes import BoolArray, IntArray
from compressor.graph.group import ConsumerInput, Group, Member, Role

T = TypeVar("T")


class Place(NamedTuple):
    """A dimension where channels stand; without a role it is an input, and `tensor` the weight that consumes it."""

    tensor: str
    dim: int
    role: Role | None


@dataclass(frozen=True, eq=False)
class Table:
    """Rows sorted by place, group, channel and position.

    Attributes:
        places, lengths: `(P,)` the places, and how many positions each has, with and without channels.
        names, sizes: `(G,)` the groups and how many channels each has.
        channel: `(N,)` the channel of each row, counted through all groups.
        position: `(N,)` its position in the place.
        place, group: `(E,)` of each entry; its rows are `start[e]` to `start[e + 1]`.
        start: `(E + 1,)`.
    """

    places: tuple[Place, ...]
    lengths: IntArray
    names: tuple[str, ...]
    sizes: IntArray
    channel: IntArray
    position: IntArray
    place: IntArray
    group: IntArray
    start: IntArray

    @staticmethod
    def empty() -> Table:
        """Return the table of a graph without groups."""
        none, start = np.empty(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
        return Table((), none, (), none, none, none, none, none, start)

    def groups(self, exact: Sequence[bool]) -> tuple[Group, ...]:
        """Return the groups, whose members are made when they are asked for."""
        return tuple(
            self._group(name, index, each) for index, (name, each) in enumerate(zip(self.names, exact, strict=True))
        )

    def _group(self, name: str, index: int, exact: bool) -> Group:
        members = LazySequence(lambda: tuple(self._members(index)))
        inputs = LazySequence(lambda: tuple(self._inputs(index)))
        return Group(name, int(self.sizes[index]), members, inputs, exact)

    def _members(self, index: int) -> Iterator[Member]:
        for place, positions in self._entries(index):
            if place.role:
                yield Member(place.tensor, place.dim, positions, place.role)

    def _inputs(self, index: int) -> Iterator[ConsumerInput]:
        for place, positions in self._entries(index):
            if not place.role:
                yield ConsumerInput(place.tensor, place.dim, positions)

    def _entries(self, index: int) -> Iterator[tuple[Place, torch.Tensor]]:
        for entry in self._entries_of[index].tolist():
            # Rows are sorted by channel, and every channel of a group holds equally many positions: one row each.
            rows = self.position[self.start[entry] : self.start[entry + 1]]
            positions = torch.from_numpy(rows.reshape(int(self.sizes[index]), -1).copy())
            yield self.places[int(self.place[entry])], positions

    @cached_property
    def _entries_of(self) -> list[IntArray]:
        """Return the entries of each group."""
        order = np.argsort(self.group, kind="stable")
        return np.split(order, np.searchsorted(self.group[order], np.arange(1, len(self.sizes))))

    @cached_property
    def _offsets(self) -> IntArray:
        """Return where each place begins when all are laid one behind the other, `(P + 1,)`."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def removed(self, keep: Mapping[str, torch.Tensor]) -> BoolArray:
        """Return for every channel, counted through all groups, whether it is removed.

        Args:
            keep: by group name, the channels that stay, `(n,)`; groups that are not named stay whole.
        """
        first = dict(zip(self.names, (np.cumsum(self.sizes) - self.sizes).tolist(), strict=True))
        size = dict(zip(self.names, self.sizes.tolist(), strict=True))
        removed = np.zeros(int(self.sizes.sum()), dtype=bool)
        for name, kept in keep.items():
            removed[first[name] : first[name] + size[name]] = True
            removed[first[name] + kept.numpy()] = False
        return removed

    def kept_positions(self, removed: BoolArray) -> dict[str, dict[int, torch.Tensor]]:
        """Return, by tensor and dimension, the positions that stay wherever a tensor gets narrower."""
        positions = self._removed_positions(removed)
        # How many are removed before each position: two places' worth of it tell whether a place loses any.
        before = np.concatenate([[0], np.cumsum(positions)])
        found: dict[str, dict[int, torch.Tensor]] = {}
        for index in np.flatnonzero(np.diff(before[self._offsets])).tolist():
            place = self.places[index]
            kept = ~positions[self._offsets[index] : self._offsets[index + 1]]
            if place.role:
                found.setdefault(place.tensor, {})[place.dim] = torch.from_numpy(np.flatnonzero(kept))
        return found

    def _removed_positions(self, removed: BoolArray) -> BoolArray:
        """Return for every position of all places, laid one behind the other, whether it is removed."""
        positions = np.zeros(int(self._offsets[-1]), dtype=bool)
        rows = removed[self.channel]
        positions[self._row_offsets[rows] + self.position[rows]] = True
        return positions

    @cached_property
    def _row_offsets(self) -> IntArray:
        """Return where the place of each row begins, `(N,)`."""
        return np.repeat(self._offsets[self.place], np.diff(self.start))

    def without(self, removed: BoolArray) -> Table:
        """Return the table of the model after a cut: fewer rows, positions and channels counted anew."""
        before = np.concatenate([[0], np.cumsum(self._removed_positions(removed))])
        rows = ~removed[self.channel]
        # NOTE: The places of groups that lose nothing shift too: on a concatenation they stand behind those that do.
        shift = before[self._row_offsets + self.position] - before[self._row_offsets]
        rows_before = np.concatenate([[0], np.cumsum(rows)])
        group = np.repeat(np.arange(len(self.sizes)), self.sizes)
        return replace(
            self,
            lengths=self.lengths - np.diff(before[self._offsets]),
            sizes=np.bincount(group[~removed], minlength=len(self.sizes)),
            channel=(np.cumsum(~removed) - 1)[self.channel[rows]],
            position=(self.position - shift)[rows],
            start=rows_before[self.start],
        )


class LazySequence(Sequence[T]):
    """A sequence that is made when it is first read, for members that most callers never look at."""

    def __init__(self, make: Callable[[], tuple[T, ...]]) -> None:
        self._make = make

    @cached_property
    def _items(self) -> tuple[T, ...]:
        return self._make()

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: Any) -> Any:
        """Return one item, or several."""
        return self._items[index]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._items)
