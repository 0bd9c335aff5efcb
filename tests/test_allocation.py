"""Which layer becomes how sparse: published values, and the laws that any allocation keeps."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import BudgetError
from compressor.sparse.allocation import ALLOCATIONS, counts_off, erdos_renyi, uniform

# The shapes (2, 4), (3, 6) and (2, 4, 6) of TensorFlow kernels, (*kernel, in, out), in PyTorch's order.
SHAPES = {"a": (4, 2), "b": (6, 3), "c": (6, 4, 2)}


@pytest.mark.parametrize(
    ("sparsity", "how", "expected"),
    [
        (0.5, {}, (0.0, 0.31, 0.655)),
        (0.8, {}, (0.556, 0.70, 0.85)),
        (0.5, {"kernel": False}, (0.21, 0.47, 0.56)),
        (0.5, {"power": 2}, (0.0, 0.033, 0.758)),
    ],
)
def test_erk_gives_the_values_of_the_published_code(sparsity: float, how: dict, expected: tuple) -> None:
    given_ = erdos_renyi(SHAPES, sparsity, **how)
    assert list(given_) == ["a", "b", "c"]
    assert tuple(given_.values()) == pytest.approx(expected, abs=0.005)


def test_uniform_leaves_the_first_layer_dense_and_the_others_make_up_for_it() -> None:
    shares = uniform(SHAPES, 0.5)
    assert shares == {"a": 0.0, "b": pytest.approx(37 / 66), "c": pytest.approx(37 / 66)}
    assert uniform({"a": (4, 2)}, 0.5) == {"a": 0.5}


def test_uniform_says_what_it_cannot_reach() -> None:
    with pytest.raises(
        BudgetError, match=r"cannot remove 95.0% of the weights: at most 89.2% can go.*\n.*first layer, 'a'"
    ):
        uniform(SHAPES, 0.95)


def test_power_zero_is_the_same_everywhere() -> None:
    assert erdos_renyi({"a": (40, 20), "b": (60, 30)}, 0.5, power=0) == {"a": 0.5, "b": 0.5}


shapes = st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4), min_size=2, max_size=6)


@given(shapes=shapes, sparsity=st.floats(0, 0.98), kernel=st.booleans())
def test_erk_keeps_the_total_and_no_layer_is_more_than_dense(shapes: list, sparsity: float, kernel: bool) -> None:
    named = {str(index): shape for index, shape in enumerate(shapes)}
    sizes = {name: math.prod(shape) for name, shape in named.items()}
    shares = erdos_renyi(named, sparsity, kernel=kernel)
    assert all(0 <= share <= 1 for share in shares.values())
    off = sum(shares[name] * sizes[name] for name in sizes)
    assert off == pytest.approx(sum(int(sparsity * size) for size in sizes.values()), abs=1e-6)


@given(shapes=shapes, sparsity=st.floats(0, 0.9), allocation=st.sampled_from(sorted(ALLOCATIONS)))
def test_whole_weights_add_up_exactly(shapes: list, sparsity: float, allocation: str) -> None:
    named = {str(index): shape for index, shape in enumerate(shapes)}
    sizes = {name: math.prod(shape) for name, shape in named.items()}
    try:
        shares = ALLOCATIONS[allocation](named, sparsity)
    except BudgetError:
        return
    total = math.ceil(sparsity * sum(sizes.values()))
    counts = counts_off(sizes, shares, total)
    able = {name: size - 1 if shares[name] else 0 for name, size in sizes.items()}
    assert all(0 <= counts[name] <= able[name] for name in sizes)
    assert sum(counts.values()) == min(total, sum(able.values()))
    if sum(able.values()) - total > 2 * len(sizes):  # where there is room, rounding moves hardly anything
        assert all(abs(counts[name] - min(shares[name] * sizes[name], able[name])) <= 3 + len(sizes) for name in sizes)
