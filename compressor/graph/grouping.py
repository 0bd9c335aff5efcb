"""From solved labels to groups: which channels live on the same tensor dimensions, and where.

Everything is arrays: one row for each position of each labelled dimension, sorted; no loop over channels.
"""

# A worked example: conv a (3 -> 4), then conv c (4 -> 2), both without bias. The model's input and output are frozen,
# so four classes are left, one for each channel between them. Every dimension where they stand gets a random salt, and
# a class sums the salts of its positions:
#
#   dimension             salt   classes there   signature of class 0, 1, 2, 3
#   a.weight dim 0        s0     0 1 2 3         s0
#   c.weight dim 1        s3     0 1 2 3         s0 + s3
#   input of c, dim -3    s4     0 1 2 3         s0 + s3 + s4
#
# Four equal signatures: one group of four channels. Behind a flatten of 2 x 2, c would be a Linear in which each class
# stands four times: s0 + 4 * s3 + 4 * s4. If only channels 0 and 1 were read by a third layer as well, theirs would
# have one summand more, and there would be two groups, "a" and "a#2", of two channels each.

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from compressor.graph.axes import Classes, IntArray
from compressor.graph.context import ParameterDim, TraceContext
from compressor.graph.group import Extent, Frozen, Group, Term, owner
from compressor.graph.table import Place, Table

_EMPTY: IntArray = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Grouping:
    """The groups of a graph, what is frozen, the costs in closed form, and each group's classes."""

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    params: tuple[Term, ...]
    macs: tuple[Term, ...]
    table: Table
    channels: dict[str, IntArray]


def group_channels(context: TraceContext, classes: Classes, parameters: dict[str, tuple[int, ...]]) -> Grouping:
    """Collect the classes of channels into groups.

    Args:
        context: what the trace found.
        classes: its solved labels.
        parameters: shape of every parameter of the model, by name.
    """
    axes = _LabelledAxes(context, classes)
    group_of, channel_of, sizes = _assign(axes, classes)
    table = _tabulate(axes, group_of, channel_of, sizes)
    table = replace(table, names=_names(context, table))
    extents = _extents(axes, table)
    # Group by group, the classes of its channels in their order: what a cut removes from the recording.
    order = np.lexsort((channel_of, group_of))
    channels = np.split(order[group_of[order] >= 0], np.cumsum(sizes)[:-1]) if len(sizes) else []
    table = _only_members(table, axes.members)
    return Grouping(
        groups=table.groups([int(each[0]) not in classes.inexact for each in channels]),
        frozen=_frozen(context, classes, parameters),
        params=_param_terms(context, extents, parameters),
        macs=_mac_terms(context, extents, axes),
        table=table,
        channels=dict(zip(table.names, channels, strict=True)),
    )


class _LabelledAxes:
    """Every labelled axis that counts, one behind the other: of parameters, of consumer inputs, and others in costs.

    Attributes:
        places: `(P,)` dimensions of parameters and buffers, then inputs of consumers.
        members: `P`; axes from there on are in costs only.
        parameter_dims: how many of the places belong to parameters and buffers.
        lengths: `(A,)` of all axes.
        axis: `(M,)` the axis of each position of each axis; `position` where it is in it; `class_ids` its class.
        index: which axis an array is, by `id`.
    """

    def __init__(self, context: TraceContext, classes: Classes) -> None:
        dims = [Place(dim.tensor, dim.dim, context.roles.get(dim, "follower")) for dim in context.parameter_dims]
        self.places = (*dims, *(Place(site.weight, site.dim, None) for site in context.sites))
        self.members = len(self.places)
        self.parameter_dims = len(dims)
        arrays = [*context.parameter_dims.values(), *(site.axis for site in context.sites)]
        self.index = {id(array): number for number, array in enumerate(arrays)}
        # The size of an activation's axis can be no parameter's: of a concatenation, or of space that is flattened.
        for array in (array for cost in context.costs for array in cost.axes):
            if id(array) not in self.index:
                self.index[id(array)] = len(arrays)
                arrays.append(array)
        self.lengths = np.array([len(array) for array in arrays], dtype=np.int64)
        ends = np.cumsum(self.lengths)
        self.axis = np.repeat(np.arange(len(arrays)), self.lengths)
        self.position = np.arange(len(self.axis)) - np.repeat(ends - self.lengths, self.lengths)
        self.class_ids = classes.class_ids[np.concatenate([*arrays, _EMPTY])]


def _assign(axes: _LabelledAxes, classes: Classes) -> tuple[IntArray, IntArray, IntArray]:
    """Return every class the number of its group (-1: none) and its channel in it, and the groups' sizes.

    Two classes are in one group if they hold equally many positions on exactly the same places.
    """
    count = int(classes.class_ids.max(initial=-1)) + 1
    in_parameters = axes.class_ids[axes.axis < axes.parameter_dims]
    cuttable = np.zeros(count, dtype=bool)
    cuttable[in_parameters] = True  # a class without a parameter has nothing to cut
    cuttable[classes.frozen] = False
    group_of, channel_of = np.full((2, count), -1, dtype=np.int64)
    if not cuttable.any():
        return group_of, channel_of, _EMPTY
    # Classes in the order of their first position (the last write wins, hence backwards): groups come in the order of
    # the model, and channels in the order of the first parameter on which they stand.
    first = np.full(count, len(in_parameters), dtype=np.int64)
    first[in_parameters[::-1]] = np.arange(len(in_parameters) - 1, -1, -1)
    found = np.flatnonzero(cuttable)
    found = found[np.argsort(first[found], kind="stable")]
    signature = _signatures(axes, count, classes)[found]
    _, start, number, sizes = np.unique(signature, return_index=True, return_inverse=True, return_counts=True)
    # `np.unique` sorts by signature, which is random: rank its groups by where each first appears.
    group_of[found] = np.argsort(np.argsort(start))[number]
    sizes = sizes[np.argsort(start)]
    order = np.argsort(group_of[found], kind="stable")
    channel_of[found[order]] = np.arange(len(found)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return group_of, channel_of, sizes


# NOTE: Signatures are 64-bit hashes: the sum, modulo 2^64, of one random salt for each position that a class holds. Why
# this is right: comparing exact multisets of dimensions takes a loop over channels, which is what tracing a DenseNet
# would spend its time on. It is a sum and not an exclusive or, because two positions on one dimension (K = 2) would
# cancel there and look like none.
#
# Two kinds of classes that differ collide with probability 2^-64 (2^(k-64) where they differ by multiples of 2^k on
# every dimension), so n kinds do with about n^2 / 2^65: for 10^5, which no network has, 3e-10. The generator is seeded:
# a model that collides does so every time, and not in one run of many.
#
# A collision would put two groups into one. The cut itself would still be right, since rows and recording are kept by
# class, and so the verification would not notice; but members and costs of that group would be nonsense. `_extents`
# therefore refuses rows that do not divide among the channels, which is how nearly every collision shows.
def _signatures(axes: _LabelledAxes, count: int, classes: Classes) -> NDArray[np.uint64]:
    """Return for every class a hash of the axes on which it stands and how often, and of whether it is exact."""
    random = np.random.default_rng(0)
    signature = np.zeros(count, dtype=np.uint64)
    signature[list(classes.inexact)] = random.integers(0, 2**64, dtype=np.uint64)
    salt = random.integers(0, 2**64, size=len(axes.lengths), dtype=np.uint64)
    np.add.at(signature, axes.class_ids, salt[axes.axis])
    return signature


def _tabulate(axes: _LabelledAxes, group_of: IntArray, channel_of: IntArray, sizes: IntArray) -> Table:
    """Sort every position that a channel holds; the names of the groups are still missing."""
    inside = group_of[axes.class_ids] >= 0
    axis, position, found = axes.axis[inside], axes.position[inside], axes.class_ids[inside]
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
    """Return the table without what stands in costs only."""
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


def _names(context: TraceContext, table: Table) -> tuple[str, ...]:
    """Name each group after the module of its first producer; a number tells groups of one producer apart."""
    named = np.array([bool(place.role) for place in table.places], dtype=bool)
    makes = np.array([place.role == "producer" for place in table.places], dtype=bool)
    names: list[str] = []
    taken: dict[str, int] = {}
    entries = table.place < len(table.places)
    place, group = table.place[entries], table.group[entries]
    place, group = place[named[place]], group[named[place]]
    # NOTE: Producers first, then in the order of the model; the first row of each group names it.
    order = np.lexsort((place, ~makes[place], group))
    for first in order[np.searchsorted(group[order], np.arange(len(table.sizes)))].tolist():
        tensor = table.places[int(place[first])].tensor
        base = owner(tensor)[0] or tensor
        taken[base] = taken.get(base, 0) + 1
        names.append(base if taken[base] == 1 else f"{base}#{taken[base]}")
    return tuple(names)


def _extents(axes: _LabelledAxes, table: Table) -> list[Extent]:
    """Return the extent of every axis: what is fixed, and what each channel of each group adds."""
    rows = np.diff(table.start)
    fixed = axes.lengths - np.bincount(table.place, weights=rows, minlength=len(axes.lengths)).astype(np.int64)
    per_channel: list[dict[str, int]] = [{} for _ in fixed]
    each, rest = np.divmod(rows, table.sizes[table.group])
    assert not rest.any(), "two kinds of channels have one signature"
    for place, group, times in zip(table.place.tolist(), table.group.tolist(), each.tolist(), strict=True):
        per_channel[place][table.names[group]] = times
    return [Extent(size, channels) for size, channels in zip(fixed.tolist(), per_channel, strict=True)]


def _param_terms(
    context: TraceContext, extents: list[Extent], parameters: dict[str, tuple[int, ...]]
) -> tuple[Term, ...]:
    # `_LabelledAxes` lays parameter dimensions first, so the extents begin with theirs.
    by_dim = dict(zip(context.parameter_dims, extents, strict=False))
    terms = []
    for name, shape in parameters.items():
        known = [by_dim.get(ParameterDim(name, dim), Extent(size)) for dim, size in enumerate(shape)]
        terms.append(_term(1, known))
    return tuple(terms)


def _mac_terms(context: TraceContext, extents: list[Extent], axes: _LabelledAxes) -> tuple[Term, ...]:
    return tuple(_term(cost.constant, [extents[axes.index[id(axis)]] for axis in cost.axes]) for cost in context.costs)


def _term(constant: int, extents: list[Extent]) -> Term:
    """Return the product of extents, with those that no cut changes multiplied into the constant."""
    for extent in extents:
        if not extent.per_channel:
            constant *= extent.fixed
    return Term(constant, tuple(extent for extent in extents if extent.per_channel))


def _frozen(context: TraceContext, classes: Classes, parameters: dict[str, tuple[int, ...]]) -> tuple[Frozen, ...]:
    """Name every dimension of a parameter that has frozen channels, with the first reason and the shape."""
    is_frozen = classes.frozen
    found = []
    for dim, labels in context.parameter_dims.items():
        # A kernel's extent is never a channel, and a buffer follows the weights: neither is worth a line in a report.
        if dim in context.kernel_dims or dim.tensor not in parameters:
            continue
        class_ids = classes.class_ids[labels]
        class_ids = class_ids[is_frozen[class_ids]]
        if len(class_ids):
            shape = parameters[dim.tensor]
            reason = f"{classes.reason(int(class_ids[0]))} (weight shape {tuple(shape)})"
            found.append(Frozen(dim.tensor, dim.dim, reason, len(class_ids)))
    return tuple(found)
