"""Calibration: what channels carry on average, on real inputs.

A removed channel did not contribute nothing: it contributed its mean, and what the next layer made of it. A cut folds
that into the next bias or running mean (`compressor.cut(..., means=...)`); here the means are taken.

Shape letters: D positions along the channel dimension of one consumer's input.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor._utils import as_arguments, device_of, evaluating, moved
from compressor.errors import InputError
from compressor.graph import ChannelGraph

COMPENSATIONS = ("mean", "none")  # what becomes of the mean that a removed channel carried


def input_means(graph: ChannelGraph, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Give the mean of every consumer's input, over samples and positions; the model is left as it was.

    Args:
        graph: of a model, which is run in evaluation mode.
        batches: inputs that the model accepts: tensors, tuples or dicts.

    Returns:
        `(D,)` by the name of the consuming weight, as `compressor.cut` takes them. Weights whose module did not run are
        left out.

    Raises:
        InputError: no batch came.
    """
    sums = {seen.weight: _Sum(seen.dim) for group in graph.groups for seen in group.inputs}
    count, device = 0, device_of(graph.model)
    with ExitStack() as hooks, evaluating(graph.model):
        for weight, total in sums.items():
            module = graph.model.get_submodule(weight.rpartition(".")[0])
            hooks.callback(module.register_forward_pre_hook(total).remove)
        for batch in batches:
            arguments, named = as_arguments(moved(batch, device))
            graph.model(*arguments, **named)
            count += 1
    if not count:
        raise InputError("no batch to take means of: give at least one batch of inputs that the model accepts")
    return {weight: total.mean() for weight, total in sums.items() if total.count}


@dataclass
class _Sum:
    """A forward-pre-hook that adds up its module's first input, position by position along `dim`."""

    dim: int
    total: Tensor | None = None
    count: int = 0

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        h = inputs[0] if inputs else None
        if isinstance(h, Tensor) and h.dim() >= -self.dim:
            rows = h.movedim(self.dim, -1).flatten(0, -2)
            seen = rows.sum(0, dtype=torch.float64)
            self.total = seen if self.total is None else self.total + seen
            self.count += len(rows)

    def mean(self) -> Tensor:
        """Give the mean, `(D,)` float64."""
        assert self.total is not None
        return self.total / self.count
