"""Operations that contract channels with a weight, or with another activation: convolutions and matrix products.

Shape letters: B batch, C input channels, D output channels, G blocks of a grouped convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from torch import Tensor

from compressor.graph.axes import BROADCAST, UNPRUNABLE, Axis, unlabeled
from compressor.graph.context import Axes, Rule, TraceContext
from compressor.graph.group import Offset

_T = TypeVar("_T")


def convolution(
    context: TraceContext,
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
    batch, channels, *space = context.axes(x)
    context.freeze(space, "a kernel slides over this axis")
    context.mark_kernel_dims(context.axes(w)[2:])
    made = _conv_channels(
        context, channels, w, transposed, groups, blocks=_is_depthwise(context, x, w, transposed, groups)
    )
    if bias is not None:
        made = context.tie(made, *context.axes(bias))
    context.record_consumer(context.weight(w), -1 - len(space), channels)
    _remember_offset(context, w, bias, (0, 1 / math.prod(stride)) if transposed else None)
    # Every weight is used once for each place of the output; of a transposed convolution, of the input.
    places = (x if transposed else out).shape
    sizes = [(context.axes(w)[dim], w.shape[dim]) for dim in (0, 1)]
    context.cost(math.prod(places[2:]) * math.prod(w.shape[2:]), [(batch, x.shape[0]), *sizes])
    return (batch, made, *[UNPRUNABLE] * len(space))


def _is_depthwise(context: TraceContext, x: Tensor, w: Tensor, transposed: bool, groups: int) -> bool:
    """Return whether every block is one input channel by design, not because a cut left one."""
    return x.shape[1] == groups > 1 and (transposed or not isinstance(context.axes(w)[1], np.ndarray))


def _conv_channels(
    context: TraceContext, channels: Axis, w: Tensor, transposed: bool, groups: int, blocks: bool
) -> Axis:
    """Tie the input channels to the weight and return the output's channel axis."""
    first, second = context.axes(w)[:2]
    if blocks and not transposed:
        return _depthwise(context, channels, w, groups)
    if blocks:
        context.tie(channels, first)
        context.freeze(second, "the outputs of one block of a transposed convolution")
        return np.repeat(first, w.shape[1]) if isinstance(first, np.ndarray) else UNPRUNABLE
    # Grouped: `G` is an argument and stays, so every block loses the same positions (tie=0 down the blocks).
    if transposed:
        context.tie(channels, first)
        context.rectangle(first, groups, tie=0)
        context.mark_consumer(first)
        context.mark_producer(second)
        return second if groups == 1 else _tiled(second, groups)
    context.tie(context.rectangle(channels, groups, tie=0), second)
    context.rectangle(first, groups, tie=0)
    context.mark_consumer(second)
    context.mark_producer(first)
    return first


def _depthwise(context: TraceContext, channels: Axis, w: Tensor, groups: int) -> Axis:
    """One filter, or a few, for every input channel: the output's channels are the input's."""
    first = context.axes(w)[0]
    context.tie(channels, context.rectangle(first, groups, tie=1))
    if isinstance(first, np.ndarray) or not isinstance(channels, np.ndarray):
        return first
    return np.repeat(channels, w.shape[0] // groups)  # one kernel, expanded to as many as there are channels


def _tiled(axis: Axis, times: int) -> Axis:
    return np.tile(axis, times) if isinstance(axis, np.ndarray) else UNPRUNABLE


def _lies_as_stored(context: TraceContext, b: Tensor) -> bool:
    """Return whether `x @ b` reads a weight `(D, O)` as it is; a Linear's, `(O, D)`, comes as its transpose."""
    stored = context.parameters.get(context.weight(b) or "", (UNPRUNABLE,))[0]
    rows = context.axes(b)[0]
    return isinstance(stored, np.ndarray) and isinstance(rows, np.ndarray) and np.array_equal(stored, rows)


def _remember_offset(
    context: TraceContext, w: Tensor, bias: Tensor | None, layout: tuple[Literal[0, 1], float] | None = None
) -> None:
    name = context.weight(w)
    if name and layout:
        context.layouts[name] = layout
    target = context.weight(bias) if bias is not None and context.info(bias).unchanged else None
    # Of a weight that is made of another (weight_norm) the output for a constant is not known from that other alone.
    offset = Offset(target, 1, *(layout or ())) if target and context.info(w).unchanged else None
    context.set_offset(name, offset)


def deform_conv2d(
    context: TraceContext, out: Tensor, x: Tensor, w: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *numbers: Any
) -> Axes:
    """A convolution whose kernel reads at places that `offset` and `mask` move and weigh, the same for all channels."""
    *sizes, groups, offset_groups, _ = numbers
    for to_device in (offset, mask):
        context.freeze(context.axes(to_device)[1:], "moves or weighs the places of a kernel")
        context.tie(context.axes(x)[0], context.axes(to_device)[0])
    context.rectangle(context.axes(x)[1], offset_groups, tie=0)
    stride = sizes[:2]
    padding = sizes[2:4]
    dilation = sizes[4:]
    return convolution(context, out, x, w, bias, stride, padding, dilation, False, (0, 0), groups)


def mm(context: TraceContext, out: Tensor, a: Tensor, b: Tensor) -> Axes:
    """`a` (..., n, k) times `b` (..., k, m), with equal leading dimensions."""
    weight = context.weight(b)
    context.set_offset(weight or context.weight(a), None)
    if weight and _lies_as_stored(context, b):
        context.layouts[weight] = (0, 1.0)
    return _product(context, a, b)


def _product(context: TraceContext, a: Tensor, b: Tensor) -> Axes:
    *batch_a, rows, inner_a = context.axes(a)
    *batch_b, inner_b, columns = context.axes(b)
    is_norm = _is_norm(context, a, b)
    if context.tie(inner_a, inner_b) is BROADCAST:
        context.require_size(a, -1)  # a sum over an expanded axis is a product with its length
    # A weight on the right is a Linear's, transposed; on the left it is one that is applied to columns.
    if is_norm:
        context.labels.mark_inexact(inner_a)
    elif context.weight(b):
        context.mark_consumer(inner_b)
        context.mark_producer(columns)
        context.record_consumer(context.weight(b), -1, inner_a)
    elif context.weight(a):
        context.mark_consumer(inner_a)
        context.mark_producer(rows)
    else:
        context.labels.mark_contracted(inner_a)
        context.labels.mark_contracted(inner_b)
    batch = [context.tie(first, second) for first, second in zip(batch_a, batch_b, strict=True)]
    shapes = [*zip(batch, a.shape, strict=False), (rows, a.shape[-2]), (inner_b, a.shape[-1]), (columns, b.shape[-1])]
    context.cost(1, shapes)
    return (*batch, rows, columns)


def addmm(context: TraceContext, out: Tensor, bias: Tensor, a: Tensor, b: Tensor, **_: object) -> Axes:
    """`bias + a @ b`, also in its batched form."""
    axes = _product(context, a, b)
    _remember_offset(context, b, bias, (0, 1.0) if _lies_as_stored(context, b) else None)
    missing = len(axes) - bias.dim()  # a bias is broadcast from the end
    tied = (context.tie(axis, other) for axis, other in zip(axes[missing:], context.axes(bias), strict=True))
    return (*axes[:missing], *tied)


def linear(context: TraceContext, out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Axes:
    """`x` (..., C) with `w` (D, C)."""
    *rest, inner = context.axes(x)
    made, taken = context.axes(w)
    context.tie(inner, taken)
    context.mark_consumer(taken)
    context.mark_producer(made)
    context.record_consumer(context.weight(w), -1, inner)
    _remember_offset(context, w, bias)
    context.cost(1, [*zip(rest, x.shape, strict=False), (made, w.shape[0]), (taken, w.shape[1])])
    return (*rest, context.tie(made, *(context.axes(bias) if bias is not None else ())))


def mv(context: TraceContext, out: Tensor, a: Tensor, b: Tensor) -> Axes:
    """`a` (n, k) times the vector `b` (k,)."""
    rows, inner = context.axes(a)
    is_norm = _is_norm(context, a, b)
    if context.tie(inner, context.axes(b)[0]) is BROADCAST:
        context.require_size(a, -1)
    if is_norm:
        context.labels.mark_inexact(inner)
    elif context.weight(b):
        context.mark_consumer(context.axes(b)[0])
    elif context.weight(a):
        context.mark_consumer(inner)
    else:
        context.labels.mark_inexact(inner)
    context.cost(1, [(rows, a.shape[0]), (inner, a.shape[1])])
    return (rows,)


def dot(context: TraceContext, out: Tensor, a: Tensor, b: Tensor) -> Axes:
    """The sum of products of two vectors."""
    inner = context.tie(context.axes(a)[0], context.axes(b)[0])
    context.labels.mark_inexact(inner)
    if inner is BROADCAST:
        context.require_size(a, -1)
    return ()


def _is_norm(context: TraceContext, a: Tensor, b: Tensor) -> bool:
    """Return whether a weight meets a buffer that is kept for it (spectral_norm): a cut changes the sum."""
    return context.main_weight((a, b)) is not None and (context.is_buffer(a) or context.is_buffer(b))


def embedding(context: TraceContext, out: Tensor, w: Tensor, indices: Tensor, *_: object) -> Axes:
    """Rows of `w` (N, D) at `indices` (...)."""
    # Words of a vocabulary are no channels: to remove one would change which word a number means.
    context.freeze(context.axes(w)[0], "rows are looked up by index")
    context.mark_producer(context.axes(w)[1])
    return (*context.axes(indices), context.axes(w)[1])


def attention(
    context: TraceContext, out: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object
) -> list[Axes]:
    """Fused attention: of `q`, `k` (B, H, N, E) and `v` (B, H, N, F) the result is (B, H, N, F)."""
    axes = [context.axes(tensor) for tensor in (q, k, v)]
    batch, heads = (context.tie(*(each[dim] for each in axes)) for dim in (0, 1))
    # The width of queries and keys is contracted, and scales the scores by its root: rather cut whole heads.
    context.labels.mark_contracted(context.tie(axes[0][3], axes[1][3]))
    for each in axes:
        context.freeze(each[2], "attention runs over this axis")
    shape = [(batch, q.shape[0]), (heads, q.shape[1])]
    context.cost(q.shape[2] * k.shape[2], [*shape, (axes[0][3], q.shape[3])])
    context.cost(q.shape[2] * k.shape[2], [*shape, (axes[2][3], v.shape[3])])
    first: Axes = (batch, heads, UNPRUNABLE, axes[2][3])
    rest = [tensor for tensor in out[1:] if isinstance(tensor, Tensor)]
    return [
        first,
        *((batch, heads, UNPRUNABLE) if t.dim() == 3 else tuple(unlabeled(s) for s in t.shape) for t in rest),
    ]


def trilinear(
    context: TraceContext,
    out: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *dims: Sequence[int],
    unroll_dim: int = 1,
) -> Axes:
    """The product of three tensors, each with dimensions of size one put in, summed over `dims[3]` (`F.bilinear`)."""
    *added, summed = dims[:4]
    axes = [_widened(context.axes(tensor), at) for tensor, at in zip((a, b, c), added, strict=True)]
    shapes = [_widened(tensor.shape, at) for tensor, at in zip((a, b, c), added, strict=True)]
    met = [context.tie(*(axis for axis in each if axis is not None)) for each in zip(*axes, strict=True)]
    sizes = [max(size or 1 for size in each) for each in zip(*shapes, strict=True)]
    context.cost(1, list(zip(met, sizes, strict=True)))
    for tensor, each in zip((a, b, c), axes, strict=True):
        for dim, axis in enumerate(each):
            if context.weight(tensor) and axis is not None:
                (context.mark_consumer if dim in summed else context.mark_producer)(axis)
    return tuple(axis for dim, axis in enumerate(met) if dim not in summed)


def _widened(values: Sequence[_T], at: Sequence[int]) -> list[_T | None]:
    """Put None in at these places, in order."""
    found: list[_T | None] = list(values)
    for place in sorted(at):
        found.insert(place, None)
    return found


def cdist(context: TraceContext, out: Tensor, a: Tensor, b: Tensor, *_: object) -> Axes:
    """Distances between the rows of `a` (..., P, C) and those of `b` (..., R, C): (..., P, R)."""
    *batch_a, rows_a, inner_a = context.axes(a)
    *batch_b, rows_b, inner_b = context.axes(b)
    inner = context.tie(inner_a, inner_b)
    context.labels.mark_inexact(inner)
    if inner is BROADCAST:
        context.require_size(a, -1)
    context.cost(1, [*zip(context.axes(a), a.shape, strict=True), (rows_b, b.shape[-2])])
    return (*(context.tie(*each) for each in zip(batch_a, batch_b, strict=True)), rows_a, rows_b)


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
    "aten.dot": dot,
    "aten.vdot": dot,
    "aten.embedding": embedding,
    "aten._scaled_dot_product_flash_attention_for_cpu": attention,
    "aten._scaled_dot_product_flash_attention": attention,
    "aten._scaled_dot_product_efficient_attention": attention,
}
