"""Widths under a cost that falls in steps: within the goal, nothing to give back, and near the best there is."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.budget.stairs import step_down
from compressor.budget.widths import Widths


def widths(sizes: list[int], step: int = 1, lowest: int = 1) -> Widths:
    return Widths(np.array(sizes), np.full(len(sizes), step), np.full(len(sizes), lowest))


def stairs(step: int, weights: list[int]):
    """Every layer reads one group and makes the next; both widths count in blocks."""

    def price(kept: np.ndarray) -> np.ndarray:
        blocks = -(-kept // step)
        sides = np.concatenate([np.ones((len(kept), 1), dtype=np.int64), blocks, np.ones((len(kept), 1), np.int64)], 1)
        return (np.array(weights) * sides[:, :-1] * sides[:, 1:]).sum(1) * 1000

    return price


def test_the_example_of_the_module() -> None:
    cost = {4: 2, 8: 6, 16: 10}

    def price(kept: np.ndarray) -> np.ndarray:
        return np.array([cost[min(edge for edge in cost if edge >= width)] for width in kept[:, 0]])

    keys = [np.ones(16)]
    assert step_down(keys, widths([16], lowest=4), price, 9).tolist() == [8]  # twelve would be too many: four come back
    assert step_down(keys, widths([16], lowest=4), price, 5).tolist() == [4]
    assert step_down(keys, widths([16], lowest=4), price, 10).tolist() == [16]
    assert step_down(keys, widths([16], lowest=4), price, 1).tolist() == [4]  # as few as may be


@given(
    sizes=st.lists(st.integers(2, 7), min_size=1, max_size=3),
    step=st.integers(1, 3),
    share=st.floats(0.2, 0.95),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=150)
def test_it_fits_and_is_near_the_best_choice_of_all(sizes: list[int], step: int, share: float, seed: int) -> None:
    dice = np.random.default_rng(seed)
    keys = [np.sort(dice.uniform(0.1, 1, size)) for size in sizes]
    price = stairs(step, dice.integers(1, 5, len(sizes) + 1).tolist())
    goal = int(share * price(np.array([sizes]))[0])
    counts = step_down(keys, widths(sizes), price, goal)

    def lost(kept: tuple) -> float:
        return sum(float(key[: size - count].sum()) for key, size, count in zip(keys, sizes, kept, strict=True))

    choices = [each for each in product(*(range(1, size + 1) for size in sizes)) if price(np.array([each]))[0] <= goal]
    if not choices:
        assert counts.tolist() == [1] * len(sizes)
        return
    assert price(counts[None])[0] <= goal
    best = min(lost(each) for each in choices)
    assert lost(tuple(counts)) <= 2 * best + 1  # greedy: at most one channel's worth beside twice the least
    for group, size in enumerate(sizes):
        if counts[group] < size:
            wider = counts.copy()
            wider[group] += 1
            assert price(wider[None])[0] > goal


def test_of_very_wide_groups_not_every_width_is_looked_at() -> None:
    calls = []

    def price(kept: np.ndarray) -> np.ndarray:
        calls.append(len(kept))
        return kept.sum(1)

    counts = step_down([np.ones(4096)], widths([4096], 8, 8), price, 2048)
    assert counts[0] == pytest.approx(2048, abs=120)
    assert max(calls) <= 42
