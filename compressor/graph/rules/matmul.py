"""Operations that contract channels with a weight, or with another activation: convolutions and matrix products.

Shape letters: B batch, C input channels, D output channels, G blocks of a grouped convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from compressor.graph.axes import FIXED, FREE, Axis, blank
from compressor.graph.context import Axes, Flow, Rule
from compressor.graph.group import Offset

_T = TypeVar("_T")


def convolution(
    flow: Flow,
    out: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Axes:
    """`x` (B, C, ...) with `w` (D, C/G, ...), or (C, D/G, ...) where transposed."""
    batch, channels, *space = flow.axes(x)
    flow.freeze(space, "a kernel slides over this axis")
    flow.no_channels(flow.axes(w)[2:])
    made = _conv_channels(flow, channels, w, transposed, groups, blocks=_is_depthwise(flow, x, w, transposed, groups))
    if bias is not None:
        made = flow.tie(made, *flow.axes(bias))
    flow.see(flow.weight(w), -1 - len(space), channels)
    _remember_offset(flow, w, bias)
    places = (x if transposed else out).shape
    sizes = [(flow.axes(w)[dim], w.shape[dim]) for dim in (0, 1)]
    flow.cost(math.prod(places[2:]) * math.prod(w.shape[2:]), [(batch, x.shape[0]), *sizes])
    return (batch, made, *[FIXED] * len(space))


def _is_depthwise(flow: Flow, x: Tensor, w: Tensor, transposed: bool, groups: int) -> bool:
    """Tell whether every block is one input channel by design, not because a cut left one."""
    return x.shape[1] == groups > 1 and (transposed or not isinstance(flow.axes(w)[1], np.ndarray))


def _conv_channels(flow: Flow, channels: Axis, w: Tensor, transposed: bool, groups: int, blocks: bool) -> Axis:
    """Tie the input channels to the weight and give the output's channel axis."""
    first, second = flow.axes(w)[:2]
    if blocks and not transposed:
        return _depthwise(flow, channels, first, groups)
    if blocks:
        flow.tie(channels, first)
        flow.freeze(second, "the outputs of one block of a transposed convolution")
        return np.repeat(first, w.shape[1]) if isinstance(first, np.ndarray) else FIXED
    if transposed:
        flow.tie(channels, first)
        flow.rectangle(first, groups, tie=0)
        flow.consume(first)
        flow.produce(second)
        return second if groups == 1 else _tiled(second, groups)
    flow.tie(flow.rectangle(channels, groups, tie=0), second)
    flow.rectangle(first, groups, tie=0)
    flow.consume(second)
    flow.produce(first)
    return first


def _depthwise(flow: Flow, channels: Axis, first: Axis, groups: int) -> Axis:
    """One filter, or a few, for every input channel: the output's channels are the input's."""
    flow.tie(channels, flow.rectangle(first, groups, tie=1))
    return first


def _tiled(axis: Axis, times: int) -> Axis:
    return np.tile(axis, times) if isinstance(axis, np.ndarray) else FIXED


def _remember_offset(flow: Flow, w: Tensor, bias: Tensor | None) -> None:
    weight, target = flow.weight(w), flow.weight(bias) if bias is not None else None
    if weight and target:
        flow.offsets[weight] = Offset(target, 1)


def deform_conv2d(
    flow: Flow, out: Tensor, x: Tensor, w: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *numbers: Any
) -> Axes:
    """A convolution whose kernel reads at places that `offset` and `mask` move and weigh, the same for all channels."""
    *sizes, groups, offset_groups, _ = numbers
    for moved in (offset, mask):
        flow.freeze(flow.axes(moved)[1:], "moves or weighs the places of a kernel")
        flow.tie(flow.axes(x)[0], flow.axes(moved)[0])
    flow.rectangle(flow.axes(x)[1], offset_groups, tie=0)
    stride, padding, dilation = sizes[:2], sizes[2:4], sizes[4:]
    return convolution(flow, out, x, w, bias, stride, padding, dilation, False, (0, 0), groups)


def mm(flow: Flow, out: Tensor, a: Tensor, b: Tensor) -> Axes:
    """`a` (..., n, k) times `b` (..., k, m), with equal leading dimensions."""
    *batch_a, rows, inner_a = flow.axes(a)
    *batch_b, inner_b, columns = flow.axes(b)
    if flow.tie(inner_a, inner_b) is FREE:
        flow.hold(a, -1)
    if flow.weight(b):
        flow.consume(inner_b)
        flow.produce(columns)
        flow.see(flow.weight(b), -1, inner_a)
    elif flow.weight(a):
        flow.consume(inner_a)
        flow.produce(rows)
    else:
        flow.labels.mark_mixed(inner_a)
        flow.labels.mark_mixed(inner_b)
    batch = [flow.tie(first, second) for first, second in zip(batch_a, batch_b, strict=True)]
    shapes = [*zip(batch, a.shape, strict=False), (rows, a.shape[-2]), (inner_b, a.shape[-1]), (columns, b.shape[-1])]
    flow.cost(1, shapes)
    return (*batch, rows, columns)


def addmm(flow: Flow, out: Tensor, bias: Tensor, a: Tensor, b: Tensor, **_: object) -> Axes:
    """`bias + a @ b`, also in its batched form."""
    axes = mm(flow, out, a, b)
    _remember_offset(flow, b, bias)
    missing = len(axes) - bias.dim()
    tied = (flow.tie(axis, other) for axis, other in zip(axes[missing:], flow.axes(bias), strict=True))
    return (*axes[:missing], *tied)


def linear(flow: Flow, out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Axes:
    """`x` (..., C) with `w` (D, C)."""
    *rest, inner = flow.axes(x)
    made, taken = flow.axes(w)
    flow.tie(inner, taken)
    flow.consume(taken)
    flow.produce(made)
    flow.see(flow.weight(w), -1, inner)
    _remember_offset(flow, w, bias)
    flow.cost(1, [*zip(rest, x.shape, strict=False), (made, w.shape[0]), (taken, w.shape[1])])
    return (*rest, flow.tie(made, *(flow.axes(bias) if bias is not None else ())))


def mv(flow: Flow, out: Tensor, a: Tensor, b: Tensor) -> Axes:
    """`a` (n, k) times the vector `b` (k,)."""
    rows, inner = flow.axes(a)
    if flow.tie(inner, flow.axes(b)[0]) is FREE:
        flow.hold(a, -1)
    if flow.weight(b):
        flow.consume(flow.axes(b)[0])
    elif flow.weight(a):
        flow.consume(inner)
    else:
        flow.labels.mark_inexact(inner)
    flow.cost(1, [(rows, a.shape[0]), (inner, a.shape[1])])
    return (rows,)


def embedding(flow: Flow, out: Tensor, w: Tensor, indices: Tensor, *_: object) -> Axes:
    """Rows of `w` (N, D) at `indices` (...)."""
    flow.freeze(flow.axes(w)[0], "rows are looked up by index")
    flow.produce(flow.axes(w)[1])
    return (*flow.axes(indices), flow.axes(w)[1])


def attention(
    flow: Flow, out: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object
) -> list[Axes]:
    """Fused attention: `q`, `k` (B, H, N, E) and `v` (B, H, N, F) give (B, H, N, F)."""
    axes = [flow.axes(tensor) for tensor in (q, k, v)]
    batch, heads = (flow.tie(*(each[dim] for each in axes)) for dim in (0, 1))
    flow.labels.mark_mixed(flow.tie(axes[0][3], axes[1][3]))
    for each in axes:
        flow.freeze(each[2], "attention runs over this axis")
    shape = [(batch, q.shape[0]), (heads, q.shape[1])]
    flow.cost(q.shape[2] * k.shape[2], [*shape, (axes[0][3], q.shape[3])])
    flow.cost(q.shape[2] * k.shape[2], [*shape, (axes[2][3], v.shape[3])])
    first: Axes = (batch, heads, FIXED, axes[2][3])
    rest = [tensor for tensor in out[1:] if isinstance(tensor, Tensor)]
    return [first, *((batch, heads, FIXED) if t.dim() == 3 else tuple(blank(s) for s in t.shape) for t in rest)]


def trilinear(
    flow: Flow,
    out: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *dims: Sequence[int],
    unroll_dim: int = 1,
) -> Axes:
    """The product of three tensors, each with dimensions of size one put in, summed over `dims[3]` (`F.bilinear`)."""
    *added, summed = dims[:4]
    axes = [_widened(flow.axes(tensor), at) for tensor, at in zip((a, b, c), added, strict=True)]
    shapes = [_widened(tensor.shape, at) for tensor, at in zip((a, b, c), added, strict=True)]
    met = [flow.tie(*(axis for axis in each if axis is not None)) for each in zip(*axes, strict=True)]
    sizes = [max(size or 1 for size in each) for each in zip(*shapes, strict=True)]
    flow.cost(1, list(zip(met, sizes, strict=True)))
    for tensor, each in zip((a, b, c), axes, strict=True):
        for dim, axis in enumerate(each):
            if flow.weight(tensor) and axis is not None:
                (flow.consume if dim in summed else flow.produce)(axis)
    return tuple(axis for dim, axis in enumerate(met) if dim not in summed)


def _widened(values: Sequence[_T], at: Sequence[int]) -> list[_T | None]:
    """Put None in at these places, in order."""
    found: list[_T | None] = list(values)
    for place in sorted(at):
        found.insert(place, None)
    return found


def cdist(flow: Flow, out: Tensor, a: Tensor, b: Tensor, *_: object) -> Axes:
    """Distances between the rows of `a` (..., P, C) and those of `b` (..., R, C): (..., P, R)."""
    *batch_a, rows_a, inner_a = flow.axes(a)
    *batch_b, rows_b, inner_b = flow.axes(b)
    inner = flow.tie(inner_a, inner_b)
    flow.labels.mark_inexact(inner)
    if inner is FREE:
        flow.hold(a, -1)
    flow.cost(1, [*zip(flow.axes(a), a.shape, strict=True), (rows_b, b.shape[-2])])
    return (*(flow.tie(*each) for each in zip(batch_a, batch_b, strict=True)), rows_a, rows_b)


RULES: dict[str, Rule] = {
    "aten.convolution": convolution,
    "torchvision.deform_conv2d": deform_conv2d,
    "aten._trilinear": trilinear,
    "aten._cdist_forward": cdist,
    "aten.mm": mm,
    "aten.bmm": mm,
    "aten.addmm": addmm,
    "aten.baddbmm": addmm,
    "aten.linear": linear,
    "aten.mv": mv,
    "aten.embedding": embedding,
    "aten._scaled_dot_product_flash_attention_for_cpu": attention,
    "aten._scaled_dot_product_flash_attention": attention,
    "aten._scaled_dot_product_efficient_attention": attention,
}
