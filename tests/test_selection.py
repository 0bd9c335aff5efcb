"""Selection: small, exhaustive checks, and laws for random chains, scores and budgets."""

from __future__ import annotations

import math
from dataclasses import fields
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.budget import MEASURES, Budget, CostModel, Selection, SelectionOptions, select
from compressor.budget.options import ALLOCATIONS
from compressor.budget.widths import Widths
from compressor.errors import RangeError, ScoreError, UnknownNameError
from compressor.graph import ChannelGraph, Extent, Frozen, Group, Term


def chain(sizes: list[int], frozen: tuple[Frozen, ...] = ()) -> ChannelGraph:
    """A chain of fully connected layers, 3 inputs and 5 outputs with a bias, seen 10 times: groups "0", "1", ..."""
    groups = tuple(Group(str(index), size, ()) for index, size in enumerate(sizes))
    axes = [Extent(3), *(Extent(0, {group.name: 1}) for group in groups), Extent(5)]
    pairs = list(pairwise(axes))
    params = (*(Term(1, pair) for pair in pairs), Term(5, ()))
    return ChannelGraph(nn.Identity(), None, groups, frozen, params, tuple(Term(10, pair) for pair in pairs))


def chain_params(widths: list[int]) -> int:
    axes = [3, *widths, 5]
    return sum(one * other for one, other in pairwise(axes)) + 5


def random_scores(graph: ChannelGraph, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.size, generator=generator) for group in graph.groups}


OPTIONS = {each.name for each in fields(SelectionOptions)}


def choose(
    graph: ChannelGraph, scores: dict[str, Tensor], sparsity: float, measure: str = "params", **how: Any
) -> Selection:
    """Select; the allocation is global here, and counts are not rounded, where nothing else is asked."""
    chosen = {"allocate": "global", "round_to": 1} | {name: how.pop(name) for name in OPTIONS & how.keys()}
    options = SelectionOptions(**chosen)
    return select(graph, scores, Budget(sparsity, measure), costs=CostModel(graph), options=options, **how)


def widths(graph: ChannelGraph, selection: Selection) -> dict[str, int]:
    return graph.sizes() | {name: len(keep) for name, keep in selection.keep.items()}


SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=5)
SEEDS = st.integers(0, 10**6)
SPARSITIES = st.floats(0, 0.99)
HOW = st.fixed_dictionaries(
    {
        "allocate": st.sampled_from(ALLOCATIONS),
        "round_to": st.sampled_from([1, 3, 8]),
        "floor": st.sampled_from([0.0, 0.1, 0.5]),
    }
)
CASE = given(sizes=SIZES, seed=SEEDS, sparsity=SPARSITIES, measure=st.sampled_from(MEASURES), how=HOW)


# -- laws


@settings(deadline=None)
@CASE
def test_what_it_says_is_what_it_comes_to(
    sizes: list[int], seed: int, sparsity: float, measure: str, how: dict[str, Any]
) -> None:
    graph = chain(sizes)
    made = choose(graph, random_scores(graph, seed), sparsity, measure, **how)
    left = widths(graph, made)
    before, after = chain_params(sizes), chain_params(list(left.values()))
    if measure == "macs":
        before, after = 10 * (before - 5), 10 * (after - 5)
    elif measure == "channels":
        before, after = sum(sizes), sum(left.values())
    assert (made.before, made.after) == (before, after)
    assert made.asked == sparsity
    assert made.removed == 1 - after / before
    assert made.reached == (before - after >= Fraction(repr(sparsity)) * before)
    assert made.reached == (not made.blocked)


@settings(deadline=None)
@CASE
def test_the_best_channels_stay_sorted_and_unique(
    sizes: list[int], seed: int, sparsity: float, measure: str, how: dict[str, Any]
) -> None:
    graph = chain(sizes)
    scores = random_scores(graph, seed)
    for name, keep in choose(graph, scores, sparsity, measure, **how).keep.items():
        assert keep.dtype == torch.int64
        assert keep.tolist() == sorted(scores[name].topk(len(keep)).indices.tolist())
        assert len(keep) < graph[name].size


@settings(deadline=None)
@CASE
def test_counts_are_multiples_above_the_floor(
    sizes: list[int], seed: int, sparsity: float, measure: str, how: dict[str, Any]
) -> None:
    graph = chain(sizes)
    made = choose(graph, random_scores(graph, seed), sparsity, measure, **how)
    for name, keep in made.keep.items():
        assert len(keep) >= max(1, how["floor"] * graph[name].size)
        assert len(keep) % how["round_to"] == 0


@settings(deadline=None)
@CASE
def test_more_sparsity_keeps_no_more(
    sizes: list[int], seed: int, sparsity: float, measure: str, how: dict[str, Any]
) -> None:
    graph = chain(sizes)
    scores = random_scores(graph, seed)
    less, more = (choose(graph, scores, share, measure, **how) for share in (sparsity / 2, sparsity))
    assert more.after <= less.after
    if how["allocate"] == "uniform":
        for name, size in graph.sizes().items():
            everything = torch.arange(size)
            assert set(more.keep.get(name, everything).tolist()) <= set(less.keep.get(name, everything).tolist())


def next_width(size: int, width: int, step: int) -> int:
    """The next that a group may keep: a multiple of the step, or its size."""
    return min((width // step + 1) * step, size)


def misses(graph: ChannelGraph, made: Selection, measure: str, step: int) -> list[bool]:
    """By group that lost channels: whether the budget is missed if a step of it comes back."""
    costs, left, goal = CostModel(graph), widths(graph, made), Budget(made.asked, measure).goal(made.before)
    wider = {name: left | {name: next_width(graph[name].size, left[name], step)} for name in made.keep}
    return [costs.measure(measure, each) > goal for each in wider.values()]


@settings(deadline=None)
@CASE
def test_no_step_of_any_group_could_come_back(
    sizes: list[int], seed: int, sparsity: float, measure: str, how: dict[str, Any]
) -> None:
    graph = chain(sizes)
    made = choose(graph, random_scores(graph, seed), sparsity, measure, **how)
    assume(made.reached and made.keep)
    missed = misses(graph, made, measure, how["round_to"])
    assert all(missed) if how["allocate"] == "global" else any(missed)


@settings(deadline=None)
@given(sizes=SIZES, seed=SEEDS, sparsity=SPARSITIES, measure=st.sampled_from(MEASURES))
def test_the_budget_is_hit_from_below_within_one_channel_of_the_cheapest_group(
    sizes: list[int], seed: int, sparsity: float, measure: str
) -> None:
    graph = chain(sizes)
    made = choose(graph, random_scores(graph, seed), sparsity, measure)
    assume(made.reached and made.keep)
    costs, left = CostModel(graph), widths(graph, made)
    room = Budget(sparsity, measure).goal(made.before) - made.after
    prices = [
        costs.measure(measure, left | {name: left[name] + 1}) - costs.measure(measure, left) for name in made.keep
    ]
    assert 0 <= room < min(prices)


def test_what_fits_beside_the_last_channel_that_went_comes_back() -> None:
    graph = chain([2, 1, 20])  # 133 params; a channel of "0" holds 4 of them, one of "2" 6
    scores = {"0": torch.tensor([0.0, 90.0]), "1": torch.tensor([50.0]), "2": torch.arange(1.0, 21.0)}
    # 6 params are asked for. The worst of "0" goes (4), then the worst of "2" (10): then the first is not needed.
    made = choose(graph, scores, 0.0451, normalise=False)
    assert {name: keep.tolist() for name, keep in made.keep.items()} == {"2": list(range(1, 20))}
    assert made.after == 127


# -- groups with a share of their own


SHARES = st.dictionaries(st.sampled_from("01234"), st.sampled_from([0.0, 0.3, 0.5, 0.95]))


@settings(deadline=None)
@given(sizes=SIZES, seed=SEEDS, sparsity=SPARSITIES, measure=st.sampled_from(MEASURES), how=HOW, shares=SHARES)
def test_a_share_of_its_own_is_kept_to_whatever_the_budget_is(
    sizes: list[int], seed: int, sparsity: float, measure: str, how: dict[str, Any], shares: dict[str, float]
) -> None:
    graph = chain(sizes)
    made = choose(graph, random_scores(graph, seed), sparsity, measure, shares=shares, **how)
    for name in shares.keys() & graph.sizes().keys():
        size, step, left = graph[name].size, how["round_to"], widths(graph, made)[name]
        wanted = size - math.ceil(Fraction(repr(shares[name])) * size)
        allowed = {size} | {n for n in range(1, size) if n % step == 0}
        assert abs(left - wanted) == min(abs(n - wanted) for n in allowed)
        assert shares[name] or left == size


@settings(deadline=None)
@given(sizes=SIZES, seed=SEEDS, sparsity=SPARSITIES, measure=st.sampled_from(MEASURES), how=HOW, shares=SHARES)
def test_the_other_groups_serve_the_budget_exactly(
    sizes: list[int], seed: int, sparsity: float, measure: str, how: dict[str, Any], shares: dict[str, float]
) -> None:
    graph = chain(sizes)
    made = choose(graph, random_scores(graph, seed), sparsity, measure, shares=shares, **how)
    others = [name for name in made.keep if name not in shares]
    assert made.reached == (made.after <= Budget(sparsity, measure).goal(made.before)) == (not made.blocked)
    missed = dict(zip(made.keep, misses(graph, made, measure, how["round_to"]), strict=True))
    assert not (made.reached and others) or (all if how["allocate"] == "global" else any)(
        missed[name] for name in others
    )


def test_a_share_is_of_the_width_before_earlier_cuts() -> None:
    graph = chain([20])
    scores = random_scores(graph, 0)
    for whole, width in ((40, 20), (30, 15), (20, 10), (100, 20)):
        assert widths(graph, choose(graph, scores, 0.0, shares={"0": 0.5}, whole={"0": whole})) == {"0": width}


def test_groups_with_a_share_of_their_own_are_named_where_the_budget_is_missed() -> None:
    graph = chain([20, 40, 6])
    scores = random_scores(graph, 0)
    del scores["0"]
    made = choose(graph, scores, 0.9, shares={"0": 0.0, "1": 0.5})
    assert widths(graph, made) == {"0": 20, "1": 20, "2": 1}
    assert made.blocked == (
        "groups at their floor (10% of the channels): '2' keeps 1 of 6",
        "groups that keep or only leaves whole: '0'",
        "groups with a sparsity of their own: '1' keeps 20 of 40",
        "5 of 1,135 params belong to no group",
    )


@settings(deadline=None)
@given(sizes=SIZES, seed=SEEDS, sparsity=SPARSITIES, how=HOW)
def test_permuting_channels_permutes_keep(sizes: list[int], seed: int, sparsity: float, how: dict[str, Any]) -> None:
    graph = chain(sizes)
    scores = random_scores(graph, seed)
    order = {name: torch.randperm(len(each)) for name, each in scores.items()}
    first = choose(graph, scores, sparsity, **how)
    second = choose(graph, {name: each[order[name]] for name, each in scores.items()}, sparsity, **how)
    assert set(first.keep) == set(second.keep)
    for name, keep in second.keep.items():
        assert sorted(order[name][keep].tolist()) == first.keep[name].tolist()


@settings(deadline=None)
@given(sizes=SIZES, seed=SEEDS, how=HOW)
def test_no_sparsity_cuts_nothing(sizes: list[int], seed: int, how: dict[str, Any]) -> None:
    graph = chain(sizes)
    made = choose(graph, random_scores(graph, seed), 0.0, **how)
    assert made.keep == {}
    assert made.reached
    assert made.removed == 0


@settings(deadline=None)
@given(sizes=SIZES, seed=SEEDS, sparsity=SPARSITIES)
def test_local_takes_the_same_share_of_every_group(sizes: list[int], seed: int, sparsity: float) -> None:
    graph = chain(sizes)
    made = choose(graph, random_scores(graph, seed), sparsity, allocate="uniform", floor=0.0)
    gone = {name: graph[name].size - left for name, left in widths(graph, made).items()}
    # Some share, times the size, is within half a channel of what went; only "one always stays" comes before it.
    least = [Fraction(2 * n - 1, 2 * graph[name].size) for name, n in gone.items()]
    most = [Fraction(2 * n + 1, 2 * graph[name].size) for name, n in gone.items() if n < graph[name].size - 1]
    assert not most or max(least) <= min(most)


@settings(deadline=None)
@given(sizes=SIZES, seed=SEEDS, sparsity=SPARSITIES, factor=st.sampled_from([2.0**-20, 2.0**20]))
def test_the_scale_of_a_groups_scores_does_not_matter(
    sizes: list[int], seed: int, sparsity: float, factor: float
) -> None:
    graph = chain(sizes)
    scores = random_scores(graph, seed)
    scaled = scores | {"0": scores["0"] * factor}
    assert widths(graph, choose(graph, scaled, sparsity)) == widths(graph, choose(graph, scores, sparsity))


# -- the queue, on examples that can be checked by hand


def test_global_compares_normalised_scores_of_all_groups() -> None:
    graph = chain([4, 4])
    scores = {"0": torch.tensor([1.0, 2.0, 3.0, 4.0]), "1": torch.tensor([100.0, 900.0, 900.0, 900.0])}
    # By their means 2.5 and 700: 0.4, 0.8, 1.2, 1.6 and 0.14, 1.29, 1.29, 1.29.
    made = choose(graph, scores, 0.5, "channels")
    assert {name: keep.tolist() for name, keep in made.keep.items()} == {"0": [3], "1": [1, 2, 3]}


def test_without_normalising_the_values_count() -> None:
    graph = chain([4, 4])
    scores = {"0": torch.tensor([1.0, 2.0, 3.0, 4.0]), "1": torch.tensor([9.0, 9.0, 2.5, 3.5])}
    made = choose(graph, scores, 0.5, "channels", normalise=False)
    assert {name: keep.tolist() for name, keep in made.keep.items()} == {"0": [3], "1": [0, 1, 3]}


def test_signed_scores_are_normalised_by_their_magnitude() -> None:
    graph = chain([4, 4])
    # By 2.5 and 1: -1.6, 0.8, 0.8, 0.8 and 1, 1, 1, 1. One channel of a group always stays.
    made = choose(graph, {"0": torch.tensor([-4.0, 2.0, 2.0, 2.0]), "1": torch.ones(4)}, 0.5, "channels")
    assert {name: keep.tolist() for name, keep in made.keep.items()} == {"0": [3], "1": [1, 2, 3]}


def test_ties_go_by_group_and_then_by_position() -> None:
    graph = chain([3, 3])
    equal = {"0": torch.zeros(3), "1": torch.zeros(3)}
    made = choose(graph, equal, 0.5, "channels")
    assert {name: keep.tolist() for name, keep in made.keep.items()} == {"0": [2], "1": [1, 2]}


def test_the_asked_share_is_taken_as_typed() -> None:
    # In floats 0.55 * 100 is a little more than 55, which would cost another channel.
    assert Budget(0.55).goal(100) == 45
    graph = chain([100])
    made = choose(graph, random_scores(graph, 0), 0.55, "channels")
    assert (made.after, made.reached) == (45, True)


@pytest.mark.parametrize(
    ("size", "round_to", "expected"),
    [
        (20, 8, {20: 20, 19: 20, 18: 20, 17: 16, 13: 16, 12: 16, 11: 8, 3: 8}),
        (16, 8, {16: 16, 12: 16, 11: 8, 5: 8}),
        (8, 8, {8: 8, 2: 8}),
        (5, 8, {5: 5, 2: 5}),
        (7, 3, {7: 7, 6: 6, 5: 6, 4: 3, 2: 3}),
    ],
)
def test_kept_counts_are_the_nearest_that_are_allowed(size: int, round_to: int, expected: dict[int, int]) -> None:
    allowed = {size} | {n for n in range(1, size + 1) if n % round_to == 0 and n >= 0.1 * size}
    of_group = Widths.for_groups([Group("0", size, ())], SelectionOptions(round_to=round_to), 0.1, {})
    for count in range(1, size + 1):
        nearest = min(allowed, key=lambda n: (abs(n - count), -n))
        assert of_group.nearest(np.array([count])).tolist() == [nearest]
        assert expected.get(count, nearest) == nearest


# -- what stands in the way, and what is refused


def test_an_unreachable_budget_removes_what_it_can_and_says_why() -> None:
    inputs, outputs = Frozen("first.weight", 1, "model input", 3), Frozen("head.weight", 0, "model output", 5)
    graph = chain([20, 40, 6], frozen=(inputs, outputs))
    scores = random_scores(graph, 0)
    del scores["0"]
    made = choose(graph, scores, 0.95, round_to=8)
    assert widths(graph, made) == {"0": 20, "1": 8, "2": 6}
    assert not made.reached
    assert made.removed == 1 - chain_params([20, 8, 6]) / chain_params([20, 40, 6])
    assert made.blocked == (
        "groups at their floor (10% of the channels, in multiples of 8): '1' keeps 8 of 40, '2' keeps 6 of 6",
        "groups without scores, which stay whole: '0' (20 channels)",
        "5 of 1,135 params belong to no group",
        "frozen: 'head.weight': model output, 'first.weight': model input",
    )


@pytest.mark.parametrize(("whole", "width"), [(None, 2), ({"0": 80}, 8), ({"0": 300}, 20), ({"1": 80}, 2)])
def test_the_floor_is_a_share_of_the_width_before_earlier_cuts(whole: dict[str, int] | None, width: int) -> None:
    graph = chain([20])
    made = choose(graph, random_scores(graph, 0), 0.99, whole=whole)
    assert widths(graph, made) == {"0": width}


def test_many_blockers_are_counted_not_listed() -> None:
    graph = chain([4] * 8)
    (floor, *_) = choose(graph, random_scores(graph, 0), 0.99, "channels", floor=0.5).blocked
    assert floor.startswith("groups at their floor (50% of the channels): '")
    assert floor.count("keeps 2 of 4") == 5
    assert floor.endswith(", and 3 more")


def test_a_graph_without_groups_can_lose_nothing() -> None:
    made = choose(chain([]), {}, 0.5)
    assert (made.keep, made.reached, made.removed) == ({}, False, 0.0)
    assert made.blocked == ("20 of 20 params belong to no group",)
    assert choose(chain([]), {}, 0.5, "channels").removed == 0.0


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 60.0, float("nan")])
def test_a_sparsity_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(RangeError, match=rf"^sparsity = {sparsity} is out of range: give sparsity in \[0, 1\)$"):
        Budget(sparsity)


def test_settings_out_of_range_and_unknown_names_are_refused() -> None:
    graph = chain([4])
    scores = random_scores(graph, 0)
    with pytest.raises(UnknownNameError, match="unknown measure 'flops'"):
        Budget(0.5, "flops")
    with pytest.raises(UnknownNameError, match="unknown allocation 'globl': did you mean 'global'"):
        choose(graph, scores, 0.5, allocate="globl")
    with pytest.raises(UnknownNameError, match="unknown group '00': did you mean '0'"):
        choose(graph, {"00": scores["0"]}, 0.5)
    with pytest.raises(RangeError, match="round_to = 0 is out of range"):
        choose(graph, scores, 0.5, round_to=0)
    with pytest.raises(RangeError, match=r"floor = 1.0 is out of range: give floor in \[0, 1\)"):
        choose(graph, scores, 0.5, floor=1.0)


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (torch.zeros(3), r"their shape is \(3,\)"),
        (torch.zeros(4, 1), r"their shape is \(4, 1\)"),
        (torch.tensor([1.0, float("nan"), float("inf"), 0.0]), "2 of them are not finite"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused(scores: Tensor, reason: str) -> None:
    with pytest.raises(ScoreError, match=rf"group '0': {reason}; a criterion gives \(4,\) finite numbers for it"):
        choose(chain([4]), {"0": scores}, 0.5)


def test_left_open_large_groups_end_with_multiples_of_eight_and_small_ones_with_any_number() -> None:
    graph = chain([128, 64, 63, 20])
    scores = random_scores(graph, 0)
    left = widths(graph, choose(graph, scores, 0.37, allocate="uniform", round_to=None))
    assert [left[name] % 8 for name in ("0", "1")] == [0, 0]
    assert [left[name] for name in ("2", "3")] == [51, 16]
    # A group keeps its step however narrow earlier cuts made it.
    narrow = chain([40, 20])
    left = widths(narrow, choose(narrow, random_scores(narrow, 0), 0.3, round_to=None, whole={"0": 64, "1": 63}))
    assert left["0"] % 8 == 0
