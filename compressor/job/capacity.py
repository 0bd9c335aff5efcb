"""What this machine can carry, asked before it is asked for: a process that takes too much memory is killed unheard."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compressor.deploy import describe_machine
from compressor.errors import InputError, RangeError

# What a network computes from its inputs is larger than they are: the first map of a ResNet-18 alone 5 times.
_TIMES_THE_INPUTS = 8


def require_memory(batch_shape: Sequence[int], itemsize: int = 4) -> None:
    """Refuse inputs whose network would not fit.

    Args:
        batch_shape: of all inputs at once.
        itemsize: bytes of one number.

    Raises:
        InputError: says how much they need and how much there is.
    """
    memory_gib = describe_machine()["memory_gib"]
    needed_gib = _TIMES_THE_INPUTS * math.prod(batch_shape) * itemsize / 2**30
    if memory_gib is not None and needed_gib > memory_gib:
        size = " x ".join(map(str, batch_shape))
        raise InputError(
            f"inputs of {size} need about {needed_gib:,.0f} GiB with what is computed from them, and this machine has "
            f"{memory_gib:,.0f} GiB: give a smaller --batch-size or --image-size"
        )


def require_threads(threads: int) -> None:
    """Refuse more threads than processors: they would only wait for each other.

    Raises:
        RangeError: `threads` is below 1 or above the number of processors that this process may use.
    """
    most = describe_machine()["cores"]
    if not 1 <= threads <= most:
        raise RangeError("threads", threads, f"1 to {most}, the processors of this machine")
