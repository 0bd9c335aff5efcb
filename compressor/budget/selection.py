"""Selection: scores and a budget in, the channels to keep out. Nothing is cut.

All channels that may go stand in one queue, the least worth keeping first. The shortest front of the queue whose
removal meets the budget goes; bisection on the closed-form costs finds it. The last one to go may have cost far more
than was still missing: what fits into that room comes back, the best first.

Shape letters: G groups that have scores, C channels of a group, Q channels in the queue.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.budget.costs import MEASURES, CostModel
from compressor.budget.widths import IntArray, Widths, settled_counts, share_of
from compressor.errors import RangeError, ScoreError, UnknownNameError
from compressor.graph import ChannelGraph, Group

FloatArray: TypeAlias = NDArray[np.float64]

SCOPES = ("global", "local")


@dataclass(frozen=True)
class Budget:
    """What is to be removed: the share `sparsity`, in [0, 1), of a measure ("params", "macs" or "channels").

    Raises:
        RangeError: a sparsity outside [0, 1).
        UnknownNameError: a measure that does not exist.
    """

    sparsity: float
    measure: str = "params"

    def __post_init__(self) -> None:
        """Check the range and the name."""
        if not 0 <= self.sparsity < 1:
            raise RangeError("sparsity", self.sparsity, "[0, 1)")
        if self.measure not in MEASURES:
            raise UnknownNameError("measure", self.measure, MEASURES)

    def goal(self, dense: int) -> int:
        """Give the most that may stay of a count, exactly: 0.55 of 100 channels are 55, whatever floats make of it."""
        return dense - share_of(self.sparsity, dense)


@dataclass(frozen=True, eq=False)
class Selection:
    """What to keep, and what that comes to.

    Attributes:
        keep: by group that loses something, the channels that stay: `(n,)` int64, sorted.
        reached: whether at least the asked share goes.
        asked, removed: shares of the budget's measure.
        before, after: counts of that measure.
        blocked: lines that say what stands in the way; empty where the budget is reached.
    """

    keep: Mapping[str, Tensor]
    reached: bool
    asked: float
    removed: float
    before: int
    after: int
    blocked: tuple[str, ...]


def select(
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    budget: Budget,
    *,
    costs: CostModel,
    scope: str = "global",
    round_to: int = 1,
    floor: float = 0.1,
    whole: Mapping[str, int] | None = None,
    shares: Mapping[str, float] | None = None,
    normalise: bool = True,
) -> Selection:
    """Choose the channels to keep: as many as the budget allows.

    With scope "global" not one step of any group could come back, with "local" not one of the group that went last.

    Args:
        graph: whose groups are to lose channels.
        scores: by group, `(C,)`, larger means keep, ties broken by position; a group without scores stays whole.
        budget: how much is to go.
        costs: the cost model of `graph`.
        scope: "global" queues all channels by their scores; "local" takes the same share of every group.
        round_to: a group that loses channels keeps a multiple of this, the one nearest to its place in the queue. A
            group that is not larger stays whole. The budget is judged after rounding.
        floor: the share of every group that stays in any case, in [0, 1); at least one channel always does.
        whole: by group, the width that `floor` and `shares` are shares of, for a model that has been cut before; the
            present one by default.
        shares: by group, the share of its own channels that goes, rounded to the nearest that `round_to` allows,
            whatever budget and floor are; 0 keeps a group whole. The other groups serve the budget.
        normalise: with scope "global", divide a group's scores by their mean magnitude. Weights of different layers
            differ in scale by far more than channels do, and the layer with the smallest would be emptied first. False
            for scores that mean the same in every group, as a loss does.

    Returns:
        The selection. If the budget cannot be met, all that may go goes, and the selection says why it is not enough.

    Raises:
        UnknownNameError: no such scope, or scores for a group that is not in the graph.
        RangeError: `round_to` or `floor` out of range.
        ScoreError: scores of the wrong shape, or not finite.
    """
    _check(graph, scores, scope, round_to, floor)
    shares, whole = shares or {}, whole or {}
    groups = [group for group in graph.groups if group.name in scores]
    values = {group.name: _values(group, scores[group.name]) for group in groups}
    orders = {name: np.argsort(each, kind="stable") for name, each in values.items()}
    settled = settled_counts(groups, shares, round_to, whole)
    free = [group for group in groups if group.name not in settled]
    widths = Widths.of(free, round_to, floor, whole)
    keys = [_key(values[group.name][orders[group.name]], scope, normalise) for group in free]
    before = costs.dense[budget.measure]
    goal = budget.goal(before)

    def kept(gone: IntArray) -> dict[str, int]:
        counts = widths.nearest(widths.sizes - gone).tolist()
        return settled | {group.name: count for group, count in zip(free, counts, strict=True)}

    def fits(gone: IntArray) -> bool:
        return costs.measure(budget.measure, kept(gone)) <= goal

    queue = _queue(keys, widths.sizes - widths.lowest)
    counts = kept(_gone(queue, len(free), fits, refill=scope == "global"))
    after = costs.measure(budget.measure, counts)
    return Selection(
        keep=_keep(groups, orders, counts),
        reached=after <= goal,
        asked=budget.sparsity,
        removed=1 - after / before if before else 0.0,
        before=before,
        after=after,
        blocked=() if after <= goal else _blocked(graph, budget.measure, costs, counts, widths, shares),
    )


# -- who goes first


def _key(ascending: FloatArray, scope: str, normalise: bool) -> FloatArray:
    """Give the places of a group's channels in the queue, from their scores in ascending order: `(C,)`."""
    if scope == "local":
        return (np.arange(len(ascending)) + 0.5) / len(ascending)
    scale = np.abs(ascending).mean() if normalise else 1.0
    return ascending / scale if scale > 0 else ascending


def _queue(keys: Sequence[FloatArray], removable: IntArray) -> IntArray:
    """Give the group of each channel that may go, first to go first: `(Q,)`. Ties: the group that comes first."""
    places = np.concatenate([np.empty(0), *(key[:count] for key, count in zip(keys, removable, strict=True))])
    group = np.repeat(np.arange(len(keys)), removable)
    return group[np.argsort(places, kind="stable")]


def _gone(queue: IntArray, groups: int, fits: Callable[[IntArray], bool], *, refill: bool) -> IntArray:
    """Give how many channels of each group go, `(G,)`: the shortest front of the queue that makes the budget fit.

    With `refill`, channels of that front come back as long as the budget still fits, the last in the queue first.
    """

    def count(part: IntArray) -> IntArray:
        return np.bincount(part, minlength=groups)

    front = bisect_left(range(len(queue)), True, key=lambda n: fits(count(queue[:n])))
    gone, waiting = count(queue[:front]), queue[:front][::-1]
    while refill and len(waiting) and fits(gone):
        back = bisect_left(range(len(waiting)), True, key=lambda n: not fits(gone - count(waiting[: n + 1])))
        gone = gone - count(waiting[:back])
        # What does not fit now never will: every step that comes back makes the others dearer, and the room smaller.
        stuck = [group for group in set(waiting[back:].tolist()) if not fits(gone - count(np.array([group])))]
        waiting = waiting[back:][~np.isin(waiting[back:], stuck)]
    return gone


def _keep(groups: Sequence[Group], orders: Mapping[str, IntArray], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Give the best channels of every group that loses some."""
    return {
        group.name: torch.from_numpy(np.sort(orders[group.name][group.size - counts[group.name] :]))
        for group in groups
        if counts[group.name] < group.size
    }


# -- what is refused, and what stands in the way


def _check(graph: ChannelGraph, scores: Mapping[str, Tensor], scope: str, round_to: int, floor: float) -> None:
    if scope not in SCOPES:
        raise UnknownNameError("scope", scope, SCOPES)
    if round_to < 1:
        raise RangeError("round_to", round_to, "1, 2, 3, ...")
    if not 0 <= floor < 1:
        raise RangeError("floor", floor, "[0, 1)")
    known = graph.sizes()
    for name in scores:
        if name not in known:
            raise UnknownNameError("group", name, known)


def _values(group: Group, scores: Tensor) -> FloatArray:
    """Give a group's scores as an array, or say what is wrong with them."""
    instead = f"a criterion gives ({group.size},) finite numbers for it, larger means keep"
    if scores.shape != (group.size,):
        raise ScoreError(group.name, f"their shape is {tuple(scores.shape)}", instead)
    values: FloatArray = scores.detach().double().cpu().numpy()
    if not np.isfinite(values).all():
        raise ScoreError(group.name, f"{int((~np.isfinite(values)).sum())} of them are not finite", instead)
    return values


def _blocked(
    graph: ChannelGraph,
    measure: str,
    costs: CostModel,
    counts: Mapping[str, int],
    widths: Widths,
    shares: Mapping[str, float],
) -> tuple[str, ...]:
    """Say what is left when all that may go is gone, what weighs most first."""
    price = costs.per_channel(measure, counts)
    heaviest = sorted(graph.groups, key=lambda group: -price[group.name] * counts.get(group.name, group.size))
    steps = f", in multiples of {widths.round_to}" if widths.round_to > 1 else ""
    kept = {
        each.name: f"{each.name!r} keeps {counts[each.name]} of {each.size}" for each in heaviest if each.name in counts
    }
    rest = costs.measure(measure, dict.fromkeys(graph.sizes(), 0))
    lines = {
        f"groups at their floor ({widths.floor:.0%} of the channels{steps})": [
            line for name, line in kept.items() if name not in shares
        ],
        "groups that --keep or --only leaves whole": [
            repr(each.name) for each in heaviest if shares.get(each.name) == 0
        ],
        "groups with a --sparsity of their own": [line for name, line in kept.items() if shares.get(name)],
        "groups without scores, which stay whole": [
            f"{each.name!r} ({each.size} channels)"
            for each in heaviest
            if each.name not in counts and shares.get(each.name) != 0
        ],
        f"{rest:,} of {costs.dense[measure]:,} {measure} belong to no group": [""] * bool(rest),
        "frozen": _reasons(graph),
    }
    return tuple(f"{what}: {_first(items)}".removesuffix(": ") for what, items in lines.items() if items)


def _reasons(graph: ChannelGraph) -> list[str]:
    """List what is frozen and why, the widest first."""
    widest = sorted(graph.frozen, key=lambda each: -each.count)
    return list(dict.fromkeys(f"{each.tensor!r}: {each.reason}" for each in widest))


def _first(items: Iterable[Any], most: int = 5) -> str:
    """List some, and count the others."""
    listed = [str(item) for item in items]
    more = f", and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
