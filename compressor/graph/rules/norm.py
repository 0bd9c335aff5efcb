"""Normalisations. Per-channel ones tie channels to their statistics; those across channels lose exactness."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from compressor.graph.axes import FIXED, FREE, Axis
from compressor.graph.context import Axes, Flow, Rule
from compressor.graph.group import Offset
from compressor.graph.rules.indexing import settled


def batch_norm(flow: Flow, out: Sequence[Tensor], x: Tensor, *rest: object) -> list[Axes]:
    """`x` (B, C, ...) with per-channel weight, bias and running statistics, whichever of them are given."""
    axes = flow.axes(x)
    per_channel = [tensor for tensor in rest if isinstance(tensor, Tensor)]
    channels = flow.tie(axes[1], *(flow.axes(tensor)[0] for tensor in per_channel))
    for axis in (axes[0], *axes[2:]):
        flow.labels.mark_inexact(axis)
    _remember_running_mean(flow, x, rest)
    first: Axes = (axes[0], channels, *axes[2:])
    rest_axes = (tuple(channels if size else FIXED for size in tensor.shape) for tensor in list(out)[1:])
    return [first, *rest_axes]  # in evaluation mode torch gives empty statistics, its meta device full ones


def _remember_running_mean(flow: Flow, x: Tensor, rest: tuple[object, ...]) -> None:
    made_by, mean = flow.known(x).made_by, rest[2] if len(rest) > 2 else None
    if made_by and isinstance(mean, Tensor) and (name := flow.weight(mean)):
        flow.offsets.setdefault(made_by, Offset(name, -1))
        flow.normalised[made_by] = x


def layer_norm(flow: Flow, out: Sequence[Tensor], x: Tensor, shape: Sequence[int], *rest: object) -> list[Axes]:
    """Normalise over the last `len(shape)` dimensions together."""
    axes = flow.axes(x)
    start = x.dim() - len(shape)
    over: list[Axis] = list(axes[start:])
    for tensor in rest:
        if isinstance(tensor, Tensor):
            over = [flow.tie(axis, other) for axis, other in zip(over, flow.axes(tensor), strict=True)]
    for axis in over:
        flow.labels.mark_inexact(axis)
    statistics = (*axes[:start], *[FREE] * len(shape))
    return [(*axes[:start], *over), *(statistics[: tensor.dim()] for tensor in list(out)[1:])]


def group_norm(
    flow: Flow, out: Sequence[Tensor], x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: object
) -> list[Axes]:
    """Normalise over blocks of channels and space; blocks stay equal, so position j of every block is one channel."""
    groups = int(rest[3])  # type: ignore[call-overload]
    axes = flow.axes(x)
    flow.freeze(axes[2:], "normalised together with the channels")
    channels = flow.tie(axes[1], *(flow.axes(tensor)[0] for tensor in (weight, bias) if tensor is not None))
    if groups < x.shape[1]:
        flow.rectangle(channels, groups, tie=0)
        flow.labels.mark_inexact(channels)
    elif isinstance(channels, np.ndarray):
        flow.freeze(channels, "the number of normalised blocks is the number of channels")
    first: Axes = (axes[0], channels, *axes[2:])
    return [first, *((axes[0], FIXED)[: tensor.dim()] for tensor in list(out)[1:])]


def along(
    flow: Flow, out: Tensor | Sequence[Tensor], x: Tensor, dim: int, *rest: object, **_: object
) -> Axes | list[Axes]:
    """Softmax and cumulative operations along `dim`: the shape stays, the channels along it are mixed."""
    axes = list(flow.axes(x))
    if axes:
        flow.labels.mark_inexact(axes[dim])
        axes[dim] = settled(axes[dim], x.shape[dim])
    return tuple(axes) if isinstance(out, Tensor) else [tuple(axes) for _ in out]


RULES: dict[str, Rule] = {
    **{
        f"aten.{name}": batch_norm
        for name in (
            "native_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_functional",
            "_native_batch_norm_legit_no_training",
            "_batch_norm_with_update",
            "_batch_norm_no_update",
            "cudnn_batch_norm",
        )
    },
    "aten.native_layer_norm": layer_norm,
    "aten._fused_rms_norm": layer_norm,
    "aten.native_group_norm": group_norm,
    "aten._softmax": along,
    "aten._safe_softmax": along,
    "aten._log_softmax": along,
    "aten.cumsum": along,
    "aten.cumprod": along,
    "aten.logcumsumexp": along,
    "aten.cummax": along,
    "aten.cummin": along,
}
