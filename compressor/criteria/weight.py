"""Criteria that look at weights: how large a channel is, and how unlike the others.

A channel's *row* is everything that its producers' weights hold of it, `group.rows(snapshot.values)`: `(C, F)`. Where
several layers write to the same channels (residual connections), their filters stand side by side in one row.

Shape letters: C channels of a group; F values of one channel.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.criteria.snapshot import Snapshot
from compressor.errors import ScoreError
from compressor.graph import Group, Member


def l1(group: Group, snapshot: Snapshot) -> Tensor:
    """Return the sum of magnitudes of each channel's row.

    Returns:
        `(C,)` float32, larger means keep.

    Source: Li et al., Pruning Filters for Efficient ConvNets, arXiv 1608.08710.
    """
    return group.rows(snapshot.values).abs().sum(dim=1)


def l2(group: Group, snapshot: Snapshot) -> Tensor:
    """Return the Euclidean norm of each channel's row.

    Returns:
        `(C,)` float32, larger means keep.

    Source: He et al., Soft Filter Pruning, arXiv 1808.06866.
    """
    return _norms(group.rows(snapshot.values))


def geometric_median(group: Group, snapshot: Snapshot) -> Tensor:
    """Return the sum of distances from each channel's row to all others of the group.

    The rows nearest to the group's geometric median have the smallest sums, and the others can stand in for them.

    Returns:
        `(C,)` float32, larger means keep.

    Source: He et al., FPGM, arXiv 1811.00250.
    """
    return _distances(group.rows(snapshot.values)).sum(dim=1)


def euclidean(group: Group, snapshot: Snapshot) -> Tensor:
    """Return the distance from each channel's row to the nearest one that stays; one of each close pair goes.

    At first all rows stay. Again and again, of the two rows that are closest among those that stay, the one with the
    smaller norm goes (of two equal norms, the later one), and the distance between the two is its score. Scores
    therefore rise in the order in which channels go. The last one has nobody left to be close to: it scores the last
    distance plus its own norm.

    Returns:
        `(C,)` float32, larger means keep. Of two equal rows exactly one scores 0.

    Source: the Euclidean criterion of Novikov & Buryak, who stop at a distance; here a budget decides.
    """
    rows = group.rows(snapshot.values)
    norms = _norms(rows)
    goes, stays = _pair_off(_distances(rows).cpu().numpy(), norms.cpu().numpy())
    # NOTE: Distances by matrix product are off by 1e-4 of the norm; those that count are taken again, by subtraction.
    gaps = _norms(rows[goes] - rows[stays])
    last = norms + gaps[-1:].sum()
    return last.index_copy(0, torch.from_numpy(goes).to(last.device), gaps)


def bn_scale(group: Group, snapshot: Snapshot) -> Tensor:
    """Return the mean magnitude of the BatchNorm scales that each channel passes through.

    Returns:
        `(C,)` float32, larger means keep.

    Raises:
        ScoreError: no BatchNorm with a scale is in this group. Other groups of the same model may have one.

    Source: Liu et al., Network Slimming, arXiv 1708.06519.
    """
    scales = [member.rows(snapshot.values[member.tensor]) for member in group.members if _is_scale(member, snapshot)]
    if not scales:
        reason = "bn_scale needs a BatchNorm scale, and its channels pass none"
        raise ScoreError(group.name, reason, "use another criterion, l1 say")
    return torch.cat(scales, dim=1).float().abs().mean(dim=1)


def _is_scale(member: Member, snapshot: Snapshot) -> bool:
    """Tell a BatchNorm's scale from all else that follows a channel: running statistics stand beside it."""
    module, _, leaf = member.tensor.rpartition(".")
    beside = f"{module}.running_var" if module else "running_var"
    return leaf == "weight" and beside in snapshot.values


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def _distances(rows: Tensor) -> Tensor:
    """Return the distances of all pairs of rows, `(C, C)`, with zeros on the diagonal."""
    # Distances do not change when the mean goes, and what is left loses fewer digits in the product.
    centred = rows - rows.mean(dim=0)
    return torch.cdist(centred, centred).fill_diagonal_(0)


def _pair_off(
    distances: NDArray[np.float32], norms: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return who goes, in order, and who of the pair stays: two arrays of C - 1 indices. Overwrites `distances`."""
    np.fill_diagonal(distances, np.inf)
    nearest, gap = distances.argmin(axis=1), distances.min(axis=1)
    goes, stays = [], []
    for _ in range(len(norms) - 1):
        one = int(gap.argmin())
        other = int(nearest[one])
        loser, winner = sorted((one, other), key=lambda index: (norms[index], -index))
        goes.append(loser)
        stays.append(winner)
        distances[:, loser], gap[loser] = np.inf, np.inf
        bereft = np.flatnonzero((nearest == loser) & np.isfinite(gap))
        nearest[bereft], gap[bereft] = distances[bereft].argmin(axis=1), distances[bereft].min(axis=1)
    return np.array(goes, dtype=np.int64), np.array(stays, dtype=np.int64)
