"""Criteria that look at gradients: what the loss would say to a channel's absence, to first order."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.criteria.snapshot import Snapshot
from compressor.errors import ScoreError
from compressor.graph import Group, Member


def taylor(group: Group, snapshot: Snapshot) -> Tensor:
    """Return the squared first-order change of the loss when a channel goes: `(sum of w * dloss/dw) ** 2`.

    The sum runs over the channel's weights in all its consumers. They are linear in their input, so it equals
    `sum of h * dloss/dh` over samples and positions: the first-order effect of setting the activation `h` to zero.
    (Over the producers' weights it would vanish before a BatchNorm in training mode, which undoes their scale.)
    A group that no weight consumes, queries and keys of an attention say, is judged by its producers.

    Args:
        group: the channels.
        snapshot: with gradients of the loss, summed over as many batches as the caller likes.

    Returns:
        `(C,)` float32, larger means keep.

    Raises:
        ScoreError: a weight has no gradient.

    Source: Molchanov et al., Importance Estimation for Neural Network Pruning, arXiv 1906.10771. Ours takes the
        consumers' weights, and squares once, after all batches, not batch by batch.
    """
    judged = group.of_role("consumer") or group.of_role("producer")
    blind = [member.tensor for member in judged if member.tensor not in snapshot.gradients]
    if blind or not judged:
        what = f"{blind[0]!r} has none" if blind else "the group has no weights"
        instead = "run backward on some batches before scoring, or use another criterion, l1 say"
        raise ScoreError(group.name, f"taylor needs gradients, and {what}", instead)
    return torch.stack([_first_order(member, snapshot) for member in judged]).sum(dim=0).square()


def _first_order(member: Member, snapshot: Snapshot) -> Tensor:
    """Return `sum of w * dloss/dw` over what each channel holds of one tensor: `(C,)` float32."""
    value, gradient = snapshot.values[member.tensor], snapshot.gradients[member.tensor]
    return member.rows(value.float() * gradient.float()).sum(dim=1)
