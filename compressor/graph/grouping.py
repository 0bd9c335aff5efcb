"""From solved labels to groups: which channels live on the same tensor dimensions, and where.

Everything is arrays: one row for each position of each labelled dimension, sorted; no loop over channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from compressor.graph.axes import BoolArray, Classes, IntArray
from compressor.graph.context import Flow, Source
from compressor.graph.group import Extent, Frozen, Group, Term
from compressor.graph.table import Place, Table

_NONE: IntArray = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Grouping:
    """The groups of a graph, what is frozen, the costs in closed form, and each group's classes."""

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    params: tuple[Term, ...]
    macs: tuple[Term, ...]
    table: Table
    channels: dict[str, IntArray]


def group_channels(flow: Flow, classes: Classes, parameters: dict[str, tuple[int, ...]]) -> Grouping:
    """Collect the classes of channels into groups.

    Args:
        flow: the notebook of the trace.
        classes: its solved labels.
        parameters: shape of every parameter of the model, by name.
    """
    axes = _Axes(flow, classes)
    group_of, channel_of, sizes = _assign(axes, classes)
    table = _tabulate(axes, group_of, channel_of, sizes)
    table = replace(table, names=_names(flow, table))
    extents = _extents(axes, table)
    order = np.lexsort((channel_of, group_of))
    channels = np.split(order[group_of[order] >= 0], np.cumsum(sizes)[:-1]) if len(sizes) else []
    table = _only_members(table, axes.members)
    return Grouping(
        groups=table.groups([int(each[0]) not in classes.inexact for each in channels]),
        frozen=_frozen(flow, classes, parameters),
        params=_param_terms(flow, extents, parameters),
        macs=_mac_terms(flow, extents, axes),
        table=table,
        channels=dict(zip(table.names, channels, strict=True)),
    )


class _Axes:
    """Every labelled axis that counts, one behind the other: sources, sites, and what else is in a cost.

    Attributes:
        places: `(P,)` of sources and sites.
        members: `P`; axes from there on are in costs only.
        sources: how many of them are sources.
        lengths: `(A,)` of all axes.
        axis: `(M,)` the axis of each position of each axis; `position` where it is in it; `found` its class.
        index: which axis an array is, by `id`.
    """

    def __init__(self, flow: Flow, classes: Classes) -> None:
        sources = [Place(source.tensor, source.dim, flow.roles.get(source, "follower")) for source in flow.sources]
        self.places = (*sources, *(Place(site.weight, site.dim, None) for site in flow.sites))
        self.members, self.sources = len(self.places), len(sources)
        arrays = [*flow.sources.values(), *(site.axis for site in flow.sites)]
        self.index = {id(array): number for number, array in enumerate(arrays)}
        for array in (array for cost in flow.costs for array in cost.axes):
            if id(array) not in self.index:
                self.index[id(array)] = len(arrays)
                arrays.append(array)
        self.lengths = np.array([len(array) for array in arrays], dtype=np.int64)
        ends = np.cumsum(self.lengths)
        self.axis = np.repeat(np.arange(len(arrays)), self.lengths)
        self.position = np.arange(len(self.axis)) - np.repeat(ends - self.lengths, self.lengths)
        self.found = classes.of[np.concatenate([*arrays, _NONE])]


def _assign(axes: _Axes, classes: Classes) -> tuple[IntArray, IntArray, IntArray]:
    """Give every class the number of its group (-1: none) and its channel in it, and the groups' sizes.

    Two classes are in one group if they hold equally many positions on exactly the same places.
    """
    count = int(classes.of.max(initial=-1)) + 1
    mine = axes.found[axes.axis < axes.sources]
    cuttable = np.zeros(count, dtype=bool)
    cuttable[mine] = True
    cuttable[list(classes.reasons)] = False
    group_of, channel_of = np.full((2, count), -1, dtype=np.int64)
    if not cuttable.any():
        return group_of, channel_of, _NONE
    first = np.full(count, len(mine), dtype=np.int64)
    first[mine[::-1]] = np.arange(len(mine) - 1, -1, -1)
    found = np.flatnonzero(cuttable)
    found = found[np.argsort(first[found], kind="stable")]
    signature = _signatures(axes, count, classes)[found]
    _, start, number, sizes = np.unique(signature, return_index=True, return_inverse=True, return_counts=True)
    group_of[found] = np.argsort(np.argsort(start))[number]
    sizes = sizes[np.argsort(start)]
    order = np.argsort(group_of[found], kind="stable")
    channel_of[found[order]] = np.arange(len(found)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return group_of, channel_of, sizes


def _signatures(axes: _Axes, count: int, classes: Classes) -> NDArray[np.uint64]:
    """Hash, for every class, on which axes it stands and how often, and whether it is exact."""
    random = np.random.default_rng(0)
    signature = np.zeros(count, dtype=np.uint64)
    signature[list(classes.inexact)] = random.integers(1, 2**63, dtype=np.uint64)
    salt = random.integers(1, 2**63, size=len(axes.lengths), dtype=np.uint64)
    np.add.at(signature, axes.found, salt[axes.axis])
    return signature


def _tabulate(axes: _Axes, group_of: IntArray, channel_of: IntArray, sizes: IntArray) -> Table:
    """Sort every position that a channel holds; the names of the groups are still missing."""
    inside = group_of[axes.found] >= 0
    axis, position, found = axes.axis[inside], axes.position[inside], axes.found[inside]
    channel = (np.cumsum(sizes) - sizes)[group_of[found]] + channel_of[found]
    group = group_of[found]
    key = axis * max(int(sizes.sum()), 1) + channel
    if (key[1:] < key[:-1]).any():  # only where channels stand out of order: a shuffle, a flip
        order = np.argsort(key, kind="stable")
        axis, position, channel, group = axis[order], position[order], channel[order], group[order]
    start = np.flatnonzero((np.diff(axis, prepend=-1) != 0) | (np.diff(group, prepend=-1) != 0))
    ends = np.append(start, len(axis))
    return Table(axes.places, axes.lengths, (), sizes, channel, position, axis[start], group[start], ends)


def _only_members(table: Table, places: int) -> Table:
    """Give the table without what stands in costs only."""
    entries = int(np.searchsorted(table.place, places))
    rows = int(table.start[entries])
    return replace(
        table,
        lengths=table.lengths[:places],
        channel=table.channel[:rows],
        position=table.position[:rows],
        place=table.place[:entries],
        group=table.group[:entries],
        start=table.start[: entries + 1],
    )


def _names(flow: Flow, table: Table) -> tuple[str, ...]:
    """Name each group after the module of its first producer; a number tells groups of one producer apart."""
    named = np.array([bool(place.role) for place in table.places], dtype=bool)
    makes = np.array([place.role == "producer" for place in table.places], dtype=bool)
    names: list[str] = []
    taken: dict[str, int] = {}
    mine = table.place < len(table.places)
    place, group = table.place[mine], table.group[mine]
    place, group = place[named[place]], group[named[place]]
    # NOTE: producers first, then in the order of the model; the first row of each group names it.
    order = np.lexsort((place, ~makes[place], group))
    for first in order[np.searchsorted(group[order], np.arange(len(table.sizes)))].tolist():
        tensor = table.places[int(place[first])].tensor
        base = tensor.rpartition(".")[0] or tensor
        taken[base] = taken.get(base, 0) + 1
        names.append(base if taken[base] == 1 else f"{base}#{taken[base]}")
    return tuple(names)


def _extents(axes: _Axes, table: Table) -> list[Extent]:
    """Give the extent of every axis: what is fixed, and what each channel of each group adds."""
    rows = np.diff(table.start)
    fixed = axes.lengths - np.bincount(table.place, weights=rows, minlength=len(axes.lengths)).astype(np.int64)
    per_channel: list[dict[str, int]] = [{} for _ in fixed]
    each = rows // table.sizes[table.group] if len(rows) else rows
    for place, group, times in zip(table.place.tolist(), table.group.tolist(), each.tolist(), strict=True):
        per_channel[place][table.names[group]] = times
    return [Extent(size, channels) for size, channels in zip(fixed.tolist(), per_channel, strict=True)]


def _param_terms(flow: Flow, extents: list[Extent], parameters: dict[str, tuple[int, ...]]) -> tuple[Term, ...]:
    by_source = dict(zip(flow.sources, extents, strict=False))
    terms = []
    for name, shape in parameters.items():
        known = [by_source.get(Source(name, dim), Extent(size)) for dim, size in enumerate(shape)]
        terms.append(_term(1, known))
    return tuple(terms)


def _mac_terms(flow: Flow, extents: list[Extent], axes: _Axes) -> tuple[Term, ...]:
    return tuple(_term(cost.constant, [extents[axes.index[id(axis)]] for axis in cost.axes]) for cost in flow.costs)


def _term(constant: int, extents: list[Extent]) -> Term:
    """Multiply what is fixed into the constant."""
    for extent in extents:
        if not extent.per_channel:
            constant *= extent.fixed
    return Term(constant, tuple(extent for extent in extents if extent.per_channel))


def _frozen(flow: Flow, classes: Classes, parameters: dict[str, tuple[int, ...]]) -> tuple[Frozen, ...]:
    """Name every dimension of a parameter that has frozen channels, with the first reason and the shape."""
    stuck: BoolArray = np.zeros(int(classes.of.max(initial=-1)) + 1, dtype=bool)
    stuck[list(classes.reasons)] = True
    found = []
    for source, labels in flow.sources.items():
        if source in flow.kernels or source.tensor not in parameters:
            continue
        here = classes.of[labels]
        here = here[stuck[here]]
        if len(here):
            shape = parameters[source.tensor]
            reason = f"{classes.reasons[int(here[0])]} (weight shape {tuple(shape)})"
            found.append(Frozen(source.tensor, source.dim, reason, len(here)))
    return tuple(found)
