"""Reductions and everything that works on space: pooling, interpolation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from compressor.graph.axes import FREE, Axis, blank
from compressor.graph.flow import Axes, Flow, Rule


def reduction(
    flow: Flow,
    out: Tensor | Sequence[Tensor],
    x: Tensor,
    *args: object,
    **kwargs: object,
) -> Axes | list[Axes]:
    """Reduce over the dimensions given, or over all. Channels that are reduced are mixed without a weight."""
    dims = kwargs.get("dim", next((arg for arg in args if isinstance(arg, list | tuple)), None))
    if dims is None and args and isinstance(args[0], int) and not isinstance(args[0], bool):
        dims = [args[0]]
    return _reduced(flow, out, x, dims)


def vector_norm(
    flow: Flow, out: Tensor, x: Tensor, order: float = 2, dims: object = None, *_: object, **__: object
) -> Axes:
    """`linalg.vector_norm`: its first argument is the order, the second the dimensions."""
    axes = _reduced(flow, out, x, dims)
    assert isinstance(axes, tuple)
    return axes


def _reduced(flow: Flow, out: Tensor | Sequence[Tensor], x: Tensor, dims: object) -> Axes | list[Axes]:
    chosen = [dims] if isinstance(dims, int) else list(dims) if isinstance(dims, list | tuple) else []
    gone = {int(dim) % x.dim() for dim in chosen} if chosen and x.dim() else set(range(x.dim()))
    first = out if isinstance(out, Tensor) else out[0]
    axes: list[Axis] = []
    for dim, axis in enumerate(flow.axes(x)):
        if dim not in gone:
            axes.append(axis)
            continue
        flow.labels.mark_inexact(axis)
        if first.dim() == x.dim():
            axes.append(FREE)
    result = tuple(axes)
    return result if isinstance(out, Tensor) else [result for _ in out]


def ordering(
    flow: Flow, out: Tensor | Sequence[Tensor], x: Tensor, *args: object, **kwargs: object
) -> Axes | list[Axes]:
    """Sort, topk, argmax: what comes out is positions, which a cut would renumber. Channels stay."""
    for tensor in (x, *args, *kwargs.values()):
        if isinstance(tensor, Tensor):
            flow.freeze(flow.axes(tensor), "the result depends on channel positions")
    tensors = [out] if isinstance(out, Tensor) else list(out)
    found: list[Axes] = [tuple(blank(size) for size in tensor.shape) for tensor in tensors]
    return found[0] if isinstance(out, Tensor) else found


def over_space(dims: int) -> Callable[..., Axes | list[Axes]]:
    """Give the rule of an operation that works on the last `dims` dimensions, channel by channel."""

    def rule(
        flow: Flow, out: Tensor | Sequence[Tensor], x: Tensor, *args: object, **kwargs: object
    ) -> Axes | list[Axes]:
        axes = flow.axes(x)
        flow.freeze(axes[len(axes) - dims :], "pooled or resized along this axis")
        first = out if isinstance(out, Tensor) else out[0]
        space = [blank(size) for size in first.shape[first.dim() - dims :]]
        result: Axes = (*axes[: len(axes) - dims], *space)
        return result if isinstance(out, Tensor) else [result for _ in out]

    return rule


_REDUCTIONS = "mean sum amax amin prod any all logsumexp var std var_mean std_mean max min aminmax nansum"
_ORDERING = "sort topk argsort argmax argmin kthvalue median mode unique_consecutive searchsorted bucketize nonzero"
_SPACE = {
    1: "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d upsample_linear1d "
    "reflection_pad1d replication_pad1d",
    2: "max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d "
    "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa reflection_pad2d replication_pad2d fractional_max_pool2d",
    3: "max_pool3d max_pool3d_with_indices avg_pool3d adaptive_avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d "
    "upsample_nearest3d upsample_trilinear3d reflection_pad3d replication_pad3d",
}

RULES: dict[str, Rule] = {
    **{f"aten.{name}": reduction for name in _REDUCTIONS.split()},
    "aten.linalg_vector_norm": vector_norm,
    "aten.norm": vector_norm,
    **{f"aten.{name}": ordering for name in _ORDERING.split()},
    **{f"aten.{name}": over_space(dims) for dims, names in _SPACE.items() for name in names.split()},
}
