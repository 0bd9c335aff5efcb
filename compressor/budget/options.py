"""What can be chosen about a selection, with every default and range; the command line reads them from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from compressor.budget.budget import ALIGNED
from compressor.errors import RangeError, UnknownNameError

Allocation = Literal["uniform", "global", "relevance"]
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)

MOST_ROUNDS = 1000  # in which one budget is cut; more channels than that has hardly a group
LARGE = 64  # channels; in smaller groups a step of 8 is more than an eighth of the group, too coarse for a budget


@dataclass(frozen=True)
class SelectionOptions:
    """How channels are chosen once they have scores.

    Attributes:
        allocate: how much of each group goes. "uniform" takes the same share of every group, "global" what the
            criterion's ranking of all channels together says, "relevance" what relevance per cost says, whatever
            criterion then chooses among its channels. Weights say little about which layer can spare more
            (`docs/compensation.md`), so "uniform" is the default.
        round_to: a group that loses channels ends with a multiple of this. None: of `aligned` in groups of 64 channels
            or more, whatever in smaller ones.
        aligned: how many channels are computed at once where the model is to run.
        floor: the share of every group that stays in any case, in [0, 1); at least one channel always does.

    Raises:
        UnknownNameError: no such allocation.
        RangeError: `round_to` or `floor` out of range.
    """

    allocate: Allocation = "uniform"
    round_to: int | None = None
    floor: float = 0.1
    aligned: int = ALIGNED

    def __post_init__(self) -> None:
        """Check names and ranges."""
        if self.allocate not in ALLOCATIONS:
            raise UnknownNameError("allocation", self.allocate, ALLOCATIONS)
        if self.round_to is not None and not (1 <= self.round_to <= 65_536 and self.round_to == int(self.round_to)):
            raise RangeError("round_to", self.round_to, "1 to 65,536")
        if not 0 <= self.floor < 1:
            raise RangeError("floor", self.floor, "[0, 1)")

    def step(self, width: int) -> int:
        """Return the multiple for a group that had `width` channels before any cut."""
        if self.round_to is not None:
            return self.round_to
        return self.aligned if width >= LARGE else 1
