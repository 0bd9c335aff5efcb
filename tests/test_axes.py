"""The label algebra: merging and splitting are inverse, rectangles stay rectangles, ties and freezing spread."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.graph.axes import FIXED, FREE, Labels

sizes = st.lists(st.integers(2, 5), min_size=1, max_size=4)


@given(sizes, st.integers(0, 3))
def test_one_labelled_axis_survives_merging_and_splitting(shape: list[int], at: int) -> None:
    labels, at = Labels(), at % len(shape)
    axis = labels.fresh(shape[at])
    axes = [axis if i == at else FIXED for i in range(len(shape))]
    again = labels.split(labels.merge(axes, shape), shape)
    assert np.array_equal(again[at], axis)
    assert all(a is FIXED for i, a in enumerate(again) if i != at)
    assert not labels.rectangles


@given(sizes)
def test_merging_repeats_labels_as_memory_does(shape: list[int]) -> None:
    """The oracle is numpy's own reshape of an index grid."""
    labels = Labels()
    axis = labels.fresh(shape[0])
    grid = np.broadcast_to(axis.reshape([-1] + [1] * (len(shape) - 1)), shape)
    assert np.array_equal(labels.merge([axis, *[FIXED] * (len(shape) - 1)], shape), grid.ravel())


def test_blank_axes_stay_blank() -> None:
    labels = Labels()
    assert labels.merge([FIXED, FREE], [4, 3]) is FIXED
    assert labels.merge([FREE, FREE], [4, 3]) is FREE
    assert labels.split(FIXED, [4, 1, 3]) == [FIXED, FREE, FIXED]
    assert labels.split(FREE, [4, 3]) == [FREE, FREE]


@given(st.integers(2, 4), st.integers(5, 7))
def test_a_shuffle_gives_back_the_whole_transposed(rows: int, columns: int) -> None:
    labels = Labels()
    axis = labels.fresh(rows * columns)
    row, column = labels.split(axis, [rows, columns])
    shuffled = labels.merge([column, row], [columns, rows])
    assert np.array_equal(shuffled, axis.reshape(rows, columns).T.ravel())
    classes = labels.solve().of[axis].reshape(rows, columns)
    assert (classes == classes[0]).all(), "position j of every row is one channel: the longer side is cut"
    assert len(set(classes[0])) == columns


def test_of_a_rectangle_the_side_that_can_be_cut_is_cut() -> None:
    labels = Labels()
    axis = labels.fresh(12)
    heads, width = labels.split(axis, [3, 4])
    labels.freeze(width, "a reason")
    classes = labels.solve()
    assert [classes.of[axis].reshape(3, 4)[i].tolist() for i in range(3)] == [[classes.of[h]] * 4 for h in heads]
    assert classes.of[heads[0]] not in classes.reasons
    assert classes.reasons[int(classes.of[width[0]])] == "a reason"


def test_two_activations_contracted_over_a_side_make_the_other_the_one_to_cut() -> None:
    labels = Labels()
    axis = labels.fresh(12)
    _, width = labels.split(axis, [3, 4])
    labels.mark_mixed(width)
    classes = labels.solve()
    assert len(set(classes.of[axis])) == 3


def test_freezing_spreads_over_ties_and_the_first_reason_stays() -> None:
    labels = Labels()
    a, b, c = labels.fresh(3), labels.fresh(3), labels.fresh(3)
    labels.tie(a, b)
    labels.tie(b, c[::-1])
    labels.freeze(c[:1], "first")
    labels.freeze(a[2:], "second")
    classes = labels.solve()
    assert classes.reasons == {int(classes.of[a[2]]): "first"}
    assert classes.of[a[0]] == classes.of[b[0]] == classes.of[c[2]]


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=40))
def test_classes_are_the_connected_components(edges: list[tuple[int, int]]) -> None:
    labels = Labels()
    axis = labels.fresh(20)
    for first, second in edges:
        labels.tie(axis[[first]], axis[[second]])
    parent = list(range(20))
    for first, second in edges:
        old, new = parent[first], parent[second]
        parent = [new if p == old else p for p in parent]
    of = labels.solve().of[axis]
    assert all((of[i] == of[j]) == (parent[i] == parent[j]) for i in range(20) for j in range(20))


@pytest.mark.parametrize("times", [1, 300])
def test_the_same_tie_many_times_is_one_tie(times: int) -> None:
    """256 equal edges once summed to zero in a matrix of bytes."""
    labels = Labels()
    a, b = labels.fresh(1), labels.fresh(1)
    for _ in range(times - 1 + 256):
        labels.tie(a, b)
    of = labels.solve().of
    assert of[a[0]] == of[b[0]]
