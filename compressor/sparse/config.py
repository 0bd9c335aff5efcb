"""What can be chosen about sparse training, with every default; read from here by the command line as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from compressor.errors import InputError, UnknownNameError

Method = Literal["magnitude", "set", "rigl"]
Granularity = Literal["weight", "channel"]
MaskAllocation = Literal["erk", "uniform", "global"]


@dataclass(frozen=True)
class SparseConfig:
    """Which units are masked, and how sparsity differs between layers.

    Attributes:
        granularity: "weight" masks single weights, as published; "channel" masks whole channels.
        allocate: "erk" makes large layers sparser (RigL's Erdős-Rényi kernel), "uniform" makes all alike, "global"
            ranks everything together, with "magnitude" alone. None: "uniform" with "magnitude", "erk" otherwise.

    Raises:
        UnknownNameError: a granularity or an allocation that does not exist.
    """

    granularity: Granularity = "weight"
    allocate: MaskAllocation | None = None

    def __post_init__(self) -> None:
        """Check the names."""
        if self.granularity not in get_args(Granularity):
            raise UnknownNameError("granularity", self.granularity, get_args(Granularity))
        if self.allocate is not None and self.allocate not in get_args(MaskAllocation):
            raise UnknownNameError("allocation", self.allocate, get_args(MaskAllocation))

    def allocation_for(self, method: str) -> MaskAllocation:
        """Return the allocation of a method; its usual one where none was chosen.

        Raises:
            UnknownNameError: no such method.
            InputError: "global" for a method that begins at random.
        """
        if method not in get_args(Method):
            raise UnknownNameError("criterion", method, get_args(Method))
        if method != "magnitude" and self.allocate == "global":
            raise InputError(f"{method} begins at random, so there is nothing to rank: give 'erk' or 'uniform'")
        return self.allocate or ("uniform" if method == "magnitude" else "erk")
