"""The statistics of relevance: what one step says about a channel, and when to believe it.

Relevance is the loss that a channel saves, `E[loss | out] - E[loss | in]`: larger means keep. Everything here is a
function of plain tensors; no model is in sight.

Four samples and four channels; sample `i` draws channel `i`. The loss without channel 0 is higher than the others
(useful), without channel 1 lower (harmful), without 2 or 3 as usual:

    >>> losses = torch.tensor([2.0, 0.0, 1.0, 1.0])
    >>> draw = torch.eye(4, dtype=torch.bool)
    >>> B = loss_contrast(losses, 1 - draw.float()).mean()  # hard: gate 0; B_0 = 2 - (0 + 1 + 1) / 3
    >>> [round(each, 2) for each in B.tolist()]
    [1.33, -1.33, 0.0, 0.0]

Gate gradients `dl_i/du_ij` say more than four losses. Channel 2 helps one sample and harms another: its mean effect is
nothing, but it is not superfluous, and `Q` sees that. Channel 3 does nothing to any sample:

    >>> gradients = torch.tensor([[-2.0, 0, 1, 0], [-2, 1, -1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    >>> A = finite_effect(gradients, draw).mean()  # soft: minus the gradient of the sample that drew the channel
    >>> (A + 0).tolist()
    [2.0, -1.0, 0.0, 0.0]
    >>> Q = half_squared_gradient(gradients).mean()  # Q_0 = (4 + 4) / 4 / 2
    >>> Q.tolist()
    [1.0, 0.25, 0.25, 0.0]

Whether channel 0 is more relevant than chance, dummies tell; with three, of mean 0 and deviation 1, `Phi(2) = 0.98`:

    >>> round(float(confidence(A, torch.tensor([[-1.0], [0.0], [1.0]]))[0]), 2)
    0.98

Shape letters: B samples of a batch; N channels of all groups, side by side; G groups; D dummies of each group;
M columns of dummies: G where dummies are drawn beside the channels of a group, N where every channel has its own.

Source: Räsänen & Pohjalainen, Random subset feature selection (Interspeech 2013), for features of a classifier; Novikov
& Buryak (Moscow State University) for filters in training. Ours differs: the batch is the expectation, both sides of a
draw count, dummies share the draw, and old steps are forgotten.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from compressor.errors import RangeError

# -- what one step says


@dataclass(frozen=True, eq=False)
class Increment:
    """What one step adds to a running mean: `mean = sum(totals) / sum(weights)`, both of the same shape."""

    totals: Tensor
    weights: Tensor

    def with_random_signs(self, count: int, generator: torch.Generator | None = None) -> Increment:
        """Return the same with random signs, `(D, N)`: what `count` channels of no effect would have added."""
        device = self.totals.device
        # As many plus as minus. Independent coins would leave the mean of D dummies off zero by 1/sqrt(D) of their
        # spread, and every channel is compared with that mean.
        signs = torch.randperm(count, generator=generator, device=device).remainder(2).mul(2).sub(1).to(self.totals)
        return Increment(torch.outer(signs, self.totals), self.weights.expand(count, -1))

    def weighted(self, factor: Tensor) -> Increment:
        """Return the same mean with `factor` times the weight: one over its variance combines means best."""
        return Increment(self.totals * factor, self.weights * factor)

    def mean(self) -> Tensor:
        """Return what the step says by itself; 0 where it says nothing."""
        return _ratio(self.totals, self.weights)


def loss_contrast(losses: Tensor, gates: Tensor) -> Increment:
    """Return the loss above expectation while a channel is out, both sides counted, the batch being the expectation.

    `B_j = sum_i e_i (mean(u_j) - u_ij) / sum_i (u_ij - mean(u_j))^2` with `e_i = l_i - mean(l)`; for gates of 0 and 1
    that is the mean loss of the samples with `j` out minus that of the samples with `j` in.

    Args:
        losses: `(B,)`.
        gates: `(B, N)`.
    """
    out = gates.mean(0) - gates
    # NOTE: Centred within the batch, not against a running mean of the losses. That lags behind a loss that falls, and
    # whoever is drawn gets the lag as credit: the chance to see an effect fell from 18 % to 4 %.
    return Increment((losses - losses.mean()) @ out, out.square().sum(0))


def finite_effect(gradients: Tensor, draw: Tensor) -> Increment:
    """Return what the loss would rise by without a channel: `A_j`, the mean of `-dl_i/du_ij` over samples that drew it.

    With gates `u ~ U(0, 1)` that is `loss(out) - loss(in)` in expectation, without bias.

    Args:
        gradients: `(B, N)`, of every sample's loss by its gates.
        draw: `(B, N)` bool.
    """
    # Only where drawn: elsewhere the gate is 1, and its gradient is the slope at 1, not the mean slope from 0 to 1.
    return Increment(-(gradients * draw).sum(0), draw.sum(0).to(gradients))


def corrected_effect(losses: Tensor, gradients: Tensor, gates: Tensor, factor: Tensor) -> Increment:
    """Return `finite_effect`, corrected by what the losses say about the same gates: `A_j + c_j (X_j - Y_j)`.

    Let `l(u)` be the expected loss at gate `u` of channel `j`, given all others. By parts, with `u ~ U(0, 1)`,

        E[l(u)] - l(1) = -int_0^1 u l'(u) du = E[-u l'(u)].

    The left side is seen in the losses: `X_j`, the mean of `e_i` over samples that drew `j` minus that over those that
    did not. The right side is seen in the gradients: `Y_j`, the mean of `-u_ij g_ij` over samples that drew it. Their
    difference is zero in expectation if the others are drawn independently of `j` (`independent_draws`), so it may
    correct `A_j`, the mean of `-g_ij`, by any factor `c_j` that was chosen before this step; `best_factor` says which.

    Args:
        losses: `(B,)`.
        gradients, gates: `(B, N)`; a channel was drawn where its gate is below 1.
        factor: `(N,)`; at 0 this is `finite_effect`.
    """
    draw = gates < 1
    effect = finite_effect(gradients, draw)
    by_losses = loss_contrast(losses, 1 - draw.to(losses))
    by_gradients = finite_effect(gradients * gates, draw)
    # Where all samples drew a channel, or none, the losses contrast nothing, and X - Y would be -Y instead of noise.
    difference = torch.where(by_losses.weights > 0, by_losses.mean() - by_gradients.mean(), 0.0)
    return Increment(effect.totals + factor * effect.weights * difference, effect.weights)


def best_factor(losses: Tensor, gradients: Tensor, gates: Tensor) -> Increment:
    """Return the factor that `corrected_effect` should have had: `c = -Cov(A, X - Y) / Var(X - Y)`, `(N,)`.

    Both are sums over samples: with `n` of `B` samples that drew the channel, those add `-g / n` to `A`, and
    `e / n + u g / n` to `X - Y`; the others add `-e / (B - n)` to that. The losses' share is large where they resolve
    little, and `c` is then near 0.

    Args: as for `corrected_effect`.
    """
    draw = (gates < 1).to(losses)
    # Clamped so that a channel that nobody drew, or everybody, adds zeros instead of 0 / 0.
    count = draw.sum(0).clamp(min=1)
    rest = (len(losses) - count).clamp(min=1)
    centred = (losses - losses.mean()).unsqueeze(1)
    effect = _centred(-gradients, draw, count) / count
    difference = _centred(centred + gates * gradients, draw, count) / count
    others = _centred(centred.expand_as(draw), 1 - draw, rest) / rest
    return Increment(-(effect * difference).sum(0), (difference.square() + others.square()).sum(0))


def _centred(values: Tensor, chosen: Tensor, count: Tensor) -> Tensor:
    """Return the chosen values of every column, less their mean; 0 for the others."""
    return chosen * (values - (values * chosen).sum(0) / count)


def half_squared_gradient(gradients: Tensor) -> Increment:
    """Return `Q_j`, half the mean of `(dl_i/du_ij)^2`: what adds up when many channels go.

    Args:
        gradients: `(B, N)`, of every sample's loss by its gates.
    """
    # Squared before the mean: effects of both signs cancel while one channel goes, not when many go together.
    totals = gradients.square().sum(0) / 2
    return Increment(totals, torch.full_like(totals, len(gradients)))


# -- running sums


class ControlVariate:
    """Takes from the losses under the gates what the same samples' losses without gates predict.

    `e_i = l_i - beta d_i`, with `d_i` the loss of the same sample when nothing is excluded. `d_i` does not know who was
    drawn, so any `beta` chosen before this step leaves contrasts without bias; `beta = Cov(l, d) / Var(d)` leaves the
    share `1 - rho^2` of their variance. Both come from running sums, centred within the batch.

    Attributes:
        slope: the running regression of `l` on `d`: `beta`.
        residual: the running share of the variance that is left: `1 - rho^2`.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.slope, self.residual = RunningMean(device=device), RunningMean(device=device)

    def reduce(self, losses: Tensor, ungated: Tensor, decay: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return `e_i`, `(B,)`, and the share of the variance that is expected to be left, `()`; then learn.

        Args:
            losses: `(B,)`, under the gates.
            ungated: `(B,)`, of the same samples without gates.
            decay: by how much what was learned before counts less.
        """
        # NOTE: Read before this batch is added. A beta that knows these very losses would bias the contrast.
        beta = self.slope.mean()
        share = torch.where(self.residual.weights[0] > 0, self.residual.mean(), 1.0)
        centred, known = losses - losses.mean(), ungated - ungated.mean()
        self.residual.add(0, Increment((centred - beta * known).square().sum(), centred.square().sum()), decay)
        self.slope.add(0, Increment(centred @ known, known.square().sum()), decay)
        return losses - beta * ungated, share


class RunningMean:
    """Means with forgetting, in interleaved parts: step `t` goes to part `t mod parts`.

    Args:
        shape: of one mean.
        parts: 2 tells by the agreement of its halves how far the mean can be trusted.

    Attributes:
        totals, weights: `(parts, *shape)`, decaying sums of what the steps added.
    """

    def __init__(self, *shape: int, parts: int = 1, device: torch.device | None = None) -> None:
        self.totals = torch.zeros(parts, *shape, device=device)
        self.weights = torch.zeros(parts, *shape, device=device)

    def add(self, step: int, increment: Increment, decay: float = 1.0) -> None:
        """Forget a little of everything, then take in one step. What is not finite is left out."""
        # A gradient scaler probes until a step overflows: one infinite increment would spoil the sums for good.
        finite = increment.totals.isfinite() & increment.weights.isfinite()
        part = step % len(self.totals)
        self.totals *= decay
        self.weights *= decay
        self.totals[part] += torch.where(finite, increment.totals, 0.0)
        self.weights[part] += torch.where(finite, increment.weights, 0.0)

    def mean(self) -> Tensor:
        """Return the mean over all parts; 0 where nothing was observed."""
        return _ratio(self.totals.sum(0), self.weights.sum(0))

    def halves(self) -> Tensor:
        """Return the mean of every part, `(parts, *shape)`; 0 where nothing was observed."""
        return _ratio(self.totals, self.weights)

    def narrow(self, columns: Tensor) -> None:
        """Keep these indices of the last dimension."""
        self.totals, self.weights = self.totals[..., columns], self.weights[..., columns]

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the sums."""
        return {"totals": self.totals.clone(), "weights": self.weights.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict()`."""
        self.totals, self.weights = (state[key].to(self.totals, copy=True) for key in ("totals", "weights"))


def _ratio(totals: Tensor, weights: Tensor) -> Tensor:
    return torch.where(weights > 0, totals / weights, 0.0)


# -- when to believe it


def confidence(relevance: Tensor, dummies: Tensor) -> Tensor:
    """Return the probability that a channel is more relevant than a dummy: `Phi((r_j - mean(q)) / std(q))`.

    It is not a p-value: it is large for relevant channels.

    Args:
        relevance: `(C,)`.
        dummies: `(D, C)`, or `(D, 1)` where all channels share them; D >= 2.

    Returns:
        `(C,)` in `[0, 1]`, larger means more certainly relevant; 1/2 where dummies and channel do not differ at all.
    """
    above = relevance - dummies.mean(0)
    spread = dummies.std(0)
    # Before anything was observed all is 0: 0 / 0 must say "undecided", and a channel that differs is beyond doubt.
    z = torch.where(spread > 0, above / spread, above.sign() * math.inf)
    probability: Tensor = torch.special.ndtr(z.nan_to_num(0.0, math.inf, -math.inf))
    return probability


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation of two rankings `(C,)`; ties share their mean rank; 0 if one is constant."""
    pair = [ranking.detach().cpu().numpy() for ranking in (first, second)]
    # A constant ranking orders nothing. Scipy says "not a number" to it, with a warning.
    if any((ranking == ranking[0]).all() for ranking in pair):
        return 0.0
    return float(stats.spearmanr(*pair).statistic)


def required_samples(effect: float, variance: float, p: float, z_confidence: float, z_power: float) -> int:
    """Return how many samples resolve an effect: `N = V (z_confidence + z_power)^2 / (p (1 - p) g^2)`.

    Args:
        effect: `g > 0`, the relevance that should be seen.
        variance: `V`, of one centred observation, in the square of the effect's unit.
        p: share of samples that draw a channel, in `(0, 1)`.
        z_confidence: normal quantile of the test (2.33 for a confidence of 0.99).
        z_power: normal quantile of the power (0.84 for 80 %).

    Raises:
        RangeError: an effect that is not positive, or `p` outside `(0, 1)`.
    """
    if not effect > 0:
        raise RangeError("effect", effect, "(0, inf)")
    if not 0 < p < 1:
        raise RangeError("p", p, "(0, 1)")
    return math.ceil(variance * (z_confidence + z_power) ** 2 / (p * (1 - p) * effect**2))
