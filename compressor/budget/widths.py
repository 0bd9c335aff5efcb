"""How far a group may be narrowed: floors, rounding, and shares that are fixed beforehand.

    A group of 20 channels, floor 10 %, multiples of 8:    may keep 8, 16 or 20
    nearest to 11: 8      to 13: 16      to 18: 20 (as near as 16, and the larger)

Shape letters: G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from compressor.budget.budget import share_of
from compressor.budget.options import SelectionOptions
from compressor.graph import Group

IntArray: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Widths:
    """The counts that each group may keep: its size, and the multiples of its step from `lowest` on.

    Attributes:
        sizes, steps, lowest: `(G,)`; `lowest` is the size itself where no multiple lies between floor and size.
    """

    sizes: IntArray
    steps: IntArray
    lowest: IntArray

    @staticmethod
    def for_groups(
        groups: Sequence[Group], options: SelectionOptions, floor: float, whole: Mapping[str, int]
    ) -> Widths:
        """Work out how far each group may go.

        Args:
            groups: G of them.
            options: for the steps.
            floor: the share that stays.
            whole: by group, the width that shares and steps go by; the present one where it is not named.
        """
        sizes = np.array([group.size for group in groups], dtype=np.int64)
        widths = [whole.get(group.name, group.size) for group in groups]
        steps = np.array([options.step(width) for width in widths], dtype=np.int64)
        floors = np.array([max(1, share_of(floor, width)) for width in widths], dtype=np.int64)
        return Widths(sizes, steps, np.minimum(-(-floors // steps) * steps, sizes))

    def nearest(self, counts: IntArray) -> IntArray:
        """Return the nearest count that each group may keep, the larger of two: `(G,)`."""
        rounded = (counts + self.steps // 2) // self.steps * self.steps
        multiple = np.maximum(rounded, self.lowest)
        whole = self.sizes - counts <= np.abs(multiple - counts)  # also where the multiple is above the size
        return np.where(whole, self.sizes, multiple)


def fixed_counts(
    groups: Sequence[Group], shares: Mapping[str, float], options: SelectionOptions, whole: Mapping[str, int]
) -> dict[str, int]:
    """Return what the groups with a share of their own keep: the nearest allowed count, whatever the floor is."""
    mine = [group for group in groups if group.name in shares]
    widths = [whole.get(group.name, group.size) for group in mine]
    left = [width - share_of(shares[group.name], width) for group, width in zip(mine, widths, strict=True)]
    counts = Widths.for_groups(mine, options, 0.0, whole).nearest(np.array(left, dtype=np.int64))
    return {group.name: count for group, count in zip(mine, counts.tolist(), strict=True)}
