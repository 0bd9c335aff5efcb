"""Selection: scores and a budget in, the channels to keep out. Nothing is changed.

All channels stand in one line, the least worth keeping first. How many from the front must go to meet the budget is
found by bisection on the closed-form costs, so that the target is met and overshot by one step at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.costs import MEASURES, CostModel
from compressor.errors import RangeError, UnknownNameError
from compressor.graph.group import ChannelGraph

SCOPES = ("global", "local")
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Budget:
    """What is to be removed: a share (`sparsity`, in [0, 1)) of a measure ("params", "macs" or "channels").

    Raises:
        RangeError: a sparsity outside [0, 1).
        UnknownNameError: a measure that does not exist.
    """

    sparsity: float
    measure: str = "params"

    def __post_init__(self) -> None:
        """Check."""
        if not 0 <= self.sparsity < 1:
            raise RangeError("sparsity", self.sparsity, "[0, 1)")
        if self.measure not in MEASURES:
            raise UnknownNameError("measure", self.measure, MEASURES)


@dataclass(frozen=True, eq=False)
class Selection:
    """What to keep, and what that comes to.

    Attributes:
        keep: by group that loses something, the channels that stay, `(n,)` int64, sorted.
        reached: whether at least the asked share goes.
        asked, removed: shares of the budget's measure.
        before, after: the measure's counts.
        blocked: where the budget is not reached, what stands in the way, in words.
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
    normalise: bool = True,
) -> Selection:
    """Choose the channels to keep.

    Args:
        graph: whose groups are to lose channels.
        scores: by group, `(C,)`, larger means keep; a group that is missing keeps everything.
        budget: how much is to go.
        costs: the cost model of `graph`.
        scope: "global" puts all channels in one line, "local" takes the same share of every group.
        round_to: kept counts are multiples of this, the nearest one that is not zero; a group that is not larger than
            `round_to` keeps everything.
        floor: the share of every group that stays in any case; at least one channel does.
        normalise: divide each group's scores by their mean before ranking globally, because layers differ in scale by
            more than channels do; false for scores that are in the same unit everywhere.

    Raises:
        UnknownNameError: a scope that does not exist.
        RangeError: `round_to` or `floor` out of range.
    """
    _check(scope, round_to, floor)
    names = [group.name for group in graph.groups if group.name in scores]
    sizes = np.array([graph[name].size for name in names], dtype=np.int64)
    lowest = _floors(sizes, round_to, floor)
    ranked = [np.argsort(scores[name].detach().cpu().double().numpy(), kind="stable") for name in names]
    plan = _global(scores, names, ranked, normalise) if scope == "global" else _local(sizes)

    def kept(amount: int) -> IntArray:
        return _rounded(sizes - plan(amount), sizes, lowest, round_to)

    def left(amount: int) -> int:
        return costs.measure(budget.measure, dict(zip(names, kept(amount).tolist(), strict=True)))

    before = costs.measure(budget.measure, {})
    goal = (1 - budget.sparsity) * before
    amount = _smallest(lambda n: left(n) <= goal, int(sizes.sum()))
    counts, after = kept(amount), left(amount)
    return Selection(
        keep=_kept_channels(names, ranked, sizes, counts),
        reached=after <= goal,
        asked=budget.sparsity,
        removed=1 - after / before if before else 0.0,
        before=before,
        after=after,
        blocked=() if after <= goal else _blockers(graph, scores, names, counts, round_to, floor),
    )


def _check(scope: str, round_to: int, floor: float) -> None:
    if scope not in SCOPES:
        raise UnknownNameError("scope", scope, SCOPES)
    if round_to < 1:
        raise RangeError("round_to", round_to, "1, 2, 3, ...")
    if not 0 <= floor <= 1:
        raise RangeError("floor", floor, "[0, 1]")


def _floors(sizes: IntArray, round_to: int, floor: float) -> IntArray:
    """Give how many channels of each group stay in any case."""
    share = np.maximum(np.ceil(sizes * floor - 1e-9).astype(np.int64), 1)
    multiples = -(-share // round_to) * round_to
    return np.where(sizes <= round_to, sizes, np.minimum(multiples, sizes)) if round_to > 1 else share


def _rounded(counts: IntArray, sizes: IntArray, lowest: IntArray, round_to: int) -> IntArray:
    """Give the nearest multiples (halves upwards), none of them below the floor; whole groups stay whole."""
    nearest = (counts + round_to // 2) // round_to * round_to if round_to > 1 else counts
    return np.where(counts >= sizes, sizes, np.minimum(np.maximum(nearest, lowest), sizes))


def _global(
    scores: Mapping[str, Tensor], names: list[str], ranked: list[IntArray], normalise: bool
) -> Callable[[int], IntArray]:
    """Put all channels in one line, the lowest score first; give how many of each group are among the first n."""
    lines = []
    for name, order in zip(names, ranked, strict=True):
        score = scores[name].detach().cpu().double().numpy()
        scale = np.abs(score).mean() if normalise else 1.0
        lines.append(score[order] / scale if scale > 0 else score[order])
    owner = np.repeat(np.arange(len(names)), [len(line) for line in lines])
    line = np.argsort(np.concatenate([*lines, np.empty(0)]), kind="stable")
    owner = owner[line]
    return lambda amount: np.bincount(owner[:amount], minlength=len(names)).astype(np.int64)


def _local(sizes: IntArray) -> Callable[[int], IntArray]:
    """Take the same share of every group: n of all channels, spread by size."""
    total = max(int(sizes.sum()), 1)
    return lambda amount: (sizes * amount) // total


def _smallest(enough: Callable[[int], bool], most: int) -> int:
    """Give the smallest n from 0 to `most` that is enough; `most` if none is."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def _kept_channels(names: list[str], ranked: list[IntArray], sizes: IntArray, counts: IntArray) -> dict[str, Tensor]:
    return {
        name: torch.from_numpy(np.sort(order[size - count :]))
        for name, order, size, count in zip(names, ranked, sizes.tolist(), counts.tolist(), strict=True)
        if count < size
    }


def _blockers(
    graph: ChannelGraph, scores: Mapping[str, Tensor], names: list[str], counts: IntArray, round_to: int, floor: float
) -> tuple[str, ...]:
    """Say what is left when all that may go is gone."""
    lines = [f"{len(names)} groups are at their floor: {floor:.0%} of the channels, in multiples of {round_to}, stay"]
    lines += [
        f"{group.name}: all {group.size} channels stay, the criterion cannot score them"
        for group in graph.groups
        if group.name not in scores
    ]
    lines += [
        f"{name}: {graph[name].size} channels are not more than round_to = {round_to}, so all stay"
        for name, count in zip(names, counts.tolist(), strict=True)
        if count == graph[name].size
    ]
    reasons: dict[str, int] = {}
    for each in graph.frozen:
        reasons[each.reason] = reasons.get(each.reason, 0) + each.count
    most = sorted(reasons.items(), key=lambda item: -item[1])[:5]
    return (*lines, *(f"{count} positions are frozen: {reason}" for reason, count in most))
