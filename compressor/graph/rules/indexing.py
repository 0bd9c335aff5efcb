"""Operations that return positions as numbers, or take numbers for positions.

A cut would renumber positions, so an axis that is sorted, searched or indexed keeps its channels; other axes pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from compressor.graph.axes import BROADCAST, UNPRUNABLE, Axis, unlabeled
from compressor.graph.context import Axes, Rule, TraceContext

_ORDERED = "the result depends on channel positions"
_TAKEN = "positions are taken by number"


def with_distinct_positions(axis: Axis, size: int) -> Axis:
    """Return the axis of a result whose positions differ even where those of its source are all alike."""
    return axis if isinstance(axis, np.ndarray) else unlabeled(size)


# -- numbers come out


def ordering(place: int, default: int | None) -> Callable[..., Axes | list[Axes]]:
    """Return the rule of sort, topk, argmax: they order positions along `dim`, argument number `place` after `x`."""

    def rule(
        context: TraceContext, out: Tensor | Sequence[Tensor], x: Tensor, *args: object, **kwargs: object
    ) -> Axes | list[Axes]:
        dim = kwargs.get("dim", args[place] if len(args) > place else default)
        if not isinstance(dim, int) or x.dim() == 0:
            return by_value(context, out, x)
        first = out if isinstance(out, Tensor) else out[0]
        axes = list(context.axes(x))
        context.freeze(axes.pop(dim), _ORDERED)
        if first.dim() == x.dim():
            axes.insert(dim % x.dim(), unlabeled(first.shape[dim]))
        return tuple(axes) if isinstance(out, Tensor) else [tuple(axes) for _ in out]

    return rule


def by_value(
    context: TraceContext, out: Tensor | Sequence[Tensor], *args: object, **kwargs: object
) -> Axes | list[Axes]:
    """Positions are found by their values, wherever they are: all channels stay."""
    # How many there are depends on values as well, so that what follows may have other sizes in every run.
    for tensor in (*args, *kwargs.values()):
        if isinstance(tensor, Tensor):
            context.freeze(context.axes(tensor), _ORDERED)
    tensors = [out] if isinstance(out, Tensor) else list(out)
    found: list[Axes] = [tuple(unlabeled(size) for size in tensor.shape) for tensor in tensors]
    return found[0] if isinstance(out, Tensor) else found


# -- numbers go in


def index_select(context: TraceContext, out: Tensor, x: Tensor, dim: int, index: Tensor) -> Axes:
    """Take positions by a list of numbers."""
    axes = list(context.axes(x))
    axes[dim] = _taken(context, x, dim % x.dim(), index)
    return tuple(axes)


def _taken(context: TraceContext, x: Tensor, dim: int, index: Tensor) -> Axis:
    """Return what is left of an axis whose positions a buffer of the model names: a cut renumbers the buffer.

    Numbers that stand elsewhere, or name rows of a parameter, cannot follow a cut: those channels stay.
    """
    axis = context.axes(x)[dim]
    values = context.index_values(index)
    if isinstance(axis, np.ndarray) and values is not None and not context.weight(x):
        chosen = axis[values]
        if context.register_index_buffer(index, axis):
            context.tie(context.axes(index)[0], chosen)
            return chosen
    context.freeze([axis, *context.axes(index)], _TAKEN)
    return UNPRUNABLE if len(index) != 1 else BROADCAST


def index(context: TraceContext, out: Tensor, x: Tensor, indices: Sequence[Tensor | None]) -> Axes:
    """Advanced indexing: indexed dimensions are replaced by those of the (broadcast) indices."""
    given = [(dim, each) for dim, each in enumerate(indices) if each is not None]
    if len(given) == 1 and given[0][1].dim() == 1:
        return index_select(context, out, x, *given[0])
    return _indexed(context, x, indices)


def _indexed(context: TraceContext, x: Tensor, indices: Sequence[Tensor | None]) -> Axes:
    """Freeze what indices name, and return the axes of `x[indices]`."""
    used = [dim for _, dims in _covered(indices) for dim in dims]
    context.freeze([context.axes(x)[dim] for dim in used], _TAKEN)
    for each, _ in _covered(indices):
        context.freeze(context.axes(each), "a table of positions")
    kept = [(dim, axis) for dim, axis in enumerate(context.axes(x)) if dim not in used]
    wide = max(1 if _is_mask(each) else each.dim() for each, _ in _covered(indices))
    # As in numpy: the indexed dimensions go where they were if they stand side by side, else to the front.
    together = used == list(range(used[0], used[0] + len(used)))
    at = sum(dim < used[0] for dim, _ in kept) if together else 0
    axes = [axis for _, axis in kept]
    return (*axes[:at], *[UNPRUNABLE] * wide, *axes[at:])


def _covered(indices: Sequence[Tensor | None]) -> list[tuple[Tensor, list[int]]]:
    """Return each index with the dimensions that it stands for: one, or as many as a mask has."""
    found = []
    dim = 0
    for each in indices:
        width = each.dim() if each is not None and _is_mask(each) else 1
        if each is not None:
            found.append((each, list(range(dim, dim + width))))
        dim += width
    return found


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def index_put(
    context: TraceContext, out: Tensor, x: Tensor, indices: Sequence[Tensor | None], values: Tensor, *_: object
) -> Axes:
    """Write `values` to where the indices point. One value under a mask goes wherever the mask goes."""
    covered = _covered(indices)
    # A mask says of each position whether, not of a number where: it follows a cut like any other factor.
    if values.numel() == 1 and all(_is_mask(each) for each, _ in covered):
        axes = list(context.axes(x))
        for each, dims in covered:
            for dim, axis in zip(dims, context.axes(each), strict=True):
                axes[dim] = context.tie(axes[dim], axis)
        return tuple(axes)
    place = _indexed(context, x, indices)
    for axis, other, size in zip(place[::-1], context.axes(values)[::-1], reversed(values.shape), strict=False):
        if size != 1:
            context.tie(axis, other)
    return tuple(with_distinct_positions(axis, size) for axis, size in zip(context.axes(x), x.shape, strict=True))


def gather(context: TraceContext, out: Tensor, x: Tensor, dim: int, index: Tensor, *_: object, **__: object) -> Axes:
    """Take values by number along `dim`; along the other dimensions `x` and `index` meet."""
    return _meet_beside(context, dim, index, x)


def scatter(context: TraceContext, out: Tensor, x: Tensor, dim: int, index: Tensor, *rest: object, **_: object) -> Axes:
    """Write values by number along `dim`; along the other dimensions `x`, `index` and the values meet."""
    values = [each for each in rest if isinstance(each, Tensor) and each.dim() == x.dim()]
    return _meet_beside(context, dim, x, index, *values)


def index_add(
    context: TraceContext, out: Tensor, x: Tensor, dim: int, index: Tensor, *rest: object, **_: object
) -> Axes:
    """Write whole lines by number along `dim`; along the other dimensions `x` and the lines meet."""
    context.freeze(context.axes(index), "a table of positions")
    values = [each for each in rest if isinstance(each, Tensor) and each.dim() == x.dim()]
    return _meet_beside(context, dim, x, *values)


def slice_scatter(context: TraceContext, out: Tensor, x: Tensor, source: Tensor, *_: object, **__: object) -> Axes:
    """Write `source` over a slice of `x`; where it covers a dimension wholly, they meet."""
    return _meet_beside(context, None, x, source)


def select_scatter(context: TraceContext, out: Tensor, x: Tensor, source: Tensor, dim: int, index: int) -> Axes:
    """Write `source` over one position along `dim`."""
    axes = list(context.axes(x))
    line = with_distinct_positions(axes.pop(dim), x.shape[dim])
    context.freeze(line, "one position is taken by its number")
    met = [context.tie(*each) for each in zip(axes, context.axes(source), strict=True)]
    met.insert(dim % x.dim(), line)
    return tuple(met)


def _meet_beside(context: TraceContext, dim: int | None, *tensors: Tensor) -> Axes:
    """Tie tensors position by position except along `dim`, and return the axes of the first.

    Where one is shorter than another, that one's first positions are taken, which is a fixed number.
    """
    found: list[Axis] = []
    for at, size in enumerate(tensors[0].shape):
        here = [context.axes(tensor)[at] for tensor in tensors]
        numbered = dim is not None and at == dim % tensors[0].dim()
        if numbered or any(tensor.shape[at] != size for tensor in tensors):
            context.freeze(here, _TAKEN)
            found.append(with_distinct_positions(here[0], size))
        else:
            found.append(context.tie(*here))
    return tuple(found)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("aten.sort", "aten.argsort", "aten.mode"), ordering(0, -1)),
    **dict.fromkeys(("aten.topk", "aten.kthvalue"), ordering(1, -1)),
    **dict.fromkeys(("aten.argmax", "aten.argmin", "aten.median", "aten.nanmedian"), ordering(0, None)),
    **dict.fromkeys(
        ("aten.unique_consecutive", "aten.searchsorted", "aten.bucketize", "aten.nonzero", "torchvision.nms"), by_value
    ),
    "aten.index_select": index_select,
    "aten.index": index,
    "aten.index_put": index_put,
    "aten.gather": gather,
    **dict.fromkeys(("aten.scatter", "aten.scatter_add", "aten.scatter_reduce"), scatter),
    **dict.fromkeys(("aten.index_add", "aten.index_copy", "aten.index_fill"), index_add),
    "aten.slice_scatter": slice_scatter,
    "aten.select_scatter": select_scatter,
}
