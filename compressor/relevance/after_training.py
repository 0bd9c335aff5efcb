"""Relevance of a network that is trained already: gates of what a cut would lose, over calibration batches.

In evaluation mode samples do not meet, so one backward pass of the summed loss has every sample's own gradient. A gate
on what a channel would lose, `h <- h - (1 - z) e`, has the slope `g_ij = sum over space of dl_i/dh e`, and relevance is
half its mean square: the estimator "gate" at z = 1. What is lost depends on the compensation:

    none     e = h                                              all of it
    mean     e = h - mu                                         what varies
    linear   e = (h - mu) C^-1 / diag(C^-1)                     what the other channels of the group do not predict

    four channels, the last a copy of the first: e of both is 0, and either may go for nothing; but once one is gone,
    the other is worth all that both were. Therefore: small cuts, with the statistics taken anew.

Shape letters: B samples; C channels of a group; K positions that one channel holds; D positions of an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from compressor._utils import count_samples, device_of, eval_mode, run_batch, to_device
from compressor.errors import InputError
from compressor.graph import ChannelGraph, ConsumerInput
from compressor.relevance.unexplained import unexplained_part
from compressor.surgery import Moments, channel_blocks


def gate_relevance(
    graph: ChannelGraph,
    batches: Iterable[tuple[Any, Any]],
    loss_fn: Callable[..., Tensor],
    known: Moments,
) -> dict[str, Tensor]:
    """Return half the mean square of every channel's gate gradient; the model is left as it was.

    Args:
        graph: of a trained model, which is run in evaluation mode.
        batches: inputs that the model accepts, and targets.
        loss_fn: like `torch.nn.functional.cross_entropy`: takes outputs, targets and `reduction="sum"`.
        known: of the consumers' inputs, as the cut will have it; with covariances, relevance is of what they do not
            predict.

    Returns:
        By group, `(C,)` float64, larger means keep, comparable between groups. Groups whose consumers show no input are
        left out.

    Raises:
        InputError: no batch, a loss without gradients, or one that is not finite.

    Source: the squared gate of Molchanov et al., arXiv 1906.10771; of the unexplained part: ours (docs/relevance.md).
    """
    model, device = graph.model, device_of(graph.model)
    sites = _sites(graph, known)
    totals = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in graph.groups}
    seen: set[str] = set()
    samples = 0
    gradients = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with ExitStack() as hooks, eval_mode(model):
            for module, each in sites.items():
                hooks.callback(model.get_submodule(module).register_forward_pre_hook(each).remove)
            for parameter, _, _ in gradients:
                parameter.requires_grad_(False)
            for inputs, targets in batches:
                count = count_samples(inputs)
                for site in sites.values():
                    site.inputs.clear()
                _backward(model, inputs, to_device(targets, device), loss_fn)
                slopes = _slopes(sites, count)
                for name, slope in slopes.items():
                    totals[name] += slope.square().sum(0).cpu()
                seen |= slopes.keys()
                samples += count
    finally:
        for parameter, gradient, trains in gradients:
            parameter.requires_grad_(trains)
            parameter.grad = gradient
    if not samples:
        raise InputError("no batch to judge channels by: give at least one, calibration=[(inputs, targets), ...]")
    return {name: 0.5 * total / samples for name, total in totals.items() if name in seen}


def _backward(model: nn.Module, inputs: Any, targets: Any, loss_fn: Callable[..., Tensor]) -> None:
    with torch.enable_grad():
        loss = loss_fn(run_batch(model, inputs), targets, reduction="sum")
        if not loss.requires_grad:
            raise InputError("the loss carries no gradients: no group's input reached it; use another criterion (l1)")
        if not loss.isfinite():
            raise InputError("the loss on the calibration inputs is not finite: leave out those that hold NaN or inf")
        loss.backward()  # type: ignore[no-untyped-call]


class _Site:
    """A forward-pre-hook that keeps its module's first input, where gradients can be read."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.groups: list[tuple[str, list[Tensor], Tensor | None, list[Tensor] | None]] = []
        self.inputs: list[Tensor] = []

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        h = inputs[0] if inputs else None
        if not isinstance(h, Tensor) or h.dim() < -self.dim or not h.is_floating_point():
            return None
        # The first site on the way has nothing above it that carries gradients, as parameters do not.
        h = h if h.requires_grad else h.detach().requires_grad_()
        h.retain_grad()
        self.inputs.append(h)
        return (h, *inputs[1:])


def _sites(graph: ChannelGraph, known: Moments) -> dict[str, _Site]:
    sites: dict[str, _Site] = {}
    for group in graph.groups:
        for seen in group.consumer_inputs:
            site = sites.setdefault(seen.module, _Site(seen.dim))
            blocks = channel_blocks(graph, seen) or [seen.positions]
            unexplained = _unexplained(known, seen, group.name, len(blocks))
            site.groups.append((group.name, blocks, known.means.get(seen.weight), unexplained))
    return sites


def _unexplained(known: Moments, seen: ConsumerInput, group: str, blocks: int) -> list[Tensor] | None:
    """Return, block by block, the matrix `(C, C)` that leaves of each channel what the others do not predict."""
    covariance = known.covariances.get((seen.weight, group))
    if covariance is None or len(covariance) != blocks:
        return None
    return [unexplained_part(each.cpu()) for each in covariance]


def _slopes(sites: dict[str, _Site], count: int) -> dict[str, Tensor]:
    """Return by group the gradient of every sample's loss by its gates, `(B, C)`; several readers add up."""
    slopes: dict[str, Tensor] = {}
    for site in sites.values():
        for h in site.inputs:
            if h.grad is None or len(h) % count:
                continue
            values, gradient = (each.detach().movedim(site.dim, -1) for each in (h, h.grad))
            for name, blocks, mean, unexplained in site.groups:
                for index, positions in enumerate(blocks):
                    at = positions.to(h.device)
                    lost = values[..., at] - (0 if mean is None else mean.to(values)[at])  # (..., C, K)
                    if unexplained is not None:
                        lost = torch.einsum("...ck,cd->...dk", lost, unexplained[index].to(lost))
                    each = (lost * gradient[..., at]).sum(-1).reshape(count, -1, len(positions)).sum(1)
                    slopes[name] = slopes[name] + each if name in slopes else each
    return slopes
