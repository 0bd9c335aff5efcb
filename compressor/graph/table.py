"""All members of all groups as arrays: which channel stands at which position of which place.

A *place* is one dimension of a parameter or buffer, or of the input at which a consumer sees channels. A network with
dense connections has tens of thousands of members; a cut narrows them all at once here, and `Member` objects are made
for those that someone asks for.

Shape letters: P places, G groups, N rows (one for each position that a channel holds), E entries (a group on a place).
"""

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

    def groups(self, exact: Sequence[bool]) -> tuple[Group, ...]:
        """Give the groups, whose members are made when they are asked for."""
        return tuple(
            self._group(name, index, sure) for index, (name, sure) in enumerate(zip(self.names, exact, strict=True))
        )

    def _group(self, name: str, index: int, exact: bool) -> Group:
        members = Lazy(lambda: tuple(self._members(index)))
        inputs = Lazy(lambda: tuple(self._inputs(index)))
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
            rows = self.position[self.start[entry] : self.start[entry + 1]]
            positions = torch.from_numpy(rows.reshape(int(self.sizes[index]), -1).copy())
            yield self.places[int(self.place[entry])], positions

    @cached_property
    def _entries_of(self) -> list[IntArray]:
        """Give the entries of each group."""
        order = np.argsort(self.group, kind="stable")
        return np.split(order, np.searchsorted(self.group[order], np.arange(1, len(self.sizes))))

    @cached_property
    def _offsets(self) -> IntArray:
        """Give where each place begins when all are laid one behind the other, `(P + 1,)`."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def gone(self, keep: Mapping[str, torch.Tensor]) -> BoolArray:
        """Tell, for every channel counted through all groups, whether it goes.

        Args:
            keep: by group name, the channels that stay, `(n,)`; groups that are not named stay whole.
        """
        first = dict(zip(self.names, (np.cumsum(self.sizes) - self.sizes).tolist(), strict=True))
        size = dict(zip(self.names, self.sizes.tolist(), strict=True))
        gone = np.zeros(int(self.sizes.sum()), dtype=bool)
        for name, kept in keep.items():
            gone[first[name] : first[name] + size[name]] = True
            gone[first[name] + kept.numpy()] = False
        return gone

    def stays(self, gone: BoolArray) -> dict[str, dict[int, torch.Tensor]]:
        """Give, by tensor and dimension, the positions that stay wherever a tensor gets narrower."""
        lost = self._lost(gone)
        before = np.concatenate([[0], np.cumsum(lost)])
        found: dict[str, dict[int, torch.Tensor]] = {}
        for index in np.flatnonzero(np.diff(before[self._offsets])).tolist():
            place, kept = self.places[index], ~lost[self._offsets[index] : self._offsets[index + 1]]
            if place.role:
                found.setdefault(place.tensor, {})[place.dim] = torch.from_numpy(np.flatnonzero(kept))
        return found

    def _lost(self, gone: BoolArray) -> BoolArray:
        """Tell which positions of all places, laid one behind the other, go."""
        lost = np.zeros(int(self._offsets[-1]), dtype=bool)
        lost[self._row_offsets[gone[self.channel]] + self.position[gone[self.channel]]] = True
        return lost

    @cached_property
    def _row_offsets(self) -> IntArray:
        return np.repeat(self._offsets[self.place], np.diff(self.start))

    def without(self, gone: BoolArray) -> Table:
        """Give the table of the model from which channels are gone: fewer rows, positions and channels counted anew."""
        before = np.concatenate([[0], np.cumsum(self._lost(gone))])
        rows = ~gone[self.channel]
        shift = before[self._row_offsets + self.position] - before[self._row_offsets]
        fewer = np.concatenate([[0], np.cumsum(rows)])
        group = np.repeat(np.arange(len(self.sizes)), self.sizes)
        return replace(
            self,
            lengths=self.lengths - np.diff(before[self._offsets]),
            sizes=np.bincount(group[~gone], minlength=len(self.sizes)),
            channel=(np.cumsum(~gone) - 1)[self.channel[rows]],
            position=(self.position - shift)[rows],
            start=fewer[self.start],
        )


class Lazy(Sequence[T]):
    """A sequence that is made when someone looks."""

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
        """Give one item, or several."""
        return self._items[index]

    def __len__(self) -> int:
        """Give how many there are."""
        return len(self._items)
