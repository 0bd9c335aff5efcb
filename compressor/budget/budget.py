"""A budget: which share of what is to go."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from compressor.errors import InputError, RangeError, UnknownNameError

if TYPE_CHECKING:  # it needs torch, and the help of the command line does not
    from compressor.graph import ChannelGraph

Measure = Literal["params", "macs", "channels"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
ALIGNED = 8  # channels: most kernels of CPUs and GPUs work on so many at once


class Seen(Protocol):
    """What was measured of a whole network, before a pruning and now."""

    @property
    def removed(self) -> float:
        """The share that is gone."""

    def says(self, asked: float, predicted: float) -> str:
        """Return what was asked, predicted and measured, in one line."""

    def warning(self, predicted: int) -> str:
        """Return what to know where a prediction is far from that; else nothing."""


class Cost(Protocol):
    """Something else to count, latency say; `compressor.deploy.LatencyCost` is one.

    Attributes:
        name: for messages and results.
    """

    name: str

    @property
    def aligned(self) -> int:
        """The multiple of channels at which something is won."""

    def count(self, graph: ChannelGraph) -> Callable[[Any], Any]:
        """Return what predicts the cost: takes kept channels `(B, G)` in the order of the groups, returns `(B,)`."""

    def watch(self, graph: ChannelGraph) -> Callable[[], Seen] | None:
        """Return what measures the model as it is then against how it is now; None where the count is exact."""


@dataclass(frozen=True)
class Budget:
    """What is to be removed.

    Attributes:
        sparsity: the share that goes, in [0, 1).
        measure: of what: "params", "macs" (multiply-adds for the example inputs) or "channels"; or a cost of its own,
            latency say.

    Raises:
        RangeError: a sparsity outside [0, 1).
        UnknownNameError: a measure that does not exist.
    """

    sparsity: float = 0.5
    measure: Measure | Cost = "params"

    def __post_init__(self) -> None:
        """Check the range and the name."""
        if not 0 <= self.sparsity < 1:
            raise RangeError("sparsity", self.sparsity, "[0, 1)")
        if isinstance(self.measure, str) and self.measure not in MEASURES:
            raise UnknownNameError("measure", self.measure, MEASURES)

    @property
    def counts(self) -> str:
        """The name of what is counted."""
        return self.measure if isinstance(self.measure, str) else self.measure.name

    @property
    def aligned(self) -> int:
        """The multiple of channels at which something is won."""
        return ALIGNED if isinstance(self.measure, str) else self.measure.aligned

    @staticmethod
    def from_share(budget: Budget | float) -> Budget:
        """Return a budget as it is, and a number as that share of the parameters.

        Raises:
            InputError: neither of them.
            RangeError: a number outside [0, 1).
        """
        if isinstance(budget, Budget):
            return budget
        if isinstance(budget, bool) or not isinstance(budget, int | float):
            raise InputError(f"budget = {budget!r}: give a share of the parameters, 0.5 say, or Budget(0.5, 'macs')")
        return Budget(float(budget))

    def scaled(self, due: float) -> Budget:
        """Return the budget of which only the share `due`, in [0, 1], is to be met by now."""
        return Budget(self.sparsity * due, self.measure)

    def goal(self, dense: int) -> int:
        """Return the most that may stay of a count, exactly: 0.45 of 100 channels stay of a budget of 0.55."""
        return dense - share_of(self.sparsity, dense)


def share_of(share: float, count: int) -> int:
    """Return the smallest integer that is at least this share of a count, in the decimal digits that were typed."""
    # NOTE: 0.55 * 100 is 55.00000000000001 in floats, whose ceiling would be 56. `repr` has the digits as typed.
    return math.ceil(Fraction(repr(float(share))) * count)
