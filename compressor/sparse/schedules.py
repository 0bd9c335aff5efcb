"""When the masks of a sparse training change, and how far: everything that depends on the step alone.

Steps are counted from 1, from the beginning of the sparse training itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from compressor.budget import USUAL_SCHEDULE, Schedule, step_of_whole_budget, usual_period
from compressor.errors import IdleArgumentError, InputError, RangeError
from compressor.sparse.regrowth import METHODS, Regrowth


class MaskSchedule(ABC):
    """At which steps the masks change.

    Attributes:
        every: steps between two changes.
        last: the step of the last change; the masks are final after it.
    """

    every: int
    last: int

    @abstractmethod
    def share(self, step: int) -> float:
        """Return how far the change at a step goes, in [0, 1]."""

    def is_due(self, step: int) -> bool:
        """Return whether the masks change at a step."""
        return step == self.last or (step < self.last and step % self.every == 0 and self.share(step) > 0)


class GradualSchedule(MaskSchedule):
    """More and more is off; `share` is the part of the budget that is due.

    Args:
        total_steps: of the training.
        every: a twentieth of the training by default.
        schedule: cubic by default, from 10 % of the training to 65 %.

    Raises:
        InputError: the schedule never asks for the whole budget.
    """

    def __init__(self, total_steps: int, every: int | None = None, schedule: Schedule | None = None) -> None:
        self.every = every or usual_period(total_steps)
        self._total = total_steps
        self._schedule = schedule or USUAL_SCHEDULE
        self.last = step_of_whole_budget(self._schedule, total_steps)

    def share(self, step: int) -> float:
        """Return the part of the budget that is due at a step."""
        return self._schedule(step / self._total)


class DropGrowSchedule(MaskSchedule):
    """As much grows as is dropped; `share` is the part of what is on that is dropped.

    Args:
        name: of the method, for messages.
        how: the method.
        total_steps: of the training.
        every: by default what was published.

    Raises:
        InputError: the training is too short for a single change, or the length of an epoch is not known.
    """

    def __init__(self, name: str, how: Regrowth, total_steps: int, every: int | None = None) -> None:
        if not (every or how.every):
            raise InputError(
                f"{name} changes its masks once an epoch: give prune_every=len(loader), the steps of an epoch"
            )
        self._how = how
        self._end = how.until * total_steps
        self.every = every or how.every or 1
        self.last = (math.ceil(self._end) - 1) // self.every * self.every
        if self.last < 1:
            raise InputError(
                f"{name} changes its masks every {self.every} steps until {how.until:.0%} of {total_steps} are over, "
                f"so never: train for longer, or give prune_every = {usual_period(total_steps)}"
            )

    def share(self, step: int) -> float:
        """Return the part of what is on that is dropped at a step."""
        return self._how.share(step / self._end)


def mask_schedule(criterion: str, total_steps: int, every: int | None, schedule: Schedule | None) -> MaskSchedule:
    """Return the schedule of a method of `METHODS`.

    Raises:
        RangeError: a number of steps below 1.
        InputError: a schedule that has no effect, or one without a single change.
    """
    for name, value in (("total_steps", total_steps), ("prune_every", every)):
        if value is not None and value < 1:
            raise RangeError(name, value, "1, 2, 3, ... steps")
    how = METHODS[criterion]
    if how is None:
        return GradualSchedule(total_steps, every, schedule)
    if schedule:
        raise IdleArgumentError("schedule", f"{criterion}, which is sparse from the beginning")
    return DropGrowSchedule(criterion, how, total_steps, every)
