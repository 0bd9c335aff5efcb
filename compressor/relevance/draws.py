"""Who is drawn in a training step: random subsets of channels, a different one for every sample.

Four channels of one group and `1 / drop = 2`: the channels are dealt into two strata, here {0, 2} and {1, 3}. Of every
two samples one draws the first stratum, the other the second, so that each channel is out once in two samples:

    >>> generator = torch.Generator().manual_seed(11)
    >>> group_of = torch.zeros(4, dtype=torch.int64)  # all four channels are in group 0
    >>> draw = stratified_draws(group_of, 2, 4, generator)
    >>> draw.int().tolist()
    [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 0, 0]]

The next two samples are dealt anew: channel 2 was out with 0, now it is out with 3.

Shape letters: B samples of a batch; N channels of all groups, side by side.

Source: Räsänen & Pohjalainen, Random subset feature selection (Interspeech 2013), who draw one subset a step. Ours
differs: one a sample, and every channel equally often.
"""

from __future__ import annotations

import torch
from torch import Tensor


def strata(group_of: Tensor, count: int, blocks: int, generator: torch.Generator | None = None) -> Tensor:
    """Deal the channels of every group at random into `count` strata, whose sizes differ by one at most.

    Args:
        group_of: `(N,)` int64, the group of every channel, in any order.
        count: number of strata; each is drawn by one sample in `count`.
        blocks: how many times to deal.

    Returns:
        `(blocks, N)` int64 in `[0, count)`.
    """
    shape = (blocks, len(group_of))
    # One sort shuffles all groups at once: the whole part of the key keeps a group together, the fraction shuffles it.
    # In float64, so that bits enough are left beside the group number: of two equal keys the order is not random.
    keys = group_of + torch.rand(shape, dtype=torch.float64, generator=generator, device=group_of.device)
    order = keys.argsort(dim=1)
    sizes = torch.bincount(group_of)
    rank = torch.arange(len(group_of), device=group_of.device) - (sizes.cumsum(0) - sizes)[group_of[order]]
    return torch.empty_like(order).scatter_(1, order, rank % count)


def stratified_draws(group_of: Tensor, count: int, batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw for every sample one in `count` channels of every group, so that `count` samples draw each channel once.

    Equally many channels are out in every sample, so their number adds no noise to the losses.

    Args:
        group_of: `(N,)` int64, the group of every channel, in any order.
        count: one channel in so many is drawn.
        batch: `B`.

    Returns:
        `(B, N)` bool.
    """
    samples = torch.arange(batch, device=group_of.device)
    # NOTE: Dealt anew for every block of `count` samples. One deal for the whole batch would let the same channels
    # always go together, and their effects, useful ones' and dummies', could not be told apart.
    stratum = strata(group_of, count, -(-batch // count), generator)[samples // count]
    # Who begins is random too: the last block of a batch may be cut short, and stratum 0 would be drawn more often.
    offset = torch.randint(count, (), generator=generator, device=group_of.device)
    return stratum == ((samples + offset) % count).unsqueeze(1)


def independent_draws(group_of: Tensor, count: int, batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw as `stratified_draws`, but whatever the other channels do: each picks one sample of every block of `count`.

    The other channels are then out equally often whether a channel is drawn or not, which strata cannot offer: there,
    who is not drawn is replaced by another. Losses with a channel drawn against losses with it not drawn show its own
    effect, at the price of a number of drawn channels that varies from sample to sample.

    Args and Returns: as for `stratified_draws`.
    """
    samples = torch.arange(batch, device=group_of.device)
    shape = (-(-batch // count), len(group_of))
    pick = torch.randint(count, shape, generator=generator, device=group_of.device)
    return pick[samples // count] == (samples % count).unsqueeze(1)


def subsample_blocks(draw: Tensor, count: int, rate: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Let every channel sit out a random part of the blocks of `count` samples.

    Args:
        draw: `(B, N)` bool, from `stratified_draws` or `independent_draws`.
        count: the length of a block, as there.
        rate: `(N,)` in `[0, 1]`, the share of the blocks in which a channel takes part.

    Returns:
        `(B, N)` bool.
    """
    if bool((rate >= 1).all()):
        return draw
    samples = torch.arange(len(draw), device=draw.device)
    # Whole blocks, not single samples: within a block that it takes part in, a channel is still out exactly once.
    shape = (-(-len(draw) // count), draw.shape[1])
    takes_part = torch.rand(shape, generator=generator, device=draw.device) < rate
    return draw & takes_part[samples // count]
