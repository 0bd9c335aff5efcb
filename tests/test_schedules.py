"""Schedules: their end points, their formulas, and the ranges that they refuse."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.budget import Cubic, Linear, OneShot, Schedule
from compressor.errors import RangeError

ALL = [OneShot(0.5), OneShot(0.0), OneShot(1.0), Linear(0.1, 0.65), Linear(0.0, 1.0), Cubic(0.1, 0.65), Cubic(0.0, 1.0)]


@pytest.mark.parametrize("schedule", ALL, ids=repr)
@settings(deadline=None)
@given(progress=st.lists(st.floats(0, 1), min_size=2))
def test_a_schedule_rises_within_0_and_1_and_ends_at_1(schedule: Schedule, progress: list[float]) -> None:
    due = [schedule(moment) for moment in sorted(progress)]
    assert due == sorted(due)
    assert all(0 <= share <= 1 for share in due)
    assert schedule(1.0) == 1.0


@pytest.mark.parametrize("schedule", [Linear(0.2, 0.6), Cubic(0.2, 0.6)], ids=repr)
def test_a_window_is_closed_before_its_begin_and_done_at_its_end(schedule: Schedule) -> None:
    assert [schedule(moment) for moment in (0.0, 0.2, 0.6, 0.8)] == [0, 0, 1, 1]


def test_in_between_they_follow_their_formulas() -> None:
    assert Linear(0.0, 0.5)(0.125) == 0.25
    assert Cubic(0.0, 0.5)(0.25) == 1 - 0.5**3
    assert [OneShot(0.5)(moment) for moment in (0.49, 0.5, 1.0)] == [0, 1, 1]


@pytest.mark.parametrize("make", [Linear, Cubic])
@pytest.mark.parametrize(("begin", "end", "name"), [(-0.1, 0.5, "begin"), (0.1, 1.1, "end"), (0.5, 0.5, "begin")])
def test_a_window_outside_the_training_is_refused(make: type[Linear], begin: float, end: float, name: str) -> None:
    with pytest.raises(RangeError, match=f"^{name} = "):
        make(begin, end)


def test_the_messages_say_what_fits() -> None:
    with pytest.raises(RangeError, match=r"^at = 1.5 is out of range: give at in \[0, 1\]$"):
        OneShot(1.5)
    expected = r"^begin = 0.7 is out of range: give begin in \[0, 0.6\): it comes before end = 0.6$"
    with pytest.raises(RangeError, match=expected):
        Cubic(0.7, 0.6)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_progress_outside_the_training_is_refused(schedule: Schedule, progress: float) -> None:
    with pytest.raises(RangeError, match="progress = "):
        schedule(progress)
