"""From solved labels to groups: which channels live on the same tensor dimensions, and where.

Everything is arrays: one row for each position of each labelled dimension, sorted; no loop over channels.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from compressor.graph.axes import BoolArray, Classes, IntArray
from compressor.graph.flow import Flow, Source
from compressor.graph.group import ConsumerInput, Extent, Frozen, Group, Member, Term

_NONE: IntArray = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Grouping:
    """The groups of a graph, what is frozen, the costs in closed form, and each group's classes."""

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    params: tuple[Term, ...]
    macs: tuple[Term, ...]
    channels: dict[str, IntArray]


@dataclass(frozen=True, eq=False)
class _Table:
    """Where every group stands: by group, then by place (a labelled dimension), its positions, channel by channel."""

    pieces: list[dict[int, IntArray]]


def group_channels(flow: Flow, classes: Classes, parameters: dict[str, tuple[int, ...]]) -> Grouping:
    """Collect the classes of channels into groups.

    Args:
        flow: the notebook of the trace.
        classes: its solved labels.
        parameters: shape of every parameter of the model, by name.
    """
    places: list[IntArray] = [*flow.sources.values(), *(site.axis for site in flow.sites)]
    places += [axis for cost in flow.costs for axis in cost.axes]
    solved = [classes.of[labels] for labels in places]
    group_of, channel_of, sizes = _assign(solved, len(flow.sources), classes)
    table = _tabulate(solved, group_of, channel_of, len(sizes))
    names = _names(flow, table)
    extents = _extents(solved, table, names, sizes)
    order = np.lexsort((channel_of, group_of))
    channels = np.split(order[group_of[order] >= 0], np.cumsum(sizes)[:-1]) if sizes else []
    exact = [int(each[0]) not in classes.inexact for each in channels]
    return Grouping(
        groups=tuple(_group(flow, *each) for each in zip(table.pieces, names, sizes, exact, strict=True)),
        frozen=_frozen(flow, classes, parameters),
        params=_param_terms(flow, extents, parameters),
        macs=_mac_terms(flow, extents),
        channels=dict(zip(names, channels, strict=True)),
    )


def _assign(solved: list[IntArray], sources: int, classes: Classes) -> tuple[IntArray, IntArray, list[int]]:
    """Give every class the number of its group (-1: none) and its channel in it, and the groups' sizes.

    Two classes are in one group if they hold equally many positions on exactly the same places.
    """
    count = int(classes.of.max(initial=-1)) + 1
    cuttable = np.zeros(count, dtype=bool)
    for each in solved[:sources]:
        cuttable[each] = True
    cuttable[list(classes.reasons)] = False
    group_of = np.full(count, -1, dtype=np.int64)
    channel_of = np.full(count, -1, dtype=np.int64)
    if not cuttable.any():
        return group_of, channel_of, []
    signature = _signatures(solved, cuttable, classes)
    first = _first_seen(solved[:sources], count)
    found = np.flatnonzero(cuttable)
    found = found[np.argsort(first[found], kind="stable")]
    _, start, number, sizes = np.unique(signature[found], return_index=True, return_inverse=True, return_counts=True)
    rank = np.argsort(np.argsort(start))
    group_of[found] = rank[number]
    sizes = sizes[np.argsort(start)]
    order = np.argsort(group_of[found], kind="stable")
    channel_of[found[order]] = np.concatenate([np.arange(size) for size in sizes])
    return group_of, channel_of, sizes.tolist()


def _signatures(solved: list[IntArray], cuttable: BoolArray, classes: Classes) -> NDArray[np.uint64]:
    """Hash, for every class, on which places it stands and how often, and whether it is exact."""
    random = np.random.default_rng(0)
    count = len(cuttable)
    signature = np.zeros(count, dtype=np.uint64)
    signature[list(classes.inexact)] = random.integers(1, 2**63, dtype=np.uint64)
    for each in solved:
        here, number = np.unique(each, return_counts=True)
        salt = random.integers(1, 2**63, dtype=np.uint64)
        signature[here] += salt * (2 * number.astype(np.uint64) + np.uint64(1))
    return signature


def _first_seen(solved: list[IntArray], count: int) -> IntArray:
    """Give, for every class, where it first stands in the concatenation of all places."""
    everything = np.concatenate(solved)
    first = np.full(count, len(everything), dtype=np.int64)
    first[everything[::-1]] = np.arange(len(everything) - 1, -1, -1)
    return first


def _tabulate(solved: list[IntArray], group_of: IntArray, channel_of: IntArray, count: int) -> _Table:
    place = np.repeat(np.arange(len(solved)), [len(each) for each in solved])
    position = np.concatenate([*(np.arange(len(each)) for each in solved), _NONE])
    classes = np.concatenate([*solved, _NONE])
    inside = group_of[classes] >= 0
    place, position, classes = place[inside], position[inside].astype(np.int64), classes[inside]
    order = np.lexsort((position, channel_of[classes], place, group_of[classes]))
    place, position, group = place[order], position[order], group_of[classes[order]]
    edges = np.flatnonzero((np.diff(place, prepend=-1) != 0) | (np.diff(group, prepend=-1) != 0))
    pieces: list[dict[int, IntArray]] = [{} for _ in range(count)]
    for start, end in itertools.pairwise([*edges.tolist(), len(place)]):
        pieces[int(group[start])][int(place[start])] = position[start:end]
    return _Table(pieces)


def _names(flow: Flow, table: _Table) -> list[str]:
    """Name each group after the module of its first producer; a number tells groups of one producer apart."""
    sources = list(flow.sources)
    names: list[str] = []
    taken: dict[str, int] = {}
    for pieces in table.pieces:
        mine = [sources[place] for place in pieces if place < len(sources)]
        first = next((source for source in mine if flow.roles.get(source) == "producer"), mine[0])
        base = first.tensor.rpartition(".")[0] or first.tensor
        taken[base] = taken.get(base, 0) + 1
        names.append(base if taken[base] == 1 else f"{base}#{taken[base]}")
    return names


def _group(flow: Flow, pieces: dict[int, IntArray], name: str, size: int, exact: bool) -> Group:
    members, inputs = [], []
    sources = list(flow.sources)
    for place, positions in pieces.items():
        block = torch.from_numpy(positions.reshape(size, -1))
        if place < len(sources):
            source = sources[place]
            members.append(Member(source.tensor, source.dim, block, flow.roles.get(source, "follower")))
        elif place < len(sources) + len(flow.sites):
            site = flow.sites[place - len(sources)]
            inputs.append(ConsumerInput(site.weight, site.dim, block))
    return Group(name, size, tuple(members), tuple(inputs), exact)


def _extents(solved: list[IntArray], table: _Table, names: list[str], sizes: list[int]) -> list[Extent]:
    """Give the extent of every place: what is fixed, and what each channel of each group adds."""
    per_channel: list[dict[str, int]] = [{} for _ in solved]
    for name, size, pieces in zip(names, sizes, table.pieces, strict=True):
        for place, positions in pieces.items():
            per_channel[place][name] = len(positions) // size
    size_of = dict(zip(names, sizes, strict=True))
    return [
        Extent(len(each) - sum(times * size_of[name] for name, times in channels.items()), channels)
        for each, channels in zip(solved, per_channel, strict=True)
    ]


def _param_terms(flow: Flow, extents: list[Extent], parameters: dict[str, tuple[int, ...]]) -> tuple[Term, ...]:
    by_source = dict(zip(flow.sources, extents, strict=False))
    terms = []
    for name, shape in parameters.items():
        known = [by_source.get(Source(name, dim), Extent(size)) for dim, size in enumerate(shape)]
        terms.append(_term(1, known))
    return tuple(terms)


def _mac_terms(flow: Flow, extents: list[Extent]) -> tuple[Term, ...]:
    rest = iter(extents[len(flow.sources) + len(flow.sites) :])
    return tuple(_term(cost.constant, [next(rest) for _ in cost.axes]) for cost in flow.costs)


def _term(constant: int, extents: list[Extent]) -> Term:
    """Multiply what is fixed into the constant."""
    for extent in extents:
        if not extent.per_channel:
            constant *= extent.fixed
    return Term(constant, tuple(extent for extent in extents if extent.per_channel))


def _frozen(flow: Flow, classes: Classes, parameters: dict[str, tuple[int, ...]]) -> tuple[Frozen, ...]:
    """Name every dimension of a parameter that has frozen channels, with the first reason and the shape."""
    found = []
    for source, labels in flow.sources.items():
        if source in flow.kernels or source.tensor not in parameters:
            continue
        stuck = [each for each in classes.of[labels].tolist() if each in classes.reasons]
        if stuck:
            shape = parameters[source.tensor]
            reason = f"{classes.reasons[stuck[0]]} (weight shape {tuple(shape)})"
            found.append(Frozen(source.tensor, source.dim, reason, len(stuck)))
    return tuple(found)
