"""Channels that masks on single weights leave empty: no weight writes them any more, or none reads them.

A channel that nobody reads contributes nothing. A channel that nobody writes is a constant, made by the biases that
follow.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.graph import ChannelGraph, Group, Member, Role, named_model_tensors


def without_weight(graph: ChannelGraph, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mark the empty channels of every group, `(C,)` bool; one channel of every group counts as in use in any case.

    What only an empty channel feeds, or is fed by, is empty too. Groups that are not exact, or that no weight reads,
    have no empty channels: without them the others would change.

    Args:
        graph: the channel graph of the model.
        masks: by weight name, True where a weight is on. Weights that have no mask are on.
    """
    groups = [group for group in graph.groups if group.exact and group.of_role("consumer")]
    tensors = named_model_tensors(dict(graph.model.named_modules()))  # a state_dict lacks what is not persistent
    names = {member.tensor for group in groups for member in _weights(group)}
    on = {name: _mask(name, tensors[name], masks) for name in names}
    empty = {group.name: torch.zeros(group.size, dtype=torch.bool) for group in groups}
    spreading = True
    while spreading:
        spreading = sum(_spread(group, on, empty[group.name]) for group in groups) > 0
    return empty


def _weights(group: Group) -> tuple[Member, ...]:
    return (*group.of_role("producer"), *group.of_role("consumer"))


def _mask(name: str, tensor: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    return masks[name].cpu().clone() if name in masks else torch.ones(tensor.shape, dtype=torch.bool)


def _spread(group: Group, on: Mapping[str, Tensor], empty: Tensor) -> bool:
    """Mark the channels of one group that are empty by now, and their weights as off; tell whether there were any."""
    found = ~empty & ~(_any_on(group, on, "producer") & _any_on(group, on, "consumer"))
    if bool((empty | found).all()):
        found[int((~empty).nonzero()[0])] = False
    empty |= found
    for member in _weights(group):
        on[member.tensor].index_fill_(member.dim, member.positions[found].flatten(), False)
    return bool(found.any())


def _any_on(group: Group, on: Mapping[str, Tensor], role: Role) -> Tensor:
    """Tell of each channel whether any weight of that role is on, `(C,)`; yes where no weight has the role."""
    rows = [member.rows(on[member.tensor]).any(1) for member in group.of_role(role)]
    return torch.stack(rows).any(0) if rows else torch.ones(group.size, dtype=torch.bool)
