"""Linear compensation: what removed channels carry is predicted from those that stay, and moved into their weights.

Channels of one group are correlated. Pixel by pixel, of the channels R that go and K that stay,

    z_R ~ mu_R + A (z_K - mu_K),   A = Cov_RK (Cov_KK + ridge)^-1

so a consumer with weight W loses least when `W[:, K] += W[:, R] A`, and `W[:, R] (mu_R - A mu_K)` goes into the next
bias or running mean. With A = 0 that is compensation by the mean alone.

    z = [1, 2] in one pixel, [2, 4] in another: channel 1 is twice channel 0, A = [[2]]
    consumer W = [[5, 1]], channel 1 goes: W[:, 0] becomes 5 + 1 * 2 = 7, and nothing was lost

The best A may be one that nobody can train on from. Where a channel that stays hardly varies, the consumer's weight on
it becomes a hundred times as large, and so does the gradient of whatever computes that channel. What is moved is
therefore at most four times as large as what goes: all variances get a floor, the least one that keeps to it.

    z_0 = 0.01 z_1, z_1 goes: A = [[100]] and W = [[1, 1]] -> [[101]]; with the floor W[0, 0] stays below 5

Where no bias or running mean can take the constant, A is that of uncentred moments, `E[z_R z_K] E[z_K z_K]^-1`.
One A serves every tap of a kernel (exact but for padded borders), and every pixel that a flatten laid side by side:
a regression for each pixel would have as many times fewer samples. A grouped convolution has one A for each block.

Shape letters: C channels of a group, n of which stay and r go; K positions that one channel holds; N samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.graph import ChannelGraph
from compressor.surgery.compensation import removed_means
from compressor.surgery.moments import Moments, channel_blocks, consumer_weight, weight_input_dim

MOST_GROWTH = 4.0  # of what is moved, against what goes
# Parts of the largest variance in a group.
_VARIANCE_FLOORS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)

# Eigenvalues of a correlation matrix below this, times its size, are rounding: such directions predict nothing.
_RANK_TOLERANCE = 1e-13


@dataclass(frozen=True, eq=False)
class Merge:
    """How the weights of channels that stay take over from those that go, at one consumer.

    Attributes:
        kept, gone: `(n, K)` and `(r, K)`, columns of the weight within a block.
        maps: `(blocks, r, n)`, A of each block.
        blocks: how many the weight has.
        input_dim: the dimension of the weight that the columns lie on.
    """

    kept: Tensor
    gone: Tensor
    maps: Tensor
    blocks: int
    input_dim: int = 1

    def change(self, weight: Tensor) -> Tensor:
        """Return what is to be added to a weight `(O, D / blocks, ...)` or `(D, O, ...)`, or to its momentum."""
        if self.input_dim == 0:
            return replace(self, input_dim=1).change(weight.transpose(0, 1)).transpose(0, 1)
        change = torch.zeros_like(weight)
        kept, gone = (each.flatten().to(weight.device) for each in (self.kept, self.gone))
        parts = zip(weight.chunk(self.blocks), change.chunk(self.blocks), self.maps, strict=True)
        for part, target, matrix in parts:
            # (O, r * K, ...) -> (O, r, K, ...)
            from_gone = part.index_select(1, gone).reshape(len(part), *self.gone.shape, *part.shape[2:])
            moved = torch.tensordot(from_gone, matrix.to(from_gone), dims=([1], [0])).movedim(-1, 1)
            target.index_copy_(1, kept, moved.flatten(1, 2))
        return change


@dataclass(frozen=True, eq=False)
class Compensations:
    """What a cut adds to weights and offsets.

    Attributes:
        constants: by consuming weight, `(D,)`: what is left of the removed channels' means, zero for those that stay.
        merges: by consuming weight, one for each group that loses channels there.
    """

    constants: Mapping[str, Tensor]
    merges: Mapping[str, list[Merge]]


def compensations(graph: ChannelGraph, removed: Mapping[str, Tensor], moments: Moments) -> Compensations:
    """Return what to put where, before channels go.

    Args:
        graph: before the cut.
        removed: by group, the channels that go, `(r,)`.
        moments: of the consumers' inputs; without covariances their means alone are put into the offsets.
    """
    constants = removed_means(graph, removed, moments.means)
    merges: dict[str, list[Merge]] = {}
    for name, gone in removed.items():
        stays = torch.ones(graph[name].size, dtype=torch.bool)
        stays[gone] = False
        kept = stays.nonzero().flatten()
        for seen in graph[name].inputs:
            covariance = moments.covariances.get((seen.weight, name))
            if covariance is None:
                continue
            blocks = channel_blocks(graph, seen)
            assert blocks is not None
            maps = torch.stack([_trainable(each, kept, gone, moments.samples) for each in covariance])
            if seen.weight in constants:
                mean = moments.means[seen.weight]
                for positions, matrix in zip(blocks, maps, strict=True):
                    here, there = (positions[each].to(mean.device) for each in (kept, gone))
                    constants[seen.weight][there] = mean[there] - matrix.to(mean.device) @ mean[here]
            input_dim = weight_input_dim(graph, seen.weight)
            columns = blocks[0] % consumer_weight(graph, seen.weight).shape[input_dim]
            merge = Merge(columns[kept], columns[gone], maps, len(blocks), input_dim)
            merges.setdefault(seen.weight, []).append(merge)
    return Compensations(constants, merges)


def _trainable(covariance: Tensor, kept: Tensor, gone: Tensor, samples: int) -> Tensor:
    """Return A, `(r, n)`: the best one whose rows have at most the norm `MOST_GROWTH`, by their root mean square."""
    best = _prediction(covariance, kept, gone, samples)
    if _growth(best) <= MOST_GROWTH:
        return best
    c = covariance.double().cpu()
    values, vectors = torch.linalg.eigh(c[kept][:, kept])
    across = c[gone][:, kept] @ vectors  # (r, n)
    for part in _VARIANCE_FLOORS:
        solved = across / (values.clamp_min(0) + part * c.diagonal().max())
        if _growth(solved) <= MOST_GROWTH:
            found: Tensor = solved @ vectors.T
            return found
    return torch.zeros_like(best)


def _growth(coefficients: Tensor) -> float:
    """Return the root mean square of the rows' norms: what `W[:, R] A` has of the norm of `W[:, R]`, roughly."""
    return float(coefficients.square().sum(1).mean().sqrt()) if len(coefficients) else 0.0


def _prediction(covariance: Tensor, kept: Tensor, gone: Tensor, samples: int) -> Tensor:
    """Return A, `(r, n)`: the coefficients of what goes in what stays.

    The ridge is that of Hoerl, Kennard & Baldwin (1975), in units of each kept channel's deviation: `n s^2 / (N b^2)`
    with the variance s^2 that the prediction leaves, its coefficients b, and for N the samples, since the rows of one
    image say nearly the same. It is 0 where nothing is left, so that
    copies are predicted exactly, and large where the prediction is noise.
    """
    c = covariance.double().cpu()
    kk, rk, rr = c[kept][:, kept], c[gone][:, kept], c[gone, gone]
    scale = kk.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    values, vectors = torch.linalg.eigh(kk / scale / scale.unsqueeze(1))
    across = (rk / scale) @ vectors  # (r, n)
    least = _RANK_TOLERANCE * len(kept)
    plain = torch.where(values > least, across / values.clamp_min(least), 0.0)
    left = (rr - (plain * across).sum(1)).clamp_min(0)
    strength = plain.square().sum(1)
    ridge = len(kept) * left / (max(samples, 1) * strength.clamp_min(torch.finfo(torch.float64).tiny))
    solved = torch.where(values > least, across / (values.clamp_min(least) + ridge.unsqueeze(1)), 0.0)
    coefficients: Tensor = (solved @ vectors.T) / scale
    return coefficients
