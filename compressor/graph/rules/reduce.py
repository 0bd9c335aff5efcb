"""Reductions: sums, means, extremes and norms over whole dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from compressor.graph.axes import BROADCAST, Axis
from compressor.graph.context import Axes, Rule, TraceContext


def reduction(
    context: TraceContext,
    out: Tensor | Sequence[Tensor],
    x: Tensor,
    *args: object,
    **kwargs: object,
) -> Axes | list[Axes]:
    """Reduce over the dimensions given, or over all. Channels that are reduced are mixed without a weight."""
    dims = kwargs.get("dim", next((arg for arg in args if isinstance(arg, list | tuple)), None))
    # `any(x, dim)` has a number there; `var(x, unbiased)` has a bool, which is an int too.
    if dims is None and args and isinstance(args[0], int) and not isinstance(args[0], bool):
        dims = [args[0]]
    return _reduced(context, out, x, dims)


def vector_norm(
    context: TraceContext, out: Tensor, x: Tensor, order: float = 2, dims: object = None, *_: object, **__: object
) -> Axes:
    """`linalg.vector_norm`: its first argument is the order, the second the dimensions."""
    axes = _reduced(context, out, x, dims)
    assert isinstance(axes, tuple)
    return axes


def _reduced(context: TraceContext, out: Tensor | Sequence[Tensor], x: Tensor, dims: object) -> Axes | list[Axes]:
    chosen = [dims] if isinstance(dims, int) else list(dims) if isinstance(dims, list | tuple) else []
    reduced = {int(dim) % x.dim() for dim in chosen} if chosen and x.dim() else set(range(x.dim()))
    first = out if isinstance(out, Tensor) else out[0]
    axes: list[Axis] = []
    for dim, axis in enumerate(context.axes(x)):
        if dim not in reduced:
            axes.append(axis)
            continue
        # A masked channel is a zero among what is averaged, or the largest value; a cut one is not there.
        context.labels.mark_inexact(axis)
        context.require_size(x, dim)
        if first.dim() == x.dim():
            axes.append(BROADCAST)
    result = tuple(axes)
    return result if isinstance(out, Tensor) else [result for _ in out]


_REDUCTIONS = "mean sum amax amin prod any all logsumexp var std var_mean std_mean max min aminmax nansum count_nonzero"

RULES: dict[str, Rule] = {
    **{f"aten.{name}": reduction for name in _REDUCTIONS.split()},
    "aten.linalg_vector_norm": vector_norm,
    "aten.norm": vector_norm,
}
