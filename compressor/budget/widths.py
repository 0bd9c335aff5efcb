"""How far a group may be narrowed: floors, rounding, and shares that are settled beforehand.

Shape letters: G groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from compressor.graph import Group

IntArray: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Widths:
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
    def of(groups: Sequence[Group], round_to: int, floor: float, whole: Mapping[str, int]) -> Widths:
        """Work out how far each group may go."""
        sizes = np.array([group.size for group in groups], dtype=np.int64)
        widths = [whole.get(group.name, group.size) for group in groups]
        floors = np.array([max(1, share_of(floor, width)) for width in widths], dtype=np.int64)
        return Widths(sizes, np.minimum(-(-floors // round_to) * round_to, sizes), round_to, floor)

    def nearest(self, counts: IntArray) -> IntArray:
        """Give the nearest count that each group may keep, the larger of two: `(G,)`."""
        rounded = (counts + self.round_to // 2) // self.round_to * self.round_to
        multiple = np.maximum(rounded, self.lowest)
        whole = self.sizes - counts <= np.abs(multiple - counts)  # also where the multiple is above the size
        return np.where(whole, self.sizes, multiple)


def settled_counts(
    groups: Sequence[Group], shares: Mapping[str, float], round_to: int, whole: Mapping[str, int]
) -> dict[str, int]:
    """Give what the groups with a share of their own keep: the nearest allowed count, whatever the floor is."""
    mine = [group for group in groups if group.name in shares]
    widths = [whole.get(group.name, group.size) for group in mine]
    left = [width - share_of(shares[group.name], width) for group, width in zip(mine, widths, strict=True)]
    counts = Widths.of(mine, round_to, 0.0, whole).nearest(np.array(left, dtype=np.int64))
    return {group.name: count for group, count in zip(mine, counts.tolist(), strict=True)}


def share_of(share: float, count: int) -> int:
    """Give the smallest integer that is at least this share of a count, in the decimal digits that were typed."""
    return math.ceil(Fraction(repr(float(share))) * count)
