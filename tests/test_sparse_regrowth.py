"""Drop and grow as pure functions: published values, and laws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compressor.budget.schedules import Cubic, Linear
from compressor.errors import InputError, RangeError
from compressor.sparse.regrowth import cosine, drop_and_grow, lowest, without_lowest, without_nearest_zero
from compressor.sparse.schedules import mask_schedule


def bits(text: str) -> Tensor:
    return torch.tensor([int(each) for each in text]).bool()


@pytest.mark.parametrize(("share", "expected"), [(0.25, "11010100"), (0.5, "11001100"), (0.75, "10101100")])
def test_rigl_drops_and_grows_as_the_published_code_does(share: float, expected: str) -> None:
    scores = torch.tensor([-9.0, 1, 4, -1, 5, 8, -2, 3])
    mask = bits("01010110")
    assert torch.equal(drop_and_grow(mask, without_lowest(scores, mask, share), scores.abs()), bits(expected))


def test_set_drops_by_sign_the_nearest_to_zero() -> None:
    values = torch.tensor([3.0, 1, 2, 4, -3, -1, -2, -4, 0, 0.1])
    mask = bits("1111111110")
    assert torch.equal(without_nearest_zero(values, mask, 0.25), bits("1011101100"))
    assert torch.equal(without_nearest_zero(values, mask, 0.5), bits("1001100100"))
    assert torch.equal(without_nearest_zero(values.abs(), mask, 0.5), bits("1001100100"))


def test_of_equal_scores_the_first_are_lowest() -> None:
    assert torch.equal(lowest(torch.zeros(6), bits("110111"), 3), bits("110100"))
    assert torch.equal(lowest(torch.tensor([1.0, 0, 1, 0, 1, 5]), bits("111111"), 3), bits("110100"))


masks = st.lists(st.booleans(), min_size=1, max_size=30)


@given(on=masks, share=st.floats(0, 1), seed=st.integers(0, 99), ties=st.booleans())
def test_rewiring_keeps_the_count_and_takes_the_extremes(on: list, share: float, seed: int, ties: bool) -> None:
    mask, generator = torch.tensor(on), torch.Generator().manual_seed(seed)
    values = torch.randn(len(on), generator=generator).round(decimals=0 if ties else 6)
    grad_magnitudes = torch.rand(len(on), generator=generator)
    kept = without_lowest(values.abs(), mask, share)
    new = drop_and_grow(mask, kept, grad_magnitudes)
    dropped, grown = mask & ~kept, new & ~kept
    assert int(dropped.sum()) == int(share * int(mask.sum()))
    assert int(new.sum()) == int(mask.sum())
    assert bool((new | ~kept).all())
    if dropped.any() and kept.any():
        assert values.abs()[dropped].max() <= values.abs()[kept].min()
    if grown.any() and not new.all():
        assert grad_magnitudes[grown].min() >= grad_magnitudes[~new].max()


def test_the_share_falls_along_half_a_cosine() -> None:
    assert [cosine(t) for t in (0, 0.5, 1)] == pytest.approx([0.3, 0.15, 0])
    assert cosine(0.25) == pytest.approx(0.15 * (1 + math.sqrt(0.5)))


# -- timetables


def steps(criterion: str, total: int, every: int | None = None, schedule=None) -> list[int]:
    when = mask_schedule(criterion, total, every, schedule)
    due = [step for step in range(1, total + 1) if when.is_due(step)]
    assert due[-1] == when.last
    return due


def test_rigl_changes_every_100_steps_until_three_quarters() -> None:
    assert steps("rigl", 1000) == [100, 200, 300, 400, 500, 600, 700]
    assert steps("rigl", 400) == [100, 200]  # step 300 is the end itself: nothing would be dropped
    assert mask_schedule("rigl", 1000, None, None).share(300) == pytest.approx(0.15 * (1 + math.cos(0.4 * math.pi)))


def test_set_changes_after_every_epoch_but_the_last() -> None:
    assert steps("set", 50, 10) == [10, 20, 30, 40]
    assert {mask_schedule("set", 50, 10, None).share(step) for step in (10, 40)} == {0.3}


def test_magnitude_follows_the_schedule_to_its_end() -> None:
    assert steps("magnitude", 100) == [15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65]
    assert steps("magnitude", 100, 30, Linear(0.0, 0.5)) == [30, 50]
    assert mask_schedule("magnitude", 100, None, None).share(40) == Cubic(0.1, 0.65)(0.4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("rigl", 100, None, None), InputError, r"every 100 steps until 75% of 100 are.*give prune_every = 5"),
        (("set", 10, 10, None), InputError, "set changes its masks every 10 steps until 100% of 10 are over, so never"),
        (("set", 10, None, None), InputError, r"set changes its masks once an epoch: give prune_every=len\(loader\)"),
        (("rigl", 1000, None, Cubic(0, 1)), InputError, "schedule has no effect with rigl"),
        (("magnitude", 10, None, lambda progress: 0.5), InputError, "the schedule asks for 50% of the budget, whic"),
        (("rigl", 0, None, None), RangeError, "total_steps = 0 is out of range"),
        (("rigl", 10, 0, None), RangeError, "prune_every = 0 is out of range"),
    ],
)  # fmt: skip
def test_a_schedule_without_a_change_is_refused(arguments: tuple, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        mask_schedule(*arguments)
