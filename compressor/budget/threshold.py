"""A threshold: what is to go by its own score, and not for the sake of a budget.

    scores [0.1, 0.7, 0.2, 0.9], threshold 0.5    two of four channels go, whatever that comes to

Shape letters: C channels of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.budget.budget import share_of
from compressor.errors import InputError, RangeError

if TYPE_CHECKING:  # the command line reads this before it needs torch
    from torch import Tensor


@dataclass(frozen=True)
class Threshold:
    """Every channel whose score is below goes; in the units of the criterion.

    An L1 norm, say, or the distance between two filters, of which one goes; of relevance the confidence, and what is
    not above it goes.

    Attributes:
        value: a finite number.

    Raises:
        RangeError: it is not finite.
    """

    value: float

    def __post_init__(self) -> None:
        """Check the range."""
        if not math.isfinite(self.value):
            raise RangeError("threshold", self.value, "(-inf, inf)")

    def require_unit(self, criterion: object) -> None:
        """Raise InputError for a criterion whose scores have no unit."""
        if isinstance(criterion, str) and "random" in criterion.lower():
            raise InputError(f"scores of {criterion!r} have no unit, so no threshold fits them: give a budget")

    def shares(
        self, scores: Mapping[str, Tensor], whole: Mapping[str, int], floor: float, *, inclusive: bool = False
    ) -> tuple[dict[str, float], list[str]]:
        """Return which share of each group goes, and lines that say where the floor keeps some.

        Args:
            scores: by group, `(C,)`.
            whole: by group, the width that shares and the floor go by.
            floor: the share of every group that stays in any case; at least one channel always does.
            inclusive: whether what equals the threshold goes too.
        """
        shares, kept = {}, []
        for name, each in scores.items():
            stays = int((each > self.value).sum() if inclusive else (each >= self.value).sum())
            width = whole.get(name, len(each))
            least = min(len(each), max(1, share_of(floor, width)))
            if stays < least:
                # By the whole width, so that the line is the same at every cut of a training.
                kept.append(f"{name!r} keeps {least} of {width} channels, its floor: some are below the threshold")
            # A hair less than the count: whoever reads a share rounds what goes up.
            shares[name] = max(0.0, width - max(stays, least) - 1e-6) / width
        return shares, kept


def usual_rounding(round_to: int | None, threshold: Threshold | None) -> int | None:
    """Return what widths are rounded to: with a threshold, to nothing that was not asked for.

    Of 64 channels 15 are below it: rounded to multiples of 8, one that is above would go with them.
    """
    return 1 if threshold and round_to is None else round_to
