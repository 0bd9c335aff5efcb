"""Verification: hold a cut against masking, on real inputs, before it becomes final.

Masking a channel and cutting it must give the same output. The masked outputs are computed first, on the model
itself, whose weights come back bit for bit; then the model is cut and run again. Nothing is kept of the cut if the two
differ. No second model is made.

Groups that are not `exact` have no such oracle: there the cut model only has to run. The exact ones beside them are
tried by themselves beforehand, and taken back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor._utils import device_of, named_tensors, run_model, tf32_disabled, to_device
from compressor.errors import CutError, TraceError
from compressor.graph import ChannelGraph, named_model_tensors, owner, preserve_module_state
from compressor.surgery.compensation import constant_output
from compressor.surgery.cutting import cut, removed_channels
from compressor.surgery.masks import mask_channels
from compressor.surgery.moments import Moments
from compressor.surgery.prediction import compensations

Outputs = list[tuple[str, Tensor]]
Means = Mapping[str, Tensor] | Moments


def verified_cut(
    graph: ChannelGraph,
    keep: Mapping[str, Tensor],
    inputs: Any,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    means: Means | None = None,
    copies: Sequence[nn.Module] = (),
) -> None:
    """Cut as `compressor.cut` does, and only if the outputs are those of the masked model.

    Where a channel is compensated, it is masked by what is known of it: its mean, or its prediction. Allowed is a
    difference of `sqrt(eps)` of the output's largest value, half of the digits that the coarsest tensor has.

    Args:
        graph, keep, optimizer, means, copies: as for `compressor.cut`; indices sorted.
        inputs: real inputs that the model accepts.

    Raises:
        CutError: the outputs differ; names the groups that do so by themselves. Model, optimizers and graph are as they
            were. And as for `compressor.cut`.
        TraceError: the model does not run on the inputs.
    """
    exact = {name: kept for name, kept in keep.items() if graph[name].exact}
    try:
        if len(exact) == len(keep):
            _cut_as_masked(graph, keep, inputs, means, optimizer, copies)
        else:
            _try(graph, exact, inputs, means)
            cut(graph, keep, optimizer, means, partial(_require_runs, graph, inputs), copies)
    except _Differs as refusal:
        guilty = [name for name in exact if not _agrees(graph, {name: exact[name]}, inputs, means)]
        raise CutError(refusal.reason, guilty or sorted(exact)) from refusal


class _Differs(CutError):
    """The cut model is not the masked one."""


class _Tried(Exception):
    """Takes back a cut that was in order."""


def _cut_as_masked(
    graph: ChannelGraph,
    keep: Mapping[str, Tensor],
    inputs: Any,
    means: Means | None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    copies: Sequence[nn.Module] = (),
    afterwards: Callable[[], None] = lambda: None,
) -> None:
    with _masked(graph, {name: removed_channels(graph[name], kept) for name, kept in keep.items()}, Moments.of(means)):
        expected = _run(graph, inputs)

    def check() -> None:
        _compare(_run_cut(graph, inputs), expected, _tolerance(graph.model))
        afterwards()

    cut(graph, keep, optimizer, means, check, copies)


def _try(graph: ChannelGraph, keep: Mapping[str, Tensor], inputs: Any, means: Means | None) -> None:
    """Cut, compare, and take the cut back; raises if it was not in order."""

    def take_back() -> None:
        raise _Tried

    try:
        _cut_as_masked(graph, keep, inputs, means, afterwards=take_back)
    except _Tried:
        return


def _agrees(graph: ChannelGraph, keep: Mapping[str, Tensor], inputs: Any, means: Means | None) -> bool:
    try:
        _try(graph, keep, inputs, means)
    except CutError:
        return False
    return True


# -- the oracle


@contextmanager
def _masked(graph: ChannelGraph, gone: Mapping[str, Tensor], moments: Moments) -> Iterator[None]:
    """Let consumers multiply the channels by zero, and add what is known of them; afterwards nothing is left."""
    tensors = named_model_tensors(dict(graph.model.named_modules()))
    read = {member.tensor for name in gone for member in graph[name].of_role("consumer")}
    known = compensations(graph, gone, moments)
    before = {name: tensors[name].data for name in read | known.merges.keys()}
    with ExitStack() as hooks:
        for weight, left in known.constants.items():
            offset = graph.offsets[weight]
            constant = constant_output(tensors[weight], left, offset, len(tensors[offset.tensor]))
            module = graph.model.get_submodule(owner(weight)[0])
            dim = 1 - max(tensors[weight].dim() - 1, 1)
            hooks.callback(module.register_forward_hook(_adding(constant, dim - 1)).remove)
        try:
            # NOTE: Masked copies are put in by `.data`, so that the parameters stay the objects that optimizers hold.
            for name, data in before.items():
                changes = [merge.change(data) for merge in known.merges.get(name, ())]
                tensors[name].data = data.clone() + sum(changes) if changes else data.clone()
            mask_channels(graph, gone)
            yield
        finally:
            for name, data in before.items():
                tensors[name].data = data


def _adding(constant: Tensor, dim: int) -> Callable[..., Tensor]:
    """Return a forward hook that adds a constant along a dimension, counted from the end."""
    shaped = constant.view(-1, *[1] * (-dim - 1))

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + shaped

    return hook


# -- running and comparing


def _run(graph: ChannelGraph, inputs: Any) -> Outputs:
    """Return the floating-point outputs that count, in evaluation mode, each with its place."""
    model = graph.model
    inputs = to_device(inputs, device_of(model))
    try:
        # NOTE: What a model keeps of a run (the grid of anchors of a detector) would make the next one another.
        with preserve_module_state(model), tf32_disabled():
            result = run_model(model, inputs)
            outputs = named_tensors(graph.outputs(result) if graph.outputs else result)
    except Exception as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for _, tensor in named_tensors(inputs))
        raise TraceError(type(model).__name__, shapes, "", error) from error
    return [(place, tensor.detach()) for place, tensor in outputs if tensor.is_floating_point()]


def _require_runs(graph: ChannelGraph, inputs: Any) -> None:
    _run_cut(graph, inputs)


def _run_cut(graph: ChannelGraph, inputs: Any) -> Outputs:
    try:
        return _run(graph, inputs)
    except TraceError as error:
        raise _Differs(f"the cut model does not run on real inputs: {error.__cause__}") from error


def _tolerance(model: nn.Module) -> float:
    # Sums over fewer channels are added in another order; half of the digits is far more than that costs, and far less
    # than a channel too much or too little makes.
    kinds = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    return math.sqrt(max(torch.finfo(kind).eps for kind in kinds))


def _compare(now: Outputs, expected: Outputs, tolerance: float) -> None:
    for (place, tensor), (_, wanted) in zip(now, expected, strict=True):
        error = _difference(tensor, wanted)
        if not error <= tolerance:
            what = f"output {place!r}" if place else "the output"
            raise _Differs(
                f"on real inputs {what} of the cut model differs from that of the masked one by {error:.1e} of its "
                f"largest value ({tolerance:.1e} is rounding)"
            )


def _difference(first: Tensor, second: Tensor) -> float:
    """Return the largest difference over the largest value; infinite unless both are finite at the same places."""
    if first.shape != second.shape or not torch.equal(first.isfinite(), second.isfinite()):
        return float("inf")
    finite = second.isfinite()
    if not finite.any():
        return 0.0
    scale = second[finite].abs().max().double().clamp_min(torch.finfo(torch.float64).tiny)
    return float((first[finite].double() - second[finite].double()).abs().max() / scale)
