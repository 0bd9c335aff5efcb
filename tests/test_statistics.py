"""The statistics of relevance against their oracles: enumeration, normal theory, and the laws of section 5."""

from __future__ import annotations

import doctest
import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from compressor.errors import RangeError
from compressor.relevance.draws import independent_draws, strata, stratified_draws, subsample_blocks
from compressor.relevance.statistics import (
    ControlVariate,
    Increment,
    RunningMean,
    best_factor,
    confidence,
    corrected_effect,
    finite_effect,
    half_squared_gradient,
    loss_contrast,
    rank_correlation,
    required_samples,
)

double = {"dtype": torch.float64}


@pytest.mark.parametrize("module", ["draws", "statistics"])
def test_the_worked_examples_are_right(module: str) -> None:
    tried = doctest.testmod(importlib.import_module(f"compressor.relevance.{module}"))
    assert tried.attempted >= 4
    assert tried.failed == 0


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- who is drawn


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(2, 10), st.integers(0, 99))
def test_strata_split_every_group_evenly(sizes: list[int], count: int, seed: int) -> None:
    group_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    first, second = strata(group_of, count, 2, generator(seed))
    assert len(group_of) < 20 or not torch.equal(first, second)
    for group, size in enumerate(sizes):
        shares = torch.bincount(first[group_of == group], minlength=count)
        assert int(shares.sum()) == size
        assert int(shares.max() - shares.min()) <= 1


def test_a_block_of_samples_draws_every_channel_once() -> None:
    draw = stratified_draws(torch.zeros(11, dtype=torch.int64), 4, 10, generator())
    assert draw.shape == (10, 11)
    assert draw[:4].sum(0).tolist() == [1] * 11
    assert draw[4:8].sum(0).tolist() == [1] * 11
    assert int(draw[8:].sum(0).max()) <= 1


def test_every_channel_is_drawn_equally_often() -> None:
    """Also where neither the channels nor the samples can be dealt out evenly."""
    dice, times = generator(), torch.zeros(5)
    for _ in range(2000):
        times += stratified_draws(torch.zeros(5, dtype=torch.int64), 3, 1, dice)[0]
    assert times / 2000 == pytest.approx(torch.full((5,), 1 / 3), abs=0.04)


def test_other_channels_are_drawn_along_in_every_block() -> None:
    """No two channels go together throughout a batch: in one block as by chance, not in all blocks or none."""
    draw = stratified_draws(torch.zeros(40, dtype=torch.int64), 4, 400, generator()).double()
    together = (draw.T @ draw / 100).fill_diagonal_(0.25)
    assert float(together.max()) < 0.45
    assert float(together.min()) > 0.05


def test_independent_draws_take_every_channel_once_a_block_whatever_the_others_do() -> None:
    draw = independent_draws(torch.zeros(40, dtype=torch.int64), 4, 4000, generator())
    assert draw[:4].sum(0).tolist() == [1] * 40
    assert draw.sum(0).tolist() == [1000] * 40
    alike = torch.corrcoef(draw.T.double()).fill_diagonal_(0.0)
    assert float(alike.abs().max()) < 0.08
    stratified = torch.corrcoef(stratified_draws(torch.zeros(8, dtype=torch.int64), 4, 4000, generator()).T.double())
    assert float(stratified.fill_diagonal_(0.0).sum(0).mean()) == pytest.approx(-1.0, abs=0.01)  # one in, one out


def test_subsampled_channels_sit_out_whole_blocks() -> None:
    draw = stratified_draws(torch.zeros(6, dtype=torch.int64), 4, 4000, generator())
    rate = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.25, 0.0])
    less = subsample_blocks(draw, 4, rate, generator())
    assert not bool((less & ~draw).any())
    assert torch.equal(less[:, :3], draw[:, :3])
    assert less.sum(0) / 1000 == pytest.approx(rate, abs=0.05)
    assert subsample_blocks(draw, 4, torch.ones(6), generator()) is draw


# -- what one step says


def test_contrast_is_the_difference_of_the_two_means() -> None:
    losses, out = torch.randn(40, **double), torch.rand(40, 6) < 0.3
    increment = loss_contrast(losses, 1 - out.double())
    for channel in range(6):
        expected = losses[out[:, channel]].mean() - losses[~out[:, channel]].mean()
        assert float(increment.totals[channel] / increment.weights[channel]) == pytest.approx(float(expected))


def test_contrast_is_the_regression_slope_for_gates_between_0_and_1() -> None:
    losses, gates = torch.randn(40, **double), torch.rand(40, 1, **double)
    increment = loss_contrast(losses, gates)
    slope = stats.linregress(gates[:, 0].numpy(), losses.numpy()).slope
    assert float(increment.totals / increment.weights) == pytest.approx(-slope)


def test_contrast_does_not_see_the_level_of_the_losses() -> None:
    losses, gates = torch.randn(16, **double), (torch.rand(16, 3) < 0.5).double()
    assert loss_contrast(losses + 100, gates).totals == pytest.approx(loss_contrast(losses, gates).totals)


def test_finite_effect_averages_over_the_samples_that_drew() -> None:
    gradients, draw = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[True, False], [True, False]])
    increment = finite_effect(gradients, draw)
    assert increment.totals.tolist() == [-4.0, 0.0]
    assert increment.weights.tolist() == [2.0, 0.0]


def test_half_squared_gradient_is_half_the_mean_square() -> None:
    increment = half_squared_gradient(torch.tensor([[1.0, -2.0], [3.0, 2.0]]))
    assert (increment.totals / increment.weights).tolist() == [2.5, 2.0]


def test_signed_dummies_have_no_mean_and_the_increments_size() -> None:
    dummies = Increment(torch.tensor([1.0, -3.0]), torch.ones(2)).with_random_signs(10, generator())
    assert dummies.totals.shape == (10, 2)
    assert dummies.totals.sum(0).tolist() == [0.0, 0.0]
    assert dummies.totals.abs().tolist() == [[1.0, 3.0]] * 10


def uniform_draws(channels: int, batch: int, dice: torch.Generator) -> torch.Tensor:
    draw = independent_draws(torch.zeros(channels, dtype=torch.int64), 4, batch, dice)
    return torch.where(draw, torch.rand(batch, channels, generator=dice, **double), 1.0)


def bent(gates: torch.Tensor, dice: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses `sum_j k_i (1 - u_ij)^2 + noise`, with a factor `k` of each sample's own, and their gradients."""
    own = 1 + torch.randn(len(gates), 1, generator=dice, **double)
    losses = (own * (1 - gates).square()).sum(1) + 0.1 * torch.randn(len(gates), generator=dice, **double)
    return losses, -2 * own * (1 - gates)


def test_the_correction_has_no_bias_and_its_best_factor_leaves_least_variance() -> None:
    """Over factors on a grid the variance is least at the one that `best_factor` gives, and the mean is the same."""
    dice, grid = generator(), [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
    found, totals, weights = {factor: [] for factor in grid}, 0.0, 0.0
    for _ in range(3000):
        gates = uniform_draws(3, 32, dice)
        losses, gradients = bent(gates, dice)
        for factor in grid:
            found[factor].append(corrected_effect(losses, gradients, gates, torch.full((3,), factor, **double)).mean())
        best = best_factor(losses, gradients, gates)
        totals, weights = totals + best.totals, weights + best.weights
    runs = {factor: torch.stack(each) for factor, each in found.items()}
    for each in runs.values():
        assert float(((each.mean(0) - 1.0) / each.std(0)).abs().max()) * math.sqrt(3000) < 4
    variances = torch.stack([runs[factor].var(0) for factor in grid]).mean(1)
    parabola = torch.linalg.lstsq(torch.vander(torch.tensor(grid, **double), 3), variances).solution
    assert float((totals / weights).mean()) == pytest.approx(float(-parabola[1] / 2 / parabola[0]), abs=0.1)
    assert float(variances.min() / variances[grid.index(0.0)]) < 0.9


def test_without_a_factor_the_correction_is_none() -> None:
    gates = uniform_draws(5, 40, generator())
    losses, gradients = bent(gates, generator())
    corrected = corrected_effect(losses, gradients, gates, torch.zeros(5, **double))
    assert corrected.mean().tolist() == finite_effect(gradients, gates < 1).mean().tolist()


@pytest.mark.parametrize("drawing", [0, 1])
def test_a_channel_that_all_samples_or_none_drew_is_not_corrected(drawing: int) -> None:
    gates = torch.full((6, 1), 1.0 - 0.5 * drawing, **double)
    corrected = corrected_effect(torch.randn(6, **double), torch.ones(6, 1, **double), gates, torch.ones(1, **double))
    assert corrected.mean().tolist() == [-1.0 * drawing]
    best = best_factor(torch.randn(6, **double), torch.ones(6, 1, **double), gates)
    assert best.totals.isfinite().all()


def test_a_control_variate_keeps_the_contrast_and_takes_the_variance() -> None:
    """Where nine tenths of a loss are the sample's own, a tenth of the variance is left."""
    dice, control, found = generator(), ControlVariate(), []
    for _ in range(400):
        known, out = 3 * torch.randn(64, generator=dice), torch.rand(64, 1, generator=dice) < 0.3
        losses = 5 + 2 * known + out[:, 0] * 1.0 + 2 * torch.randn(64, generator=dice)
        reduced, left = control.reduce(losses, known)
        found.append((loss_contrast(reduced, 1 - out.float()).mean(), loss_contrast(losses, 1 - out.float()).mean()))
    with_, without = torch.tensor(found)[10:].T
    assert float(with_.mean()) == pytest.approx(1.0, abs=0.1)
    assert float(with_.var() / without.var()) == pytest.approx(0.1, abs=0.03)
    assert float(left) == pytest.approx(4.2 / 40.2, rel=0.1)
    assert float(control.slope.mean()) == pytest.approx(2.0, abs=0.02)


def test_the_first_control_variate_changes_nothing() -> None:
    """What it is to be multiplied with is not known yet, and must not come from the same losses."""
    losses = torch.randn(8)
    reduced, left = ControlVariate().reduce(losses, torch.randn(8))
    assert torch.equal(reduced, losses)
    assert float(left) == 1.0


# -- running means


def test_running_mean_forgets_by_half_in_a_half_life() -> None:
    mean = RunningMean(1)
    decay = 0.5 ** (1 / 4)
    for step in range(400):
        mean.add(step, Increment(torch.zeros(1), torch.ones(1)), decay)
    for step in range(4):
        mean.add(step, Increment(torch.ones(1), torch.ones(1)), decay)
    assert float(mean.mean()) == pytest.approx(0.5)


def test_running_mean_weighs_and_interleaves() -> None:
    mean = RunningMean(2, parts=2)
    assert mean.mean().tolist() == [0.0, 0.0]
    mean.add(0, Increment(torch.tensor([4.0, 0.0]), torch.tensor([2.0, 0.0])))
    mean.add(1, Increment(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])))
    assert mean.halves().tolist() == [[2.0, 0.0], [1.0, 0.0]]
    assert mean.mean().tolist() == [pytest.approx(5 / 3), 0.0]


def test_running_mean_leaves_out_what_is_not_finite() -> None:
    mean = RunningMean(2)
    mean.add(0, Increment(torch.tensor([2.0, math.nan]), torch.ones(2)))
    mean.add(1, Increment(torch.tensor([math.inf, 3.0]), torch.ones(2)))
    assert mean.mean().tolist() == [2.0, 3.0]


def test_running_mean_narrows_and_resumes() -> None:
    mean, other = RunningMean(3, parts=2), RunningMean(2, parts=2)
    mean.add(0, Increment(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)))
    mean.narrow(torch.tensor([2, 0]))
    other.load_state_dict(mean.state_dict())
    assert other.mean().tolist() == [3.0, 1.0]
    other.add(2, Increment(torch.ones(2), torch.ones(2)))
    assert mean.mean().tolist() == [3.0, 1.0]


# -- the test


def test_confidence_is_the_sources_formula() -> None:
    relevance, dummies = torch.randn(5, **double), torch.randn(30, 5, **double)
    expected = stats.norm.cdf((relevance - dummies.mean(0)).numpy() / dummies.numpy().std(0, ddof=1))
    assert confidence(relevance, dummies).tolist() == pytest.approx(expected.tolist())


def test_confidence_of_channels_that_never_differ_say_nothing() -> None:
    assert confidence(torch.tensor([0.0, 1.0, -1.0]), torch.zeros(10, 1)).tolist() == [0.5, 1.0, 0.0]


def observed(steps: int, count: int, loss_of, channels: int = 100, dummies: int = 100, batch: int = 70, seed: int = 0):
    """Relevance `(C,)` and dummies `(D,)` of one group under hard exclusion, with losses from `loss_of(step, draw)`."""
    dice, mean = generator(seed), RunningMean(channels + dummies)
    group_of = torch.zeros(channels + dummies, dtype=torch.int64)
    for step in range(steps):
        draw = stratified_draws(group_of, count, batch, dice)
        losses = loss_of(step, draw) + torch.randn(batch, generator=dice)
        mean.add(step, loss_contrast(losses, 1 - draw.float()))
    return mean.mean()[:channels], mean.mean()[channels:]


@pytest.mark.parametrize("count", [10, 3, 2])
def test_null_calibration_with_drawn_dummies(count: int) -> None:
    """Channels without effect pass at a confidence of 0.99 in 0.5 % to 2 % of cases, whatever share is drawn."""
    passed = [
        (confidence(r, q.unsqueeze(1)) > 0.99).float().mean().item()
        for r, q in (observed(12, count, lambda step, draw: 0.0, seed=seed) for seed in range(60))
    ]
    assert 0.005 < sum(passed) / len(passed) < 0.02


def test_null_calibration_with_signed_dummies() -> None:
    """The same for channels of very unequal scale, each of which is its own dummy."""
    dice, passed = generator(), []
    scale = torch.logspace(-3, 3, 2000)
    for _ in range(5):
        mean, dummies = RunningMean(2000), RunningMean(100, 2000)
        for step in range(30):
            increment = Increment(scale * torch.randn(2000, generator=dice), torch.ones(2000))
            mean.add(step, increment)
            dummies.add(step, increment.with_random_signs(100, dice))
        passed.append((confidence(mean.mean(), dummies.mean()) > 0.99).float().mean().item())
    assert 0.005 < sum(passed) / len(passed) < 0.02


@pytest.mark.parametrize("count", [7, 2])
def test_planted_effect_is_seen_as_strongly_as_theory_says(count: int) -> None:
    """Mean z = sqrt(p (1 - p)) g sqrt(N / V) within 10 %; a harmful channel is as far below as a useful one above."""
    effect, steps, batch, p = 0.5, 20, 70, 1 / count
    z = torch.zeros(2)
    for seed in range(60):
        r, q = observed(steps, count, lambda step, draw: effect * (draw[:, 0].float() - draw[:, 1].float()), seed=seed)
        z += (r[:2] - q.mean()) / q.std() / 60
    variance = 1 + 2 * effect**2 * p * (1 - p)
    expected = math.sqrt(p * (1 - p)) * effect * math.sqrt(steps * batch / variance)
    assert z.tolist() == pytest.approx([expected, -expected], rel=0.1)


def test_a_falling_loss_changes_nothing() -> None:
    """A loss that falls by five deviations within the window leaves the statistics as they are."""
    flat = observed(20, 7, lambda step, draw: 0.3 * draw[:, 0].float())
    falling = observed(20, 7, lambda step, draw: 0.3 * draw[:, 0].float() - 5 * step / 20)
    assert falling[0] == pytest.approx(flat[0], abs=1e-4)
    assert falling[1] == pytest.approx(flat[1], abs=1e-4)


def test_dummies_take_away_the_shift_that_subsets_of_fixed_size_bring() -> None:
    """Where all channels are equally useful, the contrast among them is 0; against dummies their use shows."""
    r, q = observed(200, 2, lambda step, draw: 0.1 * draw[:, :100].float().sum(1))
    assert float(r.mean()) < 0.06
    assert float(r.mean() - q.mean()) == pytest.approx(0.1, rel=0.15)


# -- reliability and samples


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12), st.integers(0, 99))
def test_rank_correlation_is_spearmans(values: list[int], seed: int) -> None:
    """Ranks by counting: who is below, and half of those who are level."""
    first = torch.tensor(values, **double)
    second = first[torch.randperm(len(values), generator=generator(seed))]
    ranks = [
        (each[:, None] > each).double().sum(1) + (each[:, None] == each).double().sum(1) / 2 for each in (first, second)
    ]
    expected = float(torch.corrcoef(torch.stack(ranks))[0, 1]) if len(set(values)) > 1 else 0.0
    assert rank_correlation(first, second) == pytest.approx(expected, abs=1e-12)


def test_a_constant_ranking_agrees_with_nothing() -> None:
    assert rank_correlation(torch.ones(5), torch.arange(5.0)) == 0.0
    assert rank_correlation(torch.arange(5.0), torch.zeros(5)) == 0.0
    assert rank_correlation(torch.ones(1), torch.ones(1)) == 0.0


def test_needed_samples_gives_the_power_that_it_promises() -> None:
    assert required_samples(0.1, 1.0, 0.5, 2.0, 1.0) == 3600
    n = required_samples(0.5, 1.25, 1 / 7, stats.norm.ppf(0.99), stats.norm.ppf(0.8))
    shift = math.sqrt(1 / 7 * 6 / 7) * 0.5 * math.sqrt(n / 1.25)
    assert stats.norm.sf(stats.norm.ppf(0.99) - shift) == pytest.approx(0.8, abs=0.002)


@pytest.mark.parametrize(
    ("effect", "p", "message"),
    [
        (0.0, 0.5, r"effect = 0\.0 is out of range: give effect in \(0, inf\)"),
        (1.0, 1.0, r"p = 1\.0 is out of range: give p in \(0, 1\)"),
    ],
)
def test_needed_samples_refuses(effect: float, p: float, message: str) -> None:
    with pytest.raises(RangeError, match=message):
        required_samples(effect, 1.0, p, 2.0, 1.0)
