"""Schedules: which share of the final sparsity is due, as a function of the progress of the training.

Progress and share both run from 0 to 1. A schedule is any such function; these are the usual ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from compressor.errors import InputError, RangeError

Schedule: TypeAlias = Callable[[float], float]


@dataclass(frozen=True)
class OneShot:
    """Everything at once.

    Args:
        at: progress at which it is due, in [0, 1].

    Raises:
        RangeError: `at`, or the progress of a call, is outside [0, 1].
    """

    at: float

    def __post_init__(self) -> None:
        """Check the range."""
        _check("at", self.at)

    def __call__(self, progress: float) -> float:
        """Return 0 before `at`, 1 from then on."""
        return float(_check("progress", progress) >= self.at)


@dataclass(frozen=True)
class Linear:
    """Evenly, `t` as `t` goes from 0 at `begin` to 1 at `end`.

    Args:
        begin, end: progress at which the first and the last bit is due, `0 <= begin < end <= 1`.

    Raises:
        RangeError: `begin` or `end` out of range, or the progress of a call outside [0, 1].
    """

    begin: float
    end: float

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_window(self.begin, self.end)

    def __call__(self, progress: float) -> float:
        """Return the share that is due, in [0, 1]."""
        return _elapsed(progress, self.begin, self.end)


@dataclass(frozen=True)
class Cubic:
    """Much at first, then less and less: `1 - (1 - t)^3` as `t` goes from 0 at `begin` to 1 at `end`.

    Args:
        begin, end: progress at which the first and the last bit is due, `0 <= begin < end <= 1`.

    Raises:
        RangeError: `begin` or `end` out of range, or the progress of a call outside [0, 1].

    Source: Zhu & Gupta, To prune or not to prune, arXiv 1710.01878, from sparsity 0.
    """

    begin: float
    end: float

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_window(self.begin, self.end)

    def __call__(self, progress: float) -> float:
        """Return the share that is due, in [0, 1]."""
        return 1 - (1 - _elapsed(progress, self.begin, self.end)) ** 3


def step_of_whole_budget(schedule: Schedule, total_steps: int) -> int:
    """Return the first step at which the whole budget is due.

    Raises:
        InputError: a schedule that never gets there.
    """
    due = (step for step in range(1, total_steps + 1) if schedule(step / total_steps) >= 1)
    last = next(due, None)
    if last is None:
        raise InputError(
            f"after all {total_steps} steps the schedule asks for {schedule(1.0):.0%} of the budget, which is never "
            f"reached: give a schedule that gets to 1, {USUAL_SCHEDULE} say"
        )
    return last


def usual_period(total_steps: int, least: int = 1) -> int:
    """Return a twentieth of the training in steps: the time between two cuts where nothing else is asked."""
    return max(least, total_steps // 20)


def _elapsed(progress: float, begin: float, end: float) -> float:
    """Return which share of the window is behind us."""
    return min(max((_check("progress", progress) - begin) / (end - begin), 0.0), 1.0)


def _check_window(begin: float, end: float) -> None:
    _check("end", end)
    if not 0 <= begin < end:
        raise RangeError("begin", begin, f"[0, {end:g}): it comes before end = {end:g}")


def _check(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise RangeError(name, value, "[0, 1]")
    return value


# Not before a tenth of the training: a ranking taken earlier is that of an untrained network. The last third is left
# to recover from the last cuts.
USUAL_SCHEDULE = Cubic(0.1, 0.65)
