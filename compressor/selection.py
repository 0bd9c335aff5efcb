"""Selection: scores and a budget in, the channels to keep out. Nothing is cut.

All channels that may go stand in one queue, the least worth keeping first. The shortest front of the queue whose
removal meets the budget goes; bisection on the closed-form costs finds it. Within a group the queue follows the scores,
so a selection for less sparsity keeps all that one for more sparsity keeps.

Shape letters: G groups that have scores, C channels of a group, Q channels in the queue.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.costs import MEASURES, CostModel
from compressor.errors import RangeError, ScoreError, UnknownNameError
from compressor.graph.group import ChannelGraph, Group

IntArray: TypeAlias = NDArray[np.int64]
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
        return dense - _share(self.sparsity, dense)


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
    normalise: bool = True,
) -> Selection:
    """Choose the channels to keep: as many as the budget allows, no more than one step of one group fewer.

    Args:
        graph: whose groups are to lose channels.
        scores: by group, `(C,)`, larger means keep, ties broken by position; a group without scores stays whole.
        budget: how much is to go.
        costs: the cost model of `graph`.
        scope: "global" queues all channels by their scores; "local" takes the same share of every group.
        round_to: a group that loses channels keeps a multiple of this, the one nearest to its place in the queue. A
            group that is not larger stays whole. The budget is judged after rounding.
        floor: the share of every group that stays in any case, in [0, 1); at least one channel always does.
        whole: by group, the width that `floor` is a share of, for a model that has been cut before; the present one by
            default.
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
    groups = [group for group in graph.groups if group.name in scores]
    values = [_values(group, scores[group.name]) for group in groups]
    orders = [np.argsort(each, kind="stable") for each in values]
    widths = _Widths.of(groups, round_to, floor, whole or {})
    keys = [_key(each[order], scope, normalise) for each, order in zip(values, orders, strict=True)]
    queue = _queue(keys, widths.sizes - widths.lowest)

    def kept(front: int) -> dict[str, int]:
        gone = np.bincount(queue[:front], minlength=len(groups))
        counts = widths.nearest(widths.sizes - gone)
        return {group.name: count for group, count in zip(groups, counts.tolist(), strict=True)}

    before = costs.dense[budget.measure]
    goal = budget.goal(before)
    front = bisect_left(range(len(queue)), True, key=lambda n: costs.measure(budget.measure, kept(n)) <= goal)
    counts = kept(front)
    after = costs.measure(budget.measure, counts)
    return Selection(
        keep=_keep(groups, orders, counts),
        reached=after <= goal,
        asked=budget.sparsity,
        removed=1 - after / before if before else 0.0,
        before=before,
        after=after,
        blocked=() if after <= goal else _blocked(graph, budget.measure, costs, counts, widths),
    )


# -- how far a group may go


@dataclass(frozen=True, eq=False)
class _Widths:
    """The counts that each group may keep: its size, and the multiples of `round_to` from `lowest` on.

    Attributes:
        sizes, lowest: `(G,)`; `lowest` is the size itself where no multiple lies between floor and size.
        round_to: channels of one step.
        floor: the share that stays.
    """

    sizes: IntArray
    lowest: IntArray
    round_to: int
    floor: float

    @staticmethod
    def of(groups: Sequence[Group], round_to: int, floor: float, whole: Mapping[str, int]) -> _Widths:
        sizes = np.array([group.size for group in groups], dtype=np.int64)
        widths = [whole.get(group.name, group.size) for group in groups]
        floors = np.array([max(1, _share(floor, width)) for width in widths], dtype=np.int64)
        return _Widths(sizes, np.minimum(-(-floors // round_to) * round_to, sizes), round_to, floor)

    def nearest(self, counts: IntArray) -> IntArray:
        """Give the nearest count that each group may keep, the larger of two: `(G,)`."""
        rounded = (counts + self.round_to // 2) // self.round_to * self.round_to
        multiple = np.maximum(rounded, self.lowest)
        whole = self.sizes - counts <= np.abs(multiple - counts)  # also where the multiple is above the size
        return np.where(whole, self.sizes, multiple)


def _share(share: float, count: int) -> int:
    """Give the smallest integer that is at least this share of a count, in the decimal digits that were typed."""
    return math.ceil(Fraction(repr(float(share))) * count)


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


def _keep(groups: Sequence[Group], orders: Sequence[IntArray], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Give the best channels of every group that loses some."""
    return {
        group.name: torch.from_numpy(np.sort(order[group.size - counts[group.name] :]))
        for group, order in zip(groups, orders, strict=True)
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
    graph: ChannelGraph, measure: str, costs: CostModel, counts: Mapping[str, int], widths: _Widths
) -> tuple[str, ...]:
    """Say what is left when all that may go is gone, what weighs most first."""
    price = costs.per_channel(measure, counts)
    heaviest = sorted(graph.groups, key=lambda group: -price[group.name] * counts.get(group.name, group.size))
    steps = f", in multiples of {widths.round_to}" if widths.round_to > 1 else ""
    scored = [f"{each.name!r} keeps {counts[each.name]} of {each.size}" for each in heaviest if each.name in counts]
    unscored = [f"{each.name!r} ({each.size} channels)" for each in heaviest if each.name not in counts]
    rest = costs.measure(measure, dict.fromkeys(graph.sizes(), 0))
    lines = [f"groups at their floor ({widths.floor:.0%} of the channels{steps}): {_first(scored)}"] if scored else []
    lines += [f"groups without scores, which stay whole: {_first(unscored)}"] if unscored else []
    lines += [f"{rest:,} of {costs.dense[measure]:,} {measure} belong to no group"] if rest else []
    widest = sorted(graph.frozen, key=lambda each: -each.count)
    reasons = dict.fromkeys(f"{each.tensor!r}: {each.reason}" for each in widest)
    return (*lines, f"frozen: {_first(reasons)}") if reasons else tuple(lines)


def _first(items: Iterable[Any], most: int = 5) -> str:
    """List some, and count the others."""
    listed = [str(item) for item in items]
    more = f", and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
