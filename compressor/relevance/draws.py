"""Who is drawn in a training step: random subsets of channels, a different one for every sample.

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
        group_of: `(N,)` int64, the group of every channel.
        count: number of strata; each is drawn by one sample in `count`.
        blocks: how many times to deal.

    Returns:
        `(blocks, N)` int64 in `[0, count)`.
    """
    shape = (blocks, len(group_of))
    dice = torch.rand(shape, dtype=torch.float64, generator=generator, device=group_of.device)
    order = (group_of + dice).argsort(dim=1)
    sizes = torch.bincount(group_of)
    rank = torch.arange(len(group_of), device=group_of.device) - (sizes.cumsum(0) - sizes)[group_of[order]]
    return torch.empty_like(order).scatter_(1, order, rank % count)


def drawn(group_of: Tensor, count: int, batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw for every sample one in `count` channels of every group, so that `count` samples draw each channel once.

    Equally many channels are out in every sample, so their number adds no noise to the losses.

    NOTE: The channels are dealt anew for every block of `count` samples. One deal for the whole batch would let the
    same channels always go together, and their effects, useful ones' and dummies', could not be told apart.

    Args:
        group_of: `(N,)` int64, the group of every channel.
        count: one channel in so many is drawn.
        batch: `B`.

    Returns:
        `(B, N)` bool.
    """
    samples = torch.arange(batch, device=group_of.device)
    stratum = strata(group_of, count, -(-batch // count), generator)[samples // count]
    offset = torch.randint(count, (), generator=generator, device=group_of.device)
    return stratum == ((samples + offset) % count).unsqueeze(1)


def independently_drawn(group_of: Tensor, count: int, batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw as `drawn`, but whatever the other channels do: each picks one sample of every block of `count`.

    The other channels are then out equally often whether a channel is drawn or not, which `drawn` cannot give: there,
    who is not drawn is replaced by another. Losses with a channel drawn against losses with it not drawn show its own
    effect, at the price of a number of drawn channels that varies from sample to sample.

    Args and Returns: as for `drawn`.
    """
    samples = torch.arange(batch, device=group_of.device)
    shape = (-(-batch // count), len(group_of))
    pick = torch.randint(count, shape, generator=generator, device=group_of.device)
    return pick[samples // count] == (samples % count).unsqueeze(1)


def thinned(draw: Tensor, count: int, rate: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Let every channel sit out a random part of the blocks of `count` samples.

    Args:
        draw: `(B, N)` bool, of `drawn`.
        count: the length of a block, as for `drawn`.
        rate: `(N,)` in `[0, 1]`, the share of the blocks in which a channel takes part.

    Returns:
        `(B, N)` bool.
    """
    if bool((rate >= 1).all()):
        return draw
    samples = torch.arange(len(draw), device=draw.device)
    shape = (-(-len(draw) // count), draw.shape[1])
    takes_part = torch.rand(shape, generator=generator, device=draw.device) < rate
    return draw & takes_part[samples // count]
