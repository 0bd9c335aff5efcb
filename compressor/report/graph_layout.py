"""Where everything of a channel graph's picture goes: one row for each weight, one lane for each group's wire.

Nothing is drawn here and nothing has a colour: see `compressor.report.graph_picture`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np

from compressor.graph import ChannelGraph, Frozen, Member, Role

Side = Literal["input", "output"]
_SIDES: tuple[Side, Side] = ("input", "output")
_LARGE = 40  # a block with more rows than this is shown by its parts


class Stripe(NamedTuple):
    """A share of a dimension: so many positions belong to this group, or to none (they are frozen)."""

    group: str | None
    share: int


@dataclass(frozen=True)
class Node:
    """One row of the picture: a module with its tensors, or one tensor where a module owns several matrices.

    Attributes:
        name: of the module that owns the weight; of the tensor itself where that is not called "weight".
        shape: of the tensor that is drawn.
        tensors: names of all tensors that the row stands for.
        inputs, outputs: who lives on the input side and on the output side, in the order of the positions.
        slim: it only scales or shifts channels (a BatchNorm).
        frozen: what cannot be cut of its tensors, and why.
    """

    name: str
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    inputs: tuple[Stripe, ...]
    outputs: tuple[Stripe, ...]
    slim: bool
    frozen: tuple[Frozen, ...]

    def groups(self, side: Side) -> list[str]:
        """Return the groups that live on one side."""
        stripes = self.inputs if side == "input" else self.outputs
        return [stripe.group for stripe in stripes if stripe.group is not None]


class Tap(NamedTuple):
    """Where a wire meets a node: the number of its row, and the side."""

    row: int
    side: Side


@dataclass(frozen=True)
class Wire:
    """The line of one group: a vertical in lane `lane` (0 is next to the nodes) with a tap at every weight."""

    group: str
    lane: int
    taps: tuple[Tap, ...]


@dataclass(frozen=True)
class _Places:
    """The graph, looked up by tensor: its shapes, its members and what is frozen."""

    shapes: Mapping[str, tuple[int, ...]]
    members: Mapping[str, Sequence[tuple[str, Member]]]
    frozen: Mapping[str, Sequence[Frozen]]

    def groups(self, tensor: str) -> set[str]:
        """Return the groups that live on a tensor."""
        return {group for group, _ in self.members.get(tensor, ())}


def nodes(graph: ChannelGraph) -> list[Node]:
    """Return the rows of a graph, in the order in which the model uses its weights."""
    places = _places(graph)
    parameters = dict(graph.model.named_parameters())
    owners: dict[str, list[str]] = defaultdict(list)
    # In the order of use, not of `named_parameters()`: the picture reads from the input down to the output.
    for tensor in graph.recording.log.parameters:
        # Buffers only where a group lives on them; a batch counter has no channels to show.
        if tensor in parameters or tensor in places.members or tensor in places.frozen:
            owners[tensor.rpartition(".")[0]].append(tensor)
    return [_node(places, row) for tensors in owners.values() for row in _rows(places, tensors)]


def wires(rows: Sequence[Node]) -> list[Wire]:
    """Return the wires of the groups, the short ones next to the nodes, none on top of another."""
    taps: dict[str, list[Tap]] = defaultdict(list)
    for number, node in enumerate(rows):
        # A BatchNorm stands right below its convolution: a tap at each would only double the dots.
        if not node.slim:
            for side in _SIDES:
                for group in node.groups(side):
                    taps[group].append(Tap(number, side))
    spans = {group: _span(mine) for group, mine in taps.items()}
    # Short ones take the inner lanes, where they cross the fewest others; ties go by place, so that the text is stable.
    by_length = sorted(spans, key=lambda group: (spans[group][1] - spans[group][0], spans[group]))
    lanes: list[list[tuple[int, int]]] = []
    return [Wire(group, _free_lane(lanes, spans[group]), tuple(taps[group])) for group in by_length]


def blocks(rows: Sequence[Node]) -> list[tuple[str, int]]:
    """Return the blocks of a model, each with its number of rows: what names begin with, one part or two."""
    first = Counter(node.name.partition(".")[0] for node in rows)
    names = []
    for node in rows:
        parts = node.name.split(".")
        names.append(".".join(parts[: 2 if first[parts[0]] > _LARGE else 1]))
    return [(name, len(list(run))) for name, run in groupby(names)]


def _places(graph: ChannelGraph) -> _Places:
    members: dict[str, list[tuple[str, Member]]] = defaultdict(list)
    for group in graph.groups:
        for member in group.members:
            members[member.tensor].append((group.name, member))
    frozen: dict[str, list[Frozen]] = defaultdict(list)
    for each in graph.frozen:
        frozen[each.tensor].append(each)
    named = [*graph.model.named_parameters(), *graph.model.named_buffers()]
    return _Places({name: tuple(tensor.shape) for name, tensor in named}, members, frozen)


def _rows(places: _Places, tensors: Sequence[str]) -> list[list[str]]:
    """Return the tensors of a module's rows, the one that is drawn in front. Vectors go where their groups are."""
    # One matrix a row: an attention module owns several, each with sides of its own.
    wide = [tensor for tensor in tensors if len(places.shapes[tensor]) > 1]
    rows = [[tensor] for tensor in wide or tensors[:1]]
    for tensor in tensors:
        if tensor not in (row[0] for row in rows):
            fitting = (row for row in rows if places.groups(tensor) <= places.groups(row[0]))
            home = next(fitting, None)
            rows.append([tensor]) if home is None else home.append(tensor)
    return rows


def _node(places: _Places, tensors: Sequence[str]) -> Node:
    drawn = tensors[0]
    owner, _, leaf = drawn.rpartition(".")
    roles = {member.dim: member.role for _, member in places.members.get(drawn, ())}
    taken, made = _dims(places.shapes[drawn], roles)
    return Node(
        name=owner if leaf == "weight" and owner else drawn,
        shape=places.shapes[drawn],
        tensors=tuple(tensors),
        inputs=_stripes(places, drawn, taken),
        outputs=_stripes(places, drawn, made),
        slim=len(places.shapes[drawn]) < 2 and set(roles.values()) <= {"follower"},
        frozen=tuple(each for tensor in tensors for each in places.frozen.get(tensor, ())),
    )


def _dims(shape: Sequence[int], roles: Mapping[int, Role]) -> tuple[int, int]:
    """Return the dimension of the input side and that of the output side: one and the same where channels only pass."""
    taken = next((dim for dim, role in roles.items() if role == "consumer"), None)
    made = next((dim for dim, role in roles.items() if role == "producer"), None)
    # Depthwise kernels and BatchNorms have followers only: what comes in along a dimension goes out along it.
    if taken is None and made is None and (roles or len(shape) < 2 or shape[1] == 1):
        passing = min(roles, default=0)
        return passing, passing
    # One side is known from its role, and the other is the other of the first two dimensions; a transposed convolution
    # has its inputs first, so that the order of dimensions alone would mix them up.
    if made is None:
        made = 1 if taken == 0 and len(shape) > 1 else 0
    return (1 if made == 0 and len(shape) > 1 else 0) if taken is None else taken, made


def _stripes(places: _Places, tensor: str, dim: int) -> tuple[Stripe, ...]:
    """Return the shares of a dimension, one for each group, in the order of their first positions."""
    mine = [(group, member) for group, member in places.members.get(tensor, ()) if member.dim == dim]
    # The owner of every position; -1 stays where nothing can be cut. A scalar counts as one position.
    owner = np.full(places.shapes[tensor][dim] if places.shapes[tensor] else 1, -1)
    for number, (_, member) in enumerate(mine):
        owner[member.positions.numpy().ravel()] = number
    found, first, counts = np.unique(owner, return_index=True, return_counts=True)
    names = [*(group for group, _ in mine), None]  # None is last, where an index of -1 finds it
    return tuple(Stripe(names[found[place]], int(counts[place])) for place in np.argsort(first).tolist())


def _span(taps: Iterable[Tap]) -> tuple[int, int]:
    """Return where a wire begins and ends; the output side of a row is below its input side."""
    heights = [2 * tap.row + (tap.side == "output") for tap in taps]
    return min(heights), max(heights)


def _free_lane(lanes: list[list[tuple[int, int]]], span: tuple[int, int]) -> int:
    """Take the first lane in which nothing else runs along this span."""
    for number, busy in enumerate(lanes):
        if all(span[1] < begin or end < span[0] for begin, end in busy):
            busy.append(span)
            return number
    lanes.append([span])
    return len(lanes) - 1
