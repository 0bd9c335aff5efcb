"""Normalisations. Per-channel ones tie channels to their statistics; those across channels lose exactness."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from compressor.graph.axes import BROADCAST, UNPRUNABLE, Axis
from compressor.graph.context import Axes, Rule, TraceContext
from compressor.graph.group import Offset
from compressor.graph.rules.indexing import with_distinct_positions


def batch_norm(context: TraceContext, out: Sequence[Tensor], x: Tensor, *rest: object) -> list[Axes]:
    """`x` (B, C, ...) with per-channel weight, bias and running statistics, whichever of them are given."""
    axes = context.axes(x)
    per_channel = [tensor for tensor in rest if isinstance(tensor, Tensor)]
    channels = context.tie(axes[1], *(context.axes(tensor)[0] for tensor in per_channel))
    # Without running statistics it averages over batch and space; channels that stand there are mixed.
    for axis in (axes[0], *axes[2:]):
        context.labels.mark_inexact(axis)
    _remember_running_mean(context, x, rest)
    first: Axes = (axes[0], channels, *axes[2:])
    rest_axes = (tuple(channels if size else UNPRUNABLE for size in tensor.shape) for tensor in list(out)[1:])
    return [first, *rest_axes]  # in evaluation mode torch returns empty statistics, its meta device full ones


def _remember_running_mean(context: TraceContext, x: Tensor, rest: tuple[object, ...]) -> None:
    produced_by = context.info(x).produced_by
    mean = rest[2] if len(rest) > 2 else None
    # Where the convolution has a bias, that takes the constant: setdefault.
    if produced_by and isinstance(mean, Tensor) and (name := context.weight(mean)):
        context.offsets.setdefault(produced_by, Offset(name, -1, *context.layouts.get(produced_by, ())))
        context.batch_norm_inputs[produced_by] = x


def layer_norm(
    context: TraceContext, out: Sequence[Tensor], x: Tensor, shape: Sequence[int], *rest: object
) -> list[Axes]:
    """Normalise over the last `len(shape)` dimensions together."""
    axes = context.axes(x)
    start = x.dim() - len(shape)
    over: list[Axis] = list(axes[start:])
    for tensor in rest:
        if isinstance(tensor, Tensor):
            over = [context.tie(axis, other) for axis, other in zip(over, context.axes(tensor), strict=True)]
    # A masked channel still counts in the mean and the variance, a cut one does not.
    for axis in over:
        context.labels.mark_inexact(axis)
    statistics = (*axes[:start], *[BROADCAST] * len(shape))
    return [(*axes[:start], *over), *(statistics[: tensor.dim()] for tensor in list(out)[1:])]


def group_norm(
    context: TraceContext, out: Sequence[Tensor], x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: object
) -> list[Axes]:
    """Normalise over blocks of channels and space; blocks stay equal, so position j of every block is one channel."""
    groups = int(rest[3])  # type: ignore[call-overload]
    axes = context.axes(x)
    context.freeze(axes[2:], "normalised together with the channels")
    channels = context.tie(axes[1], *(context.axes(tensor)[0] for tensor in (weight, bias) if tensor is not None))
    # Blocks of several channels lose the same positions; blocks of one channel (instance norm) cannot lose any, because
    # their number is an argument in the module's code.
    if groups < x.shape[1]:
        context.rectangle(channels, groups, tie=0)
        context.labels.mark_inexact(channels)
    elif isinstance(channels, np.ndarray):
        context.freeze(channels, "the number of normalised blocks is the number of channels")
    first: Axes = (axes[0], channels, *axes[2:])
    return [first, *((axes[0], UNPRUNABLE)[: tensor.dim()] for tensor in list(out)[1:])]


def weight_norm(context: TraceContext, out: Sequence[Tensor], v: Tensor, g: Tensor, dim: int = 0) -> list[Axes]:
    """`g * v / |v|`, a norm for each position along `dim`, over all other dimensions of `v` together."""
    axes = list(context.axes(v))
    dim %= v.dim()
    axes[dim] = context.tie(axes[dim], context.axes(g)[dim])
    for other in {*range(v.dim())} - {dim}:
        context.labels.mark_inexact(axes[other])
    return [tuple(axes), tuple(axes[dim] if each == dim else BROADCAST for each in range(v.dim()))]


def along(
    context: TraceContext, out: Tensor | Sequence[Tensor], x: Tensor, dim: int, *rest: object, **_: object
) -> Axes | list[Axes]:
    """Softmax and cumulative operations along `dim`: the shape stays, the channels along it are mixed."""
    axes = list(context.axes(x))
    if axes:
        context.labels.mark_inexact(axes[dim])
        axes[dim] = with_distinct_positions(axes[dim], x.shape[dim])
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
    "aten._weight_norm_interface": weight_norm,
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
