"""Mask channels: make them contribute nothing without cutting them, in the weights.

A mask acts where channels are *consumed*: a channel that no consumer sees is a channel removed, in every group,
whatever adds, concatenates or normalises on the way there. `relevance/gates.py` does the same per sample, in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compressor._utils import ambient_modes_disabled
from compressor.errors import InputError, RangeError, UnknownNameError
from compressor.graph import ChannelGraph, Group, named_model_tensors


@ambient_modes_disabled()
@torch.no_grad()
def mask_channels(graph: ChannelGraph, channels: Mapping[str, Tensor | Sequence[int]]) -> None:
    """Write zeros into the consumers' weights, so that the given channels contribute nothing; writes the model.

    For exact groups the outputs are then those of the model with the same channels cut.

    Args:
        graph: the channel graph of the model.
        channels: by group name, the indices to mask, `(n,)`, each in `[0, C)`.

    Raises:
        UnknownNameError: a group that is not in the graph. Nothing is written.
        InputError: a mask instead of indices. Nothing is written.
        RangeError: an index outside `[0, C)`. Nothing is written.
    """
    chosen = {name: _channels(graph, name, indices) for name, indices in channels.items()}
    tensors = named_model_tensors(dict(graph.model.named_modules()))  # a fixed kernel may be a buffer
    for name, indices in chosen.items():
        for member in graph[name].of_role("consumer"):
            positions = member.positions[indices].flatten()
            tensors[member.tensor].index_fill_(member.dim, positions.to(tensors[member.tensor].device), 0)


def _channels(graph: ChannelGraph, name: str, indices: Tensor | Sequence[int]) -> Tensor:
    size = _group(graph, name).size
    chosen = torch.as_tensor(indices).cpu()
    if chosen.dtype == torch.bool:
        raise InputError(f"channels of group {name!r} came as a mask: give their indices, mask.nonzero().flatten()")
    chosen = chosen.long()
    for index in chosen[(chosen < 0) | (chosen >= size)].tolist():
        raise RangeError(f"channel of group {name!r}", index, f"[0, {size - 1}]")
    return chosen


def _group(graph: ChannelGraph, name: str) -> Group:
    if name not in graph.sizes():
        raise UnknownNameError("group", name, graph.sizes(), hint="`graph.groups` lists them")
    return graph[name]
