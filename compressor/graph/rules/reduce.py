"""Reductions: sums, means, extremes and norms over whole dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from compressor.graph.axes import FREE, Axis
from compressor.graph.context import Axes, Flow, Rule


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
        flow.hold(x, dim)
        if first.dim() == x.dim():
            axes.append(FREE)
    result = tuple(axes)
    return result if isinstance(out, Tensor) else [result for _ in out]


_REDUCTIONS = "mean sum amax amin prod any all logsumexp var std var_mean std_mean max min aminmax nansum count_nonzero"

RULES: dict[str, Rule] = {
    **{f"aten.{name}": reduction for name in _REDUCTIONS.split()},
    "aten.linalg_vector_norm": vector_norm,
    "aten.norm": vector_norm,
}
