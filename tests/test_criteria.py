"""Criteria: against plain loops that compute the same, and by laws that hold for any weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.criteria import CRITERIA, Snapshot, bn_scale, euclidean, geometric_median, l1, l2, lookup, score, taylor
from compressor.criteria.random import random
from compressor.errors import ScoreError, UnknownNameError
from compressor.graph import Group, Member, Role, trace

CHANNELS = 6


def member(tensor: str, dim: int, role: Role, offset: int = 0, wide: int = 1, channels: int = CHANNELS) -> Member:
    """A member whose channel c owns `wide` positions in a row, from `offset` on."""
    return Member(tensor, dim, offset + torch.arange(channels * wide).reshape(channels, wide), role)


def residual_group() -> tuple[Group, dict[str, Tensor]]:
    """Two producers (one behind an offset), a BatchNorm, a convolution and a Linear behind a flatten (K = 4)."""
    values = {
        "stem.weight": torch.randn(CHANNELS, 3, 3, 3),
        "stem.bias": torch.randn(CHANNELS),
        "norm.weight": torch.randn(CHANNELS),
        "norm.bias": torch.randn(CHANNELS),
        "norm.running_var": torch.rand(CHANNELS),
        "block.weight": torch.randn(2 + CHANNELS, 5, 1, 1),
        "next.weight": torch.randn(7, CHANNELS, 3, 3),
        "head.weight": torch.randn(4, CHANNELS * 4),
    }
    members = (
        member("stem.weight", 0, "producer"),
        member("stem.bias", 0, "follower"),
        member("norm.weight", 0, "follower"),
        member("norm.bias", 0, "follower"),
        member("norm.running_var", 0, "follower"),
        member("block.weight", 0, "producer", offset=2),
        member("next.weight", 1, "consumer"),
        member("head.weight", 1, "consumer", wide=4),
    )
    return Group("stem", CHANNELS, members), values


def snapshot_of(values: dict[str, Tensor], seed: int = 0) -> Snapshot:
    """Values with gradients that belong to nothing, and a generator."""
    gradients = {name: torch.cos(7 * value) for name, value in values.items()}
    return Snapshot(values, gradients, torch.Generator().manual_seed(seed))


def filters(rows: Tensor) -> tuple[Group, Snapshot]:
    """A group with a single producer whose rows these are."""
    return Group("conv", len(rows), (member("conv.weight", 0, "producer", channels=len(rows)),)), Snapshot(
        {"conv.weight": rows}
    )


def producers(values: dict[str, Tensor]) -> list[list[float]]:
    stem, block = values["stem.weight"], values["block.weight"]
    return [stem[c].flatten().tolist() + block[2 + c].flatten().tolist() for c in range(CHANNELS)]


# -- oracles


def test_l1_and_l2_are_sums_over_all_producers_of_a_channel() -> None:
    group, values = residual_group()
    rows = producers(values)
    absolute = torch.tensor([sum(abs(x) for x in row) for row in rows])
    torch.testing.assert_close(l1(group, Snapshot(values)), absolute)
    torch.testing.assert_close(l2(group, Snapshot(values)), torch.tensor([math.hypot(*row) for row in rows]))


def test_geometric_median_is_the_sum_of_distances_to_all_others() -> None:
    group, values = residual_group()
    rows = producers(values)
    torch.testing.assert_close(
        geometric_median(group, Snapshot(values)),
        torch.tensor([sum(math.dist(row, other) for other in rows) for row in rows]),
    )


def slow_euclidean(rows: list[list[float]]) -> list[float]:
    """The definition, word by word: look at all pairs that stay, again and again."""
    norms = [math.hypot(*row) for row in rows]
    stay, scores = list(range(len(rows))), [0.0] * len(rows)
    gap = 0.0
    while len(stay) > 1:
        gap, a, b = min((math.dist(rows[a], rows[b]), a, b) for a in stay for b in stay if a < b)
        loser = a if norms[a] < norms[b] else b
        scores[loser] = gap
        stay.remove(loser)
    scores[stay[0]] = gap + norms[stay[0]]
    return scores


def hangs_on_a_last_digit(rows: Tensor, expected: Tensor) -> bool:
    """Return whether two pairs are so equally close that rounding decides which is paired off first, and all else."""
    for step in (1e-6, -1e-6, 3e-6, -3e-6):
        moved = rows + step * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0), dtype=rows.dtype)
        if not torch.allclose(torch.tensor(slow_euclidean(moved.tolist())), expected, rtol=1e-4, atol=1e-4):
            return True
    return False


@settings(deadline=None)
@example(channels=35, values=1, seed=904)
@given(channels=st.integers(1, 40), values=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_euclidean_equals_the_search_of_all_pairs(channels: int, values: int, seed: int) -> None:
    rows = torch.randn(channels, values, generator=torch.Generator().manual_seed(seed)).double()
    expected = torch.tensor(slow_euclidean(rows.tolist()))
    assume(not hangs_on_a_last_digit(rows, expected))
    torch.testing.assert_close(euclidean(*filters(rows)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [2, 5, 30, 200])
def test_euclidean_gives_zero_to_exactly_one_of_two_equal_filters(channels: int) -> None:
    rows = 1 + torch.randn(channels, 50)
    rows[channels - 1] = rows[0]
    scores = euclidean(*filters(rows))
    assert (scores == 0).nonzero().flatten().tolist() == [channels - 1]


def test_euclidean_lets_the_smaller_filter_of_the_closest_pair_go() -> None:
    rows = torch.tensor([[10.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    # 2 and 3 are closest, and 2 is the smaller; then 3 and 10; then 10 is alone.
    assert euclidean(*filters(rows)).tolist() == [17.0, 7.0, 1.0]


def test_bn_scale_is_the_mean_magnitude_of_the_batchnorm_scales_alone() -> None:
    group, values = residual_group()
    assert torch.equal(bn_scale(group, Snapshot(values)), values["norm.weight"].abs())
    twice = values | {"late.weight": torch.full((CHANNELS,), -3.0), "late.running_var": torch.ones(CHANNELS)}
    late = Group("stem", CHANNELS, (*group.members, member("late.weight", 0, "follower")))
    torch.testing.assert_close(bn_scale(late, Snapshot(twice)), (values["norm.weight"].abs() + 3) / 2)


def test_a_batchnorm_that_is_the_model_itself_has_a_scale() -> None:
    group = Group("", 2, (member("weight", 0, "follower", channels=2),))
    assert bn_scale(group, Snapshot({"weight": torch.tensor([1.0, -2.0]), "running_var": torch.ones(2)})).tolist() == [
        1.0,
        2.0,
    ]


class Watched(nn.Module):
    """A convolution, BatchNorm in training mode, and a consumer of each kind; keeps what the consumers see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS)
        self.next = nn.Conv2d(CHANNELS, 4, 3, bias=False)
        self.head, self.tail = nn.Linear(4 * 4, 5), nn.Linear(CHANNELS * 16, 5)
        self.seen = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = F.relu(self.norm(self.conv(x)))
        self.seen.retain_grad()
        return self.head(self.next(self.seen).flatten(1)) + self.tail(self.seen.flatten(1))


def test_taylor_is_the_squared_effect_of_the_activation_on_the_loss() -> None:
    model, x, y = Watched(), torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 3])
    F.cross_entropy(model(x), y).backward()
    assert model.seen.grad is not None
    effect = (model.seen * model.seen.grad).sum(dim=(0, 2, 3))
    members = (
        member("conv.weight", 0, "producer"),
        member("next.weight", 1, "consumer"),
        member("tail.weight", 1, "consumer", wide=16),
    )
    scores = taylor(Group("conv", CHANNELS, members), Snapshot.from_model(model))
    torch.testing.assert_close(scores, effect.square().detach(), rtol=1e-3, atol=1e-8)


def test_taylor_judges_a_group_that_nobody_consumes_by_its_producers() -> None:
    weight, gradient = torch.randn(CHANNELS, 3), torch.randn(CHANNELS, 3)
    group = Group("query", CHANNELS, (member("query.weight", 0, "producer"),))
    scores = taylor(group, Snapshot({"query.weight": weight}, {"query.weight": gradient}))
    torch.testing.assert_close(scores, (weight * gradient).sum(dim=1) ** 2)


# -- laws, for every criterion


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_gives_one_finite_float_a_channel_and_changes_nothing(name: str) -> None:
    group, values = residual_group()
    before = {tensor: value.clone() for tensor, value in values.items()}
    state = torch.get_rng_state()
    scores = CRITERIA[name](group, snapshot_of(values))
    assert scores.shape == (CHANNELS,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert all(torch.equal(values[tensor], value) for tensor, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"random"}))
@settings(deadline=None)
@given(order=st.permutations(range(CHANNELS)))
def test_permuting_channels_permutes_scores(name: str, order: list[int]) -> None:
    torch.manual_seed(0)
    group, values = residual_group()
    to_device = tuple(Member(each.tensor, each.dim, each.positions[order], each.role) for each in group.members)
    scores = CRITERIA[name](group, snapshot_of(values))
    permuted = CRITERIA[name](Group("stem", CHANNELS, to_device), snapshot_of(values))
    torch.testing.assert_close(permuted, scores[order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["l1", "l2", "euclidean", "geometric_median", "bn_scale"])
@pytest.mark.parametrize("factor", [-2.0, 0.0, 0.25])
def test_scores_scale_with_the_weights(name: str, factor: float) -> None:
    group, values = residual_group()
    scaled = {tensor: value * factor for tensor, value in values.items()}
    expected = CRITERIA[name](group, Snapshot(values)) * abs(factor)
    torch.testing.assert_close(CRITERIA[name](group, Snapshot(scaled)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"random", "bn_scale", "taylor"}))
def test_half_precision_and_a_single_channel_are_scored(name: str) -> None:
    scores = CRITERIA[name](*filters(torch.ones(1, 9, dtype=torch.bfloat16)))
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


def test_random_follows_the_snapshots_generator() -> None:
    group, values = residual_group()
    first, again = (random(group, snapshot_of(values, seed=1)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, random(group, snapshot_of(values, seed=2)))


# -- names, and groups that cannot be judged


def test_a_name_and_a_function_both_work() -> None:
    def mine(group: Group, snapshot: Snapshot) -> Tensor:
        return torch.arange(group.size).float()

    group, values = residual_group()
    assert lookup("l1") is l1
    assert lookup(mine) is mine
    assert score(mine, [group], Snapshot(values))["stem"].tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(score("l1", [group], Snapshot(values))["stem"], l1(group, Snapshot(values)))


def test_an_unknown_criterion_says_what_is_close() -> None:
    with pytest.raises(UnknownNameError, match="unknown criterion 'euclid': did you mean 'euclidean'"):
        lookup("euclid")


def test_groups_that_a_criterion_cannot_judge_are_left_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 4, 6), nn.Linear(6, 2))
    graph = trace(model, torch.randn(2, 3, 4, 4))
    assert set(score("l1", graph.groups, Snapshot.from_model(model))) == {"0", "3"}
    assert set(score("bn_scale", graph.groups, Snapshot.from_model(model))) == {"0"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "bn_scale",
            "no usable scores for group 'conv': bn_scale needs a BatchNorm scale, and its channels pass none; "
            "use another criterion, l1 say",
        ),
        (
            "taylor",
            "no usable scores for group 'conv': taylor needs gradients, and 'conv.weight' has none; "
            "run backward on some batches before scoring, or use another criterion, l1 say",
        ),
        (
            "random",
            "no usable scores for group 'conv': random needs a generator, and the snapshot has none; "
            "pass Snapshot.from_model(model, generator=torch.Generator().manual_seed(0))",
        ),
    ],
)
def test_a_criterion_that_can_judge_no_group_says_why(name: str, message: str) -> None:
    group, snapshot = filters(torch.randn(3, 4))
    with pytest.raises(ScoreError) as caught:
        score(name, [group], snapshot)
    assert str(caught.value) == message
    assert caught.value.group == "conv"


def test_taylor_refuses_a_group_without_weights() -> None:
    with pytest.raises(ScoreError, match="the group has no weights"):
        taylor(Group("norm", 2, (member("norm.bias", 0, "follower", channels=2),)), Snapshot({}))


def test_no_groups_have_no_scores() -> None:
    assert score("bn_scale", [], Snapshot({})) == {}
