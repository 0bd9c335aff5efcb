"""The label algebra: merging and splitting are inverse, rectangles stay rectangles, ties and freezing spread."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.graph.axes import BROADCAST, UNPRUNABLE, Labels

sizes = st.lists(st.integers(2, 5), min_size=1, max_size=4)


@given(sizes, st.integers(0, 3))
def test_one_labelled_axis_survives_merging_and_splitting(shape: list[int], at: int) -> None:
    labels, at = Labels(), at % len(shape)
    axis = labels.new_axis(shape[at])
    axes = [axis if i == at else UNPRUNABLE for i in range(len(shape))]
    again = labels.split(labels.merge(axes, shape), shape)
    assert np.array_equal(again[at], axis)
    assert all(a is UNPRUNABLE for i, a in enumerate(again) if i != at)
    assert not labels.rectangles


@given(sizes)
def test_merging_repeats_labels_as_memory_does(shape: list[int]) -> None:
    """The oracle is numpy's own reshape of an index grid."""
    labels = Labels()
    axis = labels.new_axis(shape[0])
    grid = np.broadcast_to(axis.reshape([-1] + [1] * (len(shape) - 1)), shape)
    assert np.array_equal(labels.merge([axis, *[UNPRUNABLE] * (len(shape) - 1)], shape), grid.ravel())


def test_axes_without_labels_get_none() -> None:
    labels = Labels()
    assert labels.merge([UNPRUNABLE, BROADCAST], [4, 3]) is UNPRUNABLE
    assert labels.merge([BROADCAST, BROADCAST], [4, 3]) is BROADCAST
    assert labels.split(UNPRUNABLE, [4, 1, 3]) == [UNPRUNABLE, BROADCAST, UNPRUNABLE]
    assert labels.split(BROADCAST, [4, 3]) == [BROADCAST, BROADCAST]


@given(st.integers(2, 4), st.integers(5, 7))
def test_a_shuffle_returns_the_merged_axis_transposed(rows: int, columns: int) -> None:
    labels = Labels()
    axis = labels.new_axis(rows * columns)
    row, column = labels.split(axis, [rows, columns])
    shuffled = labels.merge([column, row], [columns, rows])
    assert np.array_equal(shuffled, axis.reshape(rows, columns).T.ravel())
    classes = labels.solve().class_ids[axis].reshape(rows, columns)
    assert (classes == classes[0]).all(), "position j of every row is one channel: the longer side is cut"
    assert len(set(classes[0])) == columns


def test_of_a_rectangle_the_side_that_can_be_cut_is_cut() -> None:
    labels = Labels()
    axis = labels.new_axis(12)
    heads, width = labels.split(axis, [3, 4])
    labels.freeze(width, "a reason")
    classes = labels.solve()
    assert [classes.class_ids[axis].reshape(3, 4)[i].tolist() for i in range(3)] == [
        [classes.class_ids[h]] * 4 for h in heads
    ]
    assert not classes.frozen[classes.class_ids[heads[0]]]
    assert classes.reason(int(classes.class_ids[width[0]])) == "a reason"


def test_two_activations_contracted_over_a_side_make_the_other_the_one_to_cut() -> None:
    labels = Labels()
    axis = labels.new_axis(12)
    _, width = labels.split(axis, [3, 4])
    labels.mark_contracted(width)
    classes = labels.solve()
    assert len(set(classes.class_ids[axis])) == 3


def test_freezing_spreads_over_ties_and_the_first_reason_stays() -> None:
    labels = Labels()
    a, b, c = labels.new_axis(3), labels.new_axis(3), labels.new_axis(3)
    labels.tie(a, b)
    labels.tie(b, c[::-1])
    labels.freeze(c[:1], "first")
    labels.freeze(a[2:], "second")
    classes = labels.solve()
    assert classes.frozen.nonzero()[0].tolist() == [classes.class_ids[a[2]]]
    assert classes.reason(int(classes.class_ids[a[2]])) == "first"
    assert classes.class_ids[a[0]] == classes.class_ids[b[0]] == classes.class_ids[c[2]]


@pytest.mark.parametrize("earlier", [0, 1, 2])
def test_the_first_reason_stays_however_many_rectangles_are_decided_before(earlier: int) -> None:
    labels = Labels()
    for _ in range(earlier):
        labels.split(labels.new_axis(4), [2, 2])
    axis = labels.new_axis(4)
    rows, _ = labels.split(axis, [2, 2])
    labels.freeze(axis[:1], "first")
    labels.freeze(axis[1:2], "second")
    classes = labels.solve()
    assert classes.class_ids[axis[0]] == classes.class_ids[axis[1]] == classes.class_ids[rows[0]]
    assert classes.reason(int(classes.class_ids[axis[0]])) == "first"


def test_the_worked_example_of_a_residual_block_a_flatten_and_a_shuffle() -> None:
    """The comment at the top of `axes.py`."""
    labels = Labels()
    conv1, _, conv2, read = (labels.new_axis(size) for size in (4, 3, 4, 4))
    labels.tie(conv1, read)
    labels.tie(conv1, conv2)
    flat = labels.merge([conv1, UNPRUNABLE, UNPRUNABLE], [4, 2, 2])
    assert flat.tolist() == [channel for channel in conv1.tolist() for _ in range(4)]
    rows, columns = labels.split(conv1, [2, 2])
    assert (rows.tolist(), columns.tolist()) == ([15, 16], [17, 18])
    assert labels.merge([columns, rows], [2, 2]).tolist() == [0, 2, 1, 3]
    classes = labels.solve().class_ids
    channels = [{label for label in range(labels.count) if classes[label] == classes[row]} for row in rows]
    assert channels == [{0, 1, 7, 8, 11, 12, 15}, {2, 3, 9, 10, 13, 14, 16}]


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=40))
def test_classes_are_the_connected_components(edges: list[tuple[int, int]]) -> None:
    labels = Labels()
    axis = labels.new_axis(20)
    for first, second in edges:
        labels.tie(axis[[first]], axis[[second]])
    parent = list(range(20))
    for first, second in edges:
        old, new = parent[first], parent[second]
        parent = [new if p == old else p for p in parent]
    ids = labels.solve().class_ids[axis]
    assert all((ids[i] == ids[j]) == (parent[i] == parent[j]) for i in range(20) for j in range(20))


@pytest.mark.parametrize("times", [1, 300])
def test_the_same_tie_many_times_is_one_tie(times: int) -> None:
    """256 equal edges once summed to zero in a matrix of bytes."""
    labels = Labels()
    a, b = labels.new_axis(1), labels.new_axis(1)
    for _ in range(times - 1 + 256):
        labels.tie(a, b)
    ids = labels.solve().class_ids
    assert ids[a[0]] == ids[b[0]]
