"""Widths under a cost that falls in steps: the step that loses least for what it saves goes first.

    16 channels cost 10, 15 to 9 cost 10 too, 8 cost 6, 4 cost 2.
    Eight channels with a loss of 1 each save 4: 2.0 for one saved. Twelve save 8: 1.5. So twelve go, or none.

This is the greedy solution of a knapsack whose prices change with what has been taken: a channel less here is an input
less there. What turns out too much in the end comes back.

Shape letters: G groups, C channels of a group, S widths that a group may have, B choices that are priced together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from compressor.budget.widths import IntArray, Widths

FloatArray: TypeAlias = NDArray[np.float64]
Price = Callable[[IntArray], IntArray]  # `(B, G)` kept channels in, `(B,)` out

_MOST_WIDTHS = 40  # of one group that are looked at; of more, every so many


def step_down(keys: Sequence[FloatArray], widths: Widths, price: Price, goal: int) -> IntArray:
    """Return how many channels each group keeps, `(G,)`, so that the price is at most the goal; else as few as may be.

    Args:
        keys: by group, what losing each channel costs, ascending, `(C,)`; negative counts as nothing.
        widths: the widths that the groups may have.
        price: of rows of widths.
        goal: what it may be.
    """
    losses = [np.cumsum(np.concatenate([[0.0], np.maximum(key, 0.0)])) for key in keys]  # of losing 0, 1, ..., C
    allowed = [_allowed(*each) for each in zip(widths.sizes, widths.steps, widths.lowest, strict=True)]
    counts = widths.sizes.copy()
    while (now := int(price(counts[None])[0])) > goal:
        group, width = _options(counts, allowed, narrower=True)
        if not len(group):
            break
        saved = now - price(_changed(counts, group, width))
        lost = _lost(losses, widths.sizes, group, width) - _lost(losses, widths.sizes, group, counts[group])
        # What saves nothing now may do so later, when nothing else is left.
        rank = np.where(saved > 0, lost / np.maximum(saved, 1), np.inf)
        best = int(np.lexsort((-width, rank))[0]) if np.isfinite(rank).any() else int(np.argmin(lost))
        counts[group[best]] = width[best]
    return _give_back(counts, allowed, losses, widths.sizes, price, goal)


def _give_back(
    counts: IntArray,
    allowed: Sequence[IntArray],
    losses: Sequence[FloatArray],
    sizes: IntArray,
    price: Price,
    goal: int,
) -> IntArray:
    """Return widths that are as wide as the goal allows: what regains most comes back first."""
    while True:
        group, width = _options(counts, allowed, narrower=False)
        fits = price(_changed(counts, group, width)) <= goal if len(group) else np.empty(0, dtype=bool)
        group, width = group[fits], width[fits]
        if not len(group):
            return counts
        regained = _lost(losses, sizes, group, counts[group]) - _lost(losses, sizes, group, width)
        # Ties, of channels that nobody would miss: the widest.
        best = int(np.lexsort((width, regained))[-1])
        counts[group[best]] = width[best]


def _allowed(size: int, step: int, lowest: int) -> IntArray:
    """Return the widths that a group may have, ascending, `(S,)`."""
    multiples = np.arange(lowest, size, step, dtype=np.int64)
    every = -(-len(multiples) // _MOST_WIDTHS) if len(multiples) else 1
    return np.append(multiples[::every], np.int64(size))


def _options(counts: IntArray, allowed: Sequence[IntArray], *, narrower: bool) -> tuple[IntArray, IntArray]:
    """Return every change of one group: which group, `(B,)`, and to which width, `(B,)`."""
    parts = [
        each[each < count] if narrower else each[each > count] for each, count in zip(allowed, counts, strict=True)
    ]
    group = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return group, np.concatenate([np.empty(0, dtype=np.int64), *parts])


def _changed(counts: IntArray, group: IntArray, width: IntArray) -> IntArray:
    rows = np.repeat(counts[None], len(group), axis=0)
    rows[np.arange(len(group)), group] = width
    return rows


def _lost(losses: Sequence[FloatArray], sizes: IntArray, group: IntArray, width: IntArray) -> FloatArray:
    return np.array([losses[g][sizes[g] - w] for g, w in zip(group, width, strict=True)])
