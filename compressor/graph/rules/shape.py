"""Operations that move positions about: views, permutations, concatenation, slices. Index arithmetic on labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from compressor.graph.axes import BROADCAST, UNPRUNABLE, Axis, unlabeled
from compressor.graph.context import Axes, Rule, TraceContext
from compressor.graph.rules.indexing import with_distinct_positions


def view(context: TraceContext, out: Tensor, x: Tensor, *args: object, **kwargs: object) -> Axes:
    """Merge and split dimensions, one block of them at a time."""
    axes: list[Axis] = [BROADCAST] * out.dim()
    before = [_Dim(size, isinstance(axis, np.ndarray)) for size, axis in zip(x.shape, context.axes(x), strict=True)]
    after = [_Dim(size, context.was_labelled(x, dim)) for dim, size in enumerate(out.shape)]
    # (2, 4, 3, 3) -> (2, 36) has the blocks [2]-[2] and [4 3 3]-[36]: each is merged, then split, on its own, so that
    # channels stay apart from a batch that a view only carries along.
    for merged, split in _blocks(before, after):
        axis = context.labels.merge([context.axes(x)[dim] for dim in merged], [x.shape[dim] for dim in merged])
        for dim, each in zip(split, context.labels.split(axis, [out.shape[dim] for dim in split]), strict=True):
            axes[dim] = each
    return tuple(axes)


class _Dim(NamedTuple):
    """A dimension, and whether channels stand on it; of a result, whether they did before the cut."""

    size: int
    labelled: bool


def _blocks(before: Sequence[_Dim], after: Sequence[_Dim]) -> Iterator[tuple[list[int], list[int]]]:
    """Return the smallest runs of dimensions, of two shapes, that hold equally many elements.

    Dimensions of size one belong nowhere, unless they carry a channel, the last one that a cut left. Such a one goes
    with the run before it if the other side of that run is labelled, as in (2, 1, 6) -> (2, 6) where 2 images with one
    head each were 8 of both.
    """
    left, right = ([dim for dim, each in enumerate(side) if each != (1, False)] for side in (before, after))
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        while (m := math.prod(before[dim].size for dim in a)) != (n := math.prod(after[dim].size for dim in b)):
            a.append(left.pop(0)) if m < n else b.append(right.pop(0))
        while left and before[left[0]].size == 1 and any(after[dim].labelled for dim in b):
            a.append(left.pop(0))
        while right and after[right[0]].size == 1 and any(before[dim].labelled for dim in a):
            b.append(right.pop(0))
        yield a, b


def permute(context: TraceContext, out: Tensor, x: Tensor, dims: Sequence[int]) -> Axes:
    """Reorder dimensions."""
    return tuple(context.axes(x)[dim] for dim in dims)


def transpose(context: TraceContext, out: Tensor, x: Tensor, first: int = 0, second: int = 1) -> Axes:
    """Swap two dimensions."""
    axes = list(context.axes(x))
    if len(axes) > 1:
        axes[first], axes[second] = axes[second], axes[first]
    return tuple(axes)


def expand(context: TraceContext, out: Tensor, x: Tensor, *args: object, **kwargs: object) -> Axes:
    """Repeat size-one dimensions, and add dimensions in front."""
    axes = list(context.axes(x))
    for dim, (axis, size) in enumerate(zip(axes, out.shape[out.dim() - x.dim() :], strict=True)):
        if isinstance(axis, np.ndarray) and len(axis) != size:
            context.freeze(axis, "one position is taken for many")
            axes[dim] = UNPRUNABLE
    return (*[BROADCAST] * (out.dim() - x.dim()), *axes)


def repeat(context: TraceContext, out: Tensor, x: Tensor, times: Sequence[int]) -> Axes:
    """Lay copies of the tensor one behind the other."""
    axes = (*[BROADCAST] * (out.dim() - x.dim()), *context.axes(x))
    return tuple(np.tile(a, n) if isinstance(a, np.ndarray) else a for a, n in zip(axes, times, strict=True))


def repeat_interleave(
    context: TraceContext, out: Tensor, x: Tensor, times: object, dim: int | None = None, **_: object
) -> Axes:
    """Repeat every position `times` times in place."""
    if dim is None or not isinstance(times, int):
        return _frozen_result(context, out, x, "repeated by a number that depends on data, or flattened")
    return tuple(
        np.repeat(axis, times) if index == dim % x.dim() and isinstance(axis, np.ndarray) else axis
        for index, axis in enumerate(context.axes(x))
    )


def cat(context: TraceContext, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Axes:
    """Join along `dim`; the other dimensions meet position by position."""
    tensors = [tensor for tensor in tensors if tensor.dim() == out.dim()]
    dim %= out.dim()
    axes = [
        _concatenated(context, tensors, dim)
        if index == dim
        else context.tie(*(context.axes(tensor)[index] for tensor in tensors))
        for index in range(out.dim())
    ]
    return tuple(axes)


def _concatenated(context: TraceContext, tensors: Sequence[Tensor], dim: int) -> Axis:
    parts = [(context.axes(tensor)[dim], tensor.shape[dim]) for tensor in tensors]
    # Batches, images and tokens are concatenated too: where nothing has channels, nothing needs labels.
    if not any(isinstance(axis, np.ndarray) for axis, _ in parts):
        return UNPRUNABLE
    return np.concatenate([_labels_for(context, axis, size) for axis, size in parts])


def _labels_for(context: TraceContext, axis: Axis, size: int) -> np.ndarray:
    """Return labels even for positions that cannot be cut, so that they can stand beside others."""
    if isinstance(axis, np.ndarray):
        return axis
    labels = context.labels.new_axis(size)
    context.freeze(labels, "stands beside channels but has none itself (padding, input or constant)")
    return labels


def pad(context: TraceContext, out: Tensor, x: Tensor, widths: Sequence[int], *args: object) -> Axes:
    """Add constant positions at the ends; a negative width takes positions away."""
    axes = list(context.axes(x))
    for index in range(len(widths) // 2):
        dim = x.dim() - 1 - index
        before = widths[2 * index]
        after = widths[2 * index + 1]
        axis = axes[dim]
        if not isinstance(axis, np.ndarray):
            axes[dim] = axis if before == after == 0 else UNPRUNABLE
            continue
        axis = _cropped(context, axis, max(-before, 0), len(axis) - max(-after, 0))
        parts = [(_labels_for(context, UNPRUNABLE, width) if width > 0 else axis[:0]) for width in (before, after)]
        axes[dim] = np.concatenate([parts[0], axis, parts[1]])
    return tuple(axes)


def stack(context: TraceContext, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Axes:
    """Join along a new dimension."""
    axes: list[Axis] = [context.tie(*each) for each in zip(*(context.axes(tensor) for tensor in tensors), strict=True)]
    axes.insert(dim % out.dim(), BROADCAST if len(tensors) == 1 else UNPRUNABLE)
    return tuple(axes)


def split(context: TraceContext, out: Sequence[Tensor], x: Tensor, sizes: object, dim: int = 0) -> list[Axes]:
    """Cut a tensor into pieces along `dim`. Equal pieces stay equal: position j of each is one channel."""
    axis = context.axes(x)[dim]
    dim = dim % x.dim()
    lengths = [piece.shape[dim] for piece in out]
    if isinstance(axis, np.ndarray) and len(out) > 1:
        # `x.chunk(2)` and `x.split(c // 2)` look the same here; if the length was a number in the code, a cut shows it.
        if len(set(lengths)) == 1:
            context.rectangle(axis, len(out), tie=0)
        elif not all(context.has_size_attribute(length) for length in lengths):
            context.freeze(axis, f"split into pieces of fixed sizes {lengths}")
    ends = np.cumsum(lengths).tolist()
    return [
        _replaced(context, x, dim, axis[end - size : end] if isinstance(axis, np.ndarray) else axis, size)
        for end, size in zip(ends, lengths, strict=True)
    ]


def _replaced(context: TraceContext, x: Tensor, dim: int, axis: Axis, size: int) -> Axes:
    axes = list(context.axes(x))
    axes[dim] = axis if isinstance(axis, np.ndarray) else unlabeled(size)
    return tuple(axes)


def unbind(context: TraceContext, out: Sequence[Tensor], x: Tensor, dim: int = 0) -> list[Axes]:
    """Take every position along `dim` as a tensor of its own."""
    return [select(context, piece, x, dim, index) for index, piece in enumerate(out)]


def select(context: TraceContext, out: Tensor, x: Tensor, dim: int, index: int) -> Axes:
    """Take one position along `dim`."""
    axes = list(context.axes(x))
    context.freeze(axes.pop(dim), "one position is taken by its number")
    return tuple(axes)


def slice_(
    context: TraceContext,
    out: Tensor,
    x: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Axes:
    """Take `start:end:step` along `dim`. Equal blocks stay equal; other bounds are fixed numbers, and hold."""
    dim %= x.dim()
    axis = context.axes(x)[dim]
    size = x.shape[dim]
    first, last, _ = slice(start, end, 1).indices(size)
    if not isinstance(axis, np.ndarray) or (last - first == size and step == 1):
        return _replaced(context, x, dim, axis, out.shape[dim])
    if step == 1:
        return _replaced(context, x, dim, _cropped(context, axis, first, last), out.shape[dim])
    # `x[:, 1::2]` takes one of every pair: pairs stay whole. Only if it goes on to the end is that all there is to it.
    if size % step or last - first + first % step != size:
        context.freeze(axis, f"every {step}th position is taken from {size}")
    else:
        context.rectangle(axis, size // step, tie=1)
    return _replaced(context, x, dim, axis[first:last:step], out.shape[dim])


def _cropped(context: TraceContext, axis: np.ndarray, first: int, last: int) -> np.ndarray:
    """Return a run of an axis. One of several equal blocks ties all of them; any other bound is a fixed number."""
    size = len(axis)
    width = last - first
    if width == size:
        return axis
    if width > 1 and size % width == 0 and first % width == 0:
        context.rectangle(axis, size // width, tie=0)
    # A bound that is an attribute of the module follows a cut (`sizes.replace_size_attributes`). Otherwise what stands
    # before it must stay, or the slice would begin elsewhere; what is behind the last bound may go.
    elif not all(context.has_size_attribute(bound) for bound in {first, last} - {0, size}):
        context.freeze(
            axis[:first] if last == size else axis[:last], f"positions {first} to {last} of {size} are taken"
        )
    return axis[first:last]


def unfold(context: TraceContext, out: Tensor, x: Tensor, dim: int, size: int, step: int) -> Axes:
    """Return every window along `dim`, as a new last dimension."""
    axes = list(context.axes(x))
    context.freeze(axes[dim], "a window slides over this axis")
    axes[dim] = UNPRUNABLE
    return (*axes, UNPRUNABLE)


def flip(context: TraceContext, out: Tensor, x: Tensor, dims: Sequence[int]) -> Axes:
    """Reverse the order of positions."""
    turned = {dim % x.dim() for dim in dims}
    return tuple(_reversed(axis) if dim in turned else axis for dim, axis in enumerate(context.axes(x)))


def _reversed(axis: Axis) -> Axis:
    return axis[::-1] if isinstance(axis, np.ndarray) else axis


def roll(context: TraceContext, out: Tensor, x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Axes:
    """Shift positions around; along channels the shift is a fixed number, so they stay."""
    if not dims:
        return _frozen_result(context, out, x, "rolled as a flat sequence")
    axes = list(context.axes(x))
    for shift, dim in zip(shifts, dims, strict=True):
        # Which channel meets which depends on the shift and on how many there are: after a cut, on others.
        context.freeze(axes[dim], f"rolled by {shift} positions")
        axis = axes[dim]
        axes[dim] = np.roll(axis, shift) if isinstance(axis, np.ndarray) else axis
    return tuple(axes)


def rot90(context: TraceContext, out: Tensor, x: Tensor, k: int = 1, dims: Sequence[int] = (0, 1)) -> Axes:
    """Turn the plane of two dimensions by `k` quarters."""
    axes = list(context.axes(x))
    first, second = dims
    for _ in range(k % 4):
        axes[first], axes[second] = _reversed(axes[second]), axes[first]
    return tuple(axes)


def diagonal(context: TraceContext, out: Tensor, x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Axes:
    """Take the positions where two dimensions have the same number, as a new last dimension."""
    taken = {dim1 % x.dim(), dim2 % x.dim()}
    context.freeze([context.axes(x)[dim] for dim in taken], "positions are taken where two numbers agree")
    return (*(axis for dim, axis in enumerate(context.axes(x)) if dim not in taken), unlabeled(out.shape[-1]))


def triangle(context: TraceContext, out: Tensor, x: Tensor, *_: object) -> Axes:
    """Zero what is above or below the diagonal of the last two dimensions."""
    context.freeze(context.axes(x)[-2:], "zero above or below a diagonal")
    return (
        *context.axes(x)[:-2],
        *(with_distinct_positions(axis, size) for axis, size in zip(context.axes(x)[-2:], x.shape[-2:], strict=True)),
    )


def glu(context: TraceContext, out: Tensor, x: Tensor, dim: int = -1) -> Axes:
    """Multiply the first half by the sigmoid of the second."""
    dim %= x.dim()
    return _replaced(context, x, dim, context.rectangle(context.axes(x)[dim], 2, tie=0), out.shape[dim])


def channel_shuffle(context: TraceContext, out: Tensor, x: Tensor, groups: int) -> Axes:
    """Read channels as `(groups, C / groups)` and write them transposed; the number of groups is fixed."""
    axes = list(context.axes(x))
    context.rectangle(axes[1], groups, tie=0)
    if isinstance(axes[1], np.ndarray):
        axes[1] = axes[1].reshape(groups, -1).T.ravel()
    return tuple(axes)


def pixel_shuffle(context: TraceContext, out: Tensor, x: Tensor, factor: int) -> Axes:
    """Move blocks of `factor * factor` channels into space."""
    *front, channels, _, _ = context.axes(x)
    return (*front, context.rectangle(channels, out.shape[-3], tie=1), UNPRUNABLE, UNPRUNABLE)


def pixel_unshuffle(context: TraceContext, out: Tensor, x: Tensor, factor: int) -> Axes:
    """Move blocks of space into `factor * factor` channels each."""
    *front, channels, _, _ = context.axes(x)
    made = np.repeat(channels, factor * factor) if isinstance(channels, np.ndarray) else channels
    return (*front, made, UNPRUNABLE, UNPRUNABLE)


def squeeze(context: TraceContext, out: Tensor, x: Tensor, *args: object) -> Axes:
    """Drop dimensions of size one; which ones shows in the result."""
    if not args:
        return tuple(axis for axis, size in zip(context.axes(x), x.shape, strict=True) if size != 1)
    dims: list[int] = list(args[0]) if isinstance(args[0], list | tuple) else [int(str(args[0]))]
    dropped = {dim % max(x.dim(), 1) for dim in dims}
    return tuple(
        a for dim, (a, n) in enumerate(zip(context.axes(x), x.shape, strict=True)) if dim not in dropped or n != 1
    )


def unsqueeze(context: TraceContext, out: Tensor, x: Tensor, dim: int) -> Axes:
    """Add a dimension of size one."""
    axes = list(context.axes(x))
    axes.insert(dim % out.dim(), BROADCAST)
    return tuple(axes)


def as_strided(
    context: TraceContext, out: Tensor, x: Tensor, shape: Sequence[int], stride: Sequence[int], *start: int
) -> Axes:
    """Read memory in another order; only where the order of positions stays is it known what they are."""
    order = [dim for dim, size in enumerate(shape) if size != 1]
    if list(shape) == list(x.shape) and all(stride[dim] == x.stride(dim) for dim in order):
        return context.axes(x)
    return _frozen_result(context, out, x, "memory is read in another order")


def _frozen_result(context: TraceContext, out: Tensor, x: Tensor, why: str) -> Axes:
    context.freeze(context.axes(x), why)
    return tuple(unlabeled(size) for size in out.shape)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("aten.view", "aten._unsafe_view", "aten.reshape", "aten._reshape_alias", "aten.flatten"), view),
    "aten.unflatten": view,
    "aten.permute": permute,
    "aten.transpose": transpose,
    "aten.t": transpose,
    "aten.expand": expand,
    "aten.broadcast_to": expand,
    "aten.repeat": repeat,
    "aten.repeat_interleave": repeat_interleave,
    "aten.cat": cat,
    "aten.constant_pad_nd": pad,
    "aten.stack": stack,
    **dict.fromkeys(("aten.split", "aten.split_with_sizes", "aten.unsafe_split", "aten.chunk"), split),
    "aten.as_strided": as_strided,
    "aten.unbind": unbind,
    "aten.select": select,
    "aten.slice": slice_,
    "aten.unfold": unfold,
    "aten.flip": flip,
    "aten.roll": roll,
    "aten.rot90": rot90,
    "aten.diagonal": diagonal,
    "aten.tril": triangle,
    "aten.triu": triangle,
    "aten.glu": glu,
    "aten.native_channel_shuffle": channel_shuffle,
    "aten.channel_shuffle": channel_shuffle,
    "aten.pixel_shuffle": pixel_shuffle,
    "aten.pixel_unshuffle": pixel_unshuffle,
    "aten.squeeze": squeeze,
    "aten.unsqueeze": unsqueeze,
}
