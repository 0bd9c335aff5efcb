"""Compensation: what removed channels contributed on average goes into what stays.

A removed channel did not contribute nothing: it contributed its mean, and what the next layer made of it. A cut folds
that into the next bias or running mean (`compressor.cut(..., means=...)`).

    consumer W = [[1, 2, 0, 4]], its input has the means [5, 1, 3, 2], channels 1 and 3 go
    folded into its bias: 2 * 1 + 4 * 2 = 10; into the running mean of a BatchNorm behind it: -10

Shape letters: D positions along the channel dimension of one consumer's input; O outputs of the consumer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor._utils import eval_mode, run_batch, tf32_disabled
from compressor.errors import InputError
from compressor.graph import ChannelGraph, Offset, owner


def input_means(graph: ChannelGraph, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Return the mean of every consumer's input, over samples and positions; the model is left as it was.

    Args:
        graph: of a model, which is run in evaluation mode.
        batches: inputs that the model accepts: tensors, tuples or dicts.

    Returns:
        `(D,)` by the name of the consuming weight, as `compressor.cut` takes them. Weights whose module did not run are
        left out.

    Raises:
        InputError: no batch came, or what came is not finite.
    """
    sums = {seen.weight: _Sum(seen.dim) for group in graph.groups for seen in group.inputs}
    watch_inputs(graph, sums, batches, "means")
    means = {weight: total.mean() for weight, total in sums.items() if total.count}
    require_finite(means)
    return means


def watch_inputs(
    graph: ChannelGraph, hooks: Mapping[str, Callable[..., None]], batches: Iterable[Any], what: str
) -> None:
    """Run batches in evaluation mode under forward-pre-hooks on the modules of the consuming weights.

    Raises:
        InputError: no batch came, and the message says what it was for; or the model does not run on one.
    """
    count = 0
    with ExitStack() as handles, eval_mode(graph.model), tf32_disabled():
        for weight, hook in hooks.items():
            module = graph.model.get_submodule(owner(weight)[0])
            handles.callback(module.register_forward_pre_hook(hook).remove)
        for batch in batches:
            run_batch(graph.model, batch)
            count += 1
    if not count:
        raise InputError(f"no batch to take {what} of: give at least one batch of inputs that the model accepts")


def require_finite(means: Mapping[str, Tensor]) -> None:
    """Raise InputError if what a consumer reads is not finite on average."""
    for weight, mean in means.items():
        if not mean.isfinite().all():
            raise InputError(
                f"the input of {weight!r} is not finite on these inputs, or its square is not: leave out those that "
                "hold NaN, inf or numbers as large"
            )


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
        """Return the mean, `(D,)` float64."""
        assert self.total is not None
        return self.total / self.count


def removed_means(graph: ChannelGraph, removed: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return, by consuming weight, the means of its removed input channels alone, `(D,)`, zero for those that stay.

    Left out are consumers whose mean is not known, and those behind which there is no bias or running mean to take it.

    Args:
        graph: before the cut.
        removed: by group, the channels that go.
        means: by consuming weight, `(D,)`, as `input_means` returns them.
    """
    found: dict[str, Tensor] = {}
    for name, channels in removed.items():
        for seen in graph[name].inputs:
            if seen.weight in means and seen.weight in graph.offsets:
                mean = means[seen.weight]
                positions = seen.positions[channels].flatten().to(mean.device)
                found.setdefault(seen.weight, torch.zeros_like(mean))[positions] = mean[positions]
    return found


@torch.no_grad()
def constant_output(weight: Tensor, mean: Tensor, offset: Offset, outputs: int) -> Tensor:
    """Return the output `(O,)` of a weight for an input that is `mean` everywhere.

    For a padded convolution that is the output away from the border, where every tap sees the mean and not a zero; for
    a transposed one with strides, whose places see different taps, the mean over the places.

    Args:
        weight: `(O, D / blocks, ...)`, or `(D, O / blocks, ...)`.
        mean: `(D,)`.
        offset: says which of the two it is.
        outputs: O.
    """
    kernel = weight.detach().flatten(2).sum(2) if weight.dim() > 2 else weight.detach()
    if offset.input_dim == 0:
        blocks = outputs // kernel.shape[1]
        parts = zip(kernel.chunk(blocks), mean.to(kernel).chunk(blocks), strict=True)
        return offset.share * torch.cat([constant @ part for part, constant in parts])
    # A grouped convolution's weight counts the channels of one block; its outputs lie block by block.
    blocks = len(mean) // kernel.shape[1]
    parts = zip(kernel.chunk(blocks), mean.to(kernel).chunk(blocks), strict=True)
    return torch.cat([part @ constant for part, constant in parts])
