"""Which weights are dropped and which are grown: pure functions of scores and a mask.

A mask is a bool tensor, True where a unit (a weight, or a channel) is on. Scores have its shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def lowest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest scores among the marked units; of equal ones the first.

    Args:
        scores: any shape.
        among: bool, of that shape.
        count: at most as many as `among` marks.
    """
    marked = torch.zeros_like(among)
    if count:
        candidates = scores[among]
        limit = candidates.kthvalue(count).values
        chosen = candidates < limit
        ties = (candidates == limit).nonzero().flatten()
        chosen[ties[: count - int(chosen.sum())]] = True
        marked[among] = chosen
    return marked


def without_lowest(scores: Tensor, mask: Tensor, share: float) -> Tensor:
    """Return the mask without that share, rounded down, of its units: those of the lowest scores."""
    return mask & ~lowest(scores, mask, int(share * int(mask.sum())))


def without_smallest(values: Tensor, mask: Tensor, share: float) -> Tensor:
    """Drop the share of the units that are smallest in magnitude."""
    return without_lowest(values.abs(), mask, share)


def without_nearest_zero(values: Tensor, mask: Tensor, share: float) -> Tensor:
    """Drop by sign: that share of the positive ones, the smallest, that of the negative ones, the largest, and zeros.

    Source: Mocanu et al. 2018, arXiv 1707.04780.
    """
    positive = mask & (values > 0)
    negative = mask & (values < 0)
    return without_lowest(values, positive, share) | without_lowest(-values, negative, share)


def grown(mask: Tensor, scores: Tensor, count: int) -> Tensor:
    """Return the mask with `count` more units on: those off with the highest scores, of equal ones the first."""
    return mask | lowest(-scores, ~mask, count)


def drop_and_grow(mask: Tensor, kept: Tensor, scores: Tensor) -> Tensor:
    """Return a mask with as many units on as before: those that were kept, and others that grow.

    A unit that was dropped may grow at once, and is then as if it had never been dropped.

    Args:
        mask: which units were on.
        kept: which of them stay.
        scores: among the others, the highest grow.
    """
    return grown(kept, scores, int(mask.sum()) - int(kept.sum()))


def cosine(progress: float, start: float = 0.3) -> float:
    """Return the share to drop, from `start` at progress 0 down to 0 at progress 1, as half a cosine."""
    return start / 2 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Regrowth:
    """How a method drops units and grows others in their place.

    Attributes:
        drop: gives the mask of what stays, from values, mask and the share to drop.
        by_gradient: the units of the largest gradients grow; otherwise random ones.
        share: the share to drop, over the progress from the method's own start, 0, to its end, 1.
        until: the share of training after which nothing changes any more.
        every: steps between two changes; None where the method goes by epochs, whose length it cannot know.
    """

    drop: Callable[[Tensor, Tensor, float], Tensor]
    by_gradient: bool
    share: Callable[[float], float]
    until: float
    every: int | None


METHODS: dict[str, Regrowth | None] = {
    "magnitude": None,  # drops only, as a schedule says
    "set": Regrowth(without_nearest_zero, by_gradient=False, share=lambda progress: 0.3, until=1.0, every=None),
    "rigl": Regrowth(without_smallest, by_gradient=True, share=cosine, until=0.75, every=100),
}
