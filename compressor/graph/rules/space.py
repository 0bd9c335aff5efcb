"""Operations on space: pooling, interpolation, windows, regions. Channels beside space pass, those in it stay.

Shape letters: B batch, C channels, K regions, H and W (or any others) space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from compressor.graph.axes import UNPRUNABLE, Axis, unlabeled
from compressor.graph.context import Axes, Rule, TraceContext


def over_space(dims: int) -> Callable[..., Axes | list[Axes]]:
    """Return the rule of an operation that works on the last `dims` dimensions, channel by channel."""

    def rule(
        context: TraceContext, out: Tensor | Sequence[Tensor], x: Tensor, *args: object, **kwargs: object
    ) -> Axes | list[Axes]:
        axes = context.axes(x)
        # Counted from the end: pooling takes images with a batch in front and without.
        context.freeze(axes[len(axes) - dims :], "pooled or resized along this axis")
        first = out if isinstance(out, Tensor) else out[0]
        space = [unlabeled(size) for size in first.shape[first.dim() - dims :]]
        result: Axes = (*axes[: len(axes) - dims], *space)
        return result if isinstance(out, Tensor) else [result for _ in out]

    return rule


def fractional_pool(
    context: TraceContext, out: Sequence[Tensor], x: Tensor, kernel: object, size: object, draws: Tensor
) -> Axes | list[Axes]:
    """Pool windows of two dimensions that random numbers `draws` (B, C, 2) place, channel by channel."""
    for axis, other in zip(context.axes(x)[-4:-2], context.axes(draws)[-3:-1], strict=True):
        context.tie(axis, other)
    return over_space(2)(context, out, x)


def unpool(context: TraceContext, out: Tensor, x: Tensor, indices: Tensor, size: Sequence[int], *_: object) -> Axes:
    """Put `x` back to where `indices` say that the largest values were, plane by plane."""
    dims = len(size)
    beside = zip(context.axes(x)[:-dims], context.axes(indices)[:-dims], strict=True)
    context.freeze([*context.axes(x)[-dims:], *context.axes(indices)[-dims:]], "pooled or resized along this axis")
    return (*(context.tie(*each) for each in beside), *(unlabeled(extent) for extent in out.shape[-dims:]))


def im2col(context: TraceContext, out: Tensor, x: Tensor, kernel: Sequence[int], *_: object) -> Axes:
    """`x` (B, C, H, W) becomes (B, C * kernel, places): every channel becomes as many as the window has positions."""
    *front, channels = context.axes(x)[:-2]
    context.freeze(context.axes(x)[-2:], "a window slides over this axis")
    made = np.repeat(channels, kernel[0] * kernel[1]) if isinstance(channels, np.ndarray) else UNPRUNABLE
    return (*front, made, unlabeled(out.shape[-1]))


def col2im(context: TraceContext, out: Tensor, x: Tensor, *_: object) -> Axes:
    """The way back: `x` (B, C * kernel, places) becomes (B, C, H, W)."""
    *front, channels, places = context.axes(x)
    context.freeze(places, "windows are put together along this axis")
    return (*front, context.rectangle(channels, out.shape[-3], tie=1), *(unlabeled(size) for size in out.shape[-2:]))


def grid_sampler(context: TraceContext, out: Tensor, x: Tensor, grid: Tensor, *_: object) -> Axes:
    """`x` (B, C, ...) read at the places in `grid` (B, ..., coordinates)."""
    batch, channels, *space = context.axes(x)
    context.freeze([*space, *context.axes(grid)[1:]], "places of an image, by their coordinates")
    return (context.tie(batch, context.axes(grid)[0]), channels, *(unlabeled(size) for size in out.shape[2:]))


def regions(
    context: TraceContext, out: Tensor | Sequence[Tensor], x: Tensor, boxes: Tensor, *_: object
) -> Axes | list[Axes]:
    """`x` (B, C, H, W) pooled in `boxes` (K, 5), the first number of each of which names the image: (K, C, ...)."""
    batch, channels, *space = context.axes(x)
    # The batch too: the numbers in the boxes are positions along it.
    context.freeze([batch, *space, *context.axes(boxes)], "pooled in boxes of an image, by their numbers")
    first = out if isinstance(out, Tensor) else out[0]
    found: list[Axis] = [unlabeled(size) for size in first.shape]
    result: Axes = (found[0], channels, *found[2:])
    return result if isinstance(out, Tensor) else [result for _ in out]


def sensitive_regions(context: TraceContext, out: Sequence[Tensor], x: Tensor, boxes: Tensor, *_: object) -> list[Axes]:
    """The same where each part of a box has channels of its own: which ones follows from their number."""
    context.freeze([*context.axes(x), *context.axes(boxes)], "channels are taken by their place in a box")
    return [tuple(unlabeled(size) for size in tensor.shape) for tensor in out]


_SPACE = {
    1: "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d upsample_linear1d "
    "reflection_pad1d replication_pad1d",
    2: "max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d "
    "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa reflection_pad2d replication_pad2d",
    3: "max_pool3d max_pool3d_with_indices avg_pool3d adaptive_avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d "
    "upsample_nearest3d upsample_trilinear3d reflection_pad3d replication_pad3d",
}

RESIZING: dict[str, Rule] = {
    f"aten.{name}": over_space(dims) for dims, names in _SPACE.items() for name in names.split()
}

RULES: dict[str, Rule] = {
    **RESIZING,
    "aten.fractional_max_pool2d": fractional_pool,
    "aten.max_unpool2d": unpool,
    "aten.max_unpool3d": unpool,
    "aten.im2col": im2col,
    "aten.col2im": col2im,
    "aten.grid_sampler_2d": grid_sampler,
    "aten.grid_sampler_3d": grid_sampler,
    "torchvision.roi_align": regions,
    "torchvision.roi_pool": regions,
    "torchvision.ps_roi_align": sensitive_regions,
    "torchvision.ps_roi_pool": sensitive_regions,
}
