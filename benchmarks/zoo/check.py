"""Is the cut right? Half the channels of every group go, and the outputs are held against the masked model's.

First the exact groups, for which masked = cut must hold; then the others, after which the model must still run.
Everything is in double precision, on weights and statistics that are not trivial.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import compressor
from compressor._utils import as_arguments, eval_mode
from compressor.errors import CutError, StaleGraphError
from compressor.graph import ChannelGraph
from compressor.surgery import mask_channels, removed_channels

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    Attributes:
        name: the model's name in its library.
        build: gives it with fresh weights, the same every time.
        inputs: gives what it is run on, in single precision.
        heads: submodules whose outputs are compared instead of the model's own, where those depend on the data in
            number and order (the boxes that a detector leaves over).
        dtype: the precision that it is checked in; single for models that insist on it.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    heads: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64


def check(case: Case, row: Row) -> None:
    """Trace, cut and compare; writes figures and the verdict into the row as they come.

    An error of the library is a figure too: the verdict is then "crash", with the step at which it happened.
    """
    step, row["verdict"] = "build", ""
    try:
        model, inputs = shaken(case.build()).to(case.dtype), _in_precision(case.inputs(), case.dtype)
        step = "trace"
        graph = _traced(model, inputs, row)
        step = "run after the trace"  # not before it: here shows what the trace left behind in the model
        whole = outputs(model, inputs, case.heads)
        params = _params(model)
        for step in ("exact", "inexact"):
            try:
                _cut_and_compare(graph, case.heads, step, whole, row)
            except StaleGraphError:  # the run in between filled a cache
                graph = _traced(model, inputs, row)
                row["notes"] = "; ".join(filter(None, [row["notes"], "traced again after the model ran"]))
                _cut_and_compare(graph, case.heads, step, whole, row)
        row["params cut %"] = 100 * (1 - _params(model) / params)
        row["verdict"], row["reason"] = _verdict(row, TOLERANCE[case.dtype]), _reason(graph, row)
    except Exception as failure:
        text = " ".join(f"{type(failure).__name__}: {failure}".split())
        row |= {"verdict": "crash", "reason": f"{step}: {text[:300]}"}


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """Put the model in double precision and evaluation mode, without trivial statistics, scales or biases.

    Constant weights are shaken too: behind a layer scale of 1e-6 or a last layer of zeros no error would show.
    """
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                tensor.copy_(noise + 0.5)
            elif name.endswith("running_mean") or (isinstance(tensor, nn.Parameter) and _plain(tensor)):
                tensor.add_(0.2 * (noise - 0.5))
    return model


def _plain(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and (tensor.dim() <= 1 or bool((tensor == tensor.flatten()[0]).all()))


def _in_precision(inputs: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _traced(model: nn.Module, inputs: Any, row: Row) -> ChannelGraph:
    start = time.perf_counter()
    graph = compressor.trace(model, inputs)
    row["build ms"] = 1e3 * (time.perf_counter() - start)
    row |= {"groups": len(graph.groups), "frozen": len(graph.frozen)}
    row |= {"exact": sum(group.exact for group in graph.groups), "refused": 0, "notes": "; ".join(graph.notes)}
    row["channels"] = sum(graph.sizes().values())
    return graph


# -- cutting


def half(graph: ChannelGraph, exact: bool | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Keep a random half of every group, at least one channel; of the exact ones alone, or of the others, if asked."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.randperm(group.size, generator=generator)[: math.ceil(group.size / 2)]
        for group in graph.groups
        if exact is None or group.exact == exact
    }


def _cut_and_compare(graph: ChannelGraph, heads: Sequence[str], step: str, whole: Sequence[Tensor], row: Row) -> None:
    """Cut half of every group of a kind, and hold the outputs against those of the masked model."""
    keep = _accepted(graph, step == "exact", row)
    if not keep:
        return
    resized = tree_map(_resized, graph.example_inputs)
    expected, elsewhere = ([], [])
    if step == "exact":
        expected = _masked_outputs(graph, keep, heads, graph.example_inputs)
        with suppress(Exception):  # many models take images of one size alone
            elsewhere = _masked_outputs(graph, keep, heads, resized)
    start = time.perf_counter()
    compressor.cut(graph, keep)
    row["cut ms"] = row.get("cut ms", 0.0) + 1e3 * (time.perf_counter() - start)
    row[f"{step} cut"] = len(keep)
    if expected:
        row["effect"] = relative_error(expected, whole)
    _compare(graph, heads, expected, graph.example_inputs, "error", row)
    if elsewhere:
        _compare(graph, heads, elsewhere, resized, "error at another size", row)


def _resized(value: Any) -> Any:
    """Return an image `(..., 3, H, W)` taller by 32 pixels and wider by 64; everything else as it is."""
    if (
        not isinstance(value, Tensor)
        or value.dim() < 3
        or value.shape[-3] not in (1, 3)
        or not value.is_floating_point()
    ):
        return value
    height, width = value.shape[-2:]
    return value.repeat(*[1] * (value.dim() - 2), 2, 2)[..., : height + 32, : width + 64]


class _Accepted(Exception):
    """The cut would go through."""


def _take_back() -> None:
    raise _Accepted


def _accepted(graph: ChannelGraph, exact: bool, row: Row) -> dict[str, Tensor]:
    """Find out which groups can be cut; nothing is. One that refuses is frozen, the others are tried without it."""
    while keep := {name: kept for name, kept in half(graph, exact).items() if len(kept) < graph[name].size}:
        try:
            compressor.cut(graph, keep, check=_take_back)
        except _Accepted:
            break
        except StaleGraphError:
            raise
        except CutError as refusal:
            if not set(refusal.groups) & set(graph.sizes()):
                raise
            row["refused"] += len(refusal.groups)
            graph.freeze(refusal.groups, refusal.reason)
    return keep


def _compare(
    graph: ChannelGraph, heads: Sequence[str], expected: Sequence[Tensor], inputs: Any, column: str, row: Row
) -> None:
    """Run the cut model. What it cannot do any more is wrong, not an error of the benchmark."""
    try:
        result = outputs(graph.model, inputs, heads)
    except Exception as failure:
        row["wrong"] = f"the cut model does not run: {type(failure).__name__}: {failure}"
        return
    if expected:
        row[column] = relative_error(result, expected)
    if not all(bool(tensor.isfinite().all()) for tensor in result):
        row["wrong"] = "the cut model's outputs are not finite"


@contextmanager
def masked(graph: ChannelGraph, keep: Mapping[str, Tensor]) -> Iterator[None]:
    """Silence what is not kept; afterwards the weights are as before. A copy of the largest models would not fit."""
    tensors = dict(graph.model.named_parameters())
    names = {member.tensor for name in keep for member in graph[name].of_role("consumer")}
    saved = {name: tensors[name].detach().clone() for name in names}
    mask_channels(graph, {name: removed_channels(graph[name], kept) for name, kept in keep.items()})
    try:
        yield
    finally:
        with torch.no_grad():
            for name, values in saved.items():
                tensors[name].copy_(values)


def _masked_outputs(graph: ChannelGraph, keep: Mapping[str, Tensor], heads: Sequence[str], inputs: Any) -> list[Tensor]:
    """Return the outputs of the model in which the channels that are not kept are masked."""
    with masked(graph, keep):
        return outputs(graph.model, inputs, heads)


# -- comparing


def outputs(model: nn.Module, inputs: Any, heads: Sequence[str] = ()) -> list[Tensor]:
    """Return every floating-point tensor in the model's outputs, or in those of its heads, in order."""
    args, kwargs = as_arguments(inputs)
    seen: list[Any] = []
    with eval_mode(model), ExitStack() as hooks:
        for name in heads:
            hook = model.get_submodule(name).register_forward_hook(lambda *call: seen.append(call[-1]))
            hooks.callback(hook.remove)
        result = model(*args, **kwargs)
    leaves = tree_leaves(seen if heads else result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference over the largest value, the worst of all tensors; infinite for other shapes."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return math.inf
    errors = [float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(found, expected, strict=True)]
    return max((error if error == error else math.inf for error in errors), default=math.inf)


# -- the verdict


def _verdict(row: Row, tolerance: float) -> str:
    if "wrong" in row or max(row.get("error", 0.0), row.get("error at another size", 0.0)) > tolerance:
        return "WRONG"
    return "right" if "exact cut" in row else "runs" if "inexact cut" in row else "refused"


def _reason(graph: ChannelGraph, row: Row) -> str:
    """Say what is wrong, or what keeps most channels from being cut."""
    if "wrong" in row:
        return " ".join(str(row.pop("wrong")).split())[:300]
    usual = ("model output", "aten.convolution: meets an axis without channels")  # the classifier, the image
    unusual = [each.reason for each in graph.frozen if not _cause(each.reason).startswith(usual)]
    first = {_cause(reason): reason for reason in reversed(unusual)}
    return "; ".join(f"{count}x {first[cause]}" for cause, count in Counter(map(_cause, unusual)).most_common(3))


def _cause(reason: str) -> str:
    """Return a reason without modules and numbers: what modules of the same kind have in common."""
    return re.sub(r" in (the model|\S+)(?=:| does)| \(weight shape.*|\d+", "", reason)
