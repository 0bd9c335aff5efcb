"""Allocation: which share of each layer's weights is off, so that the whole has the sparsity that was asked.

Pure functions of shapes. A shape is that of a PyTorch weight, `(out, in, *kernel)`; layers come in the order in which
the model has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from compressor.errors import BudgetError

Shapes: TypeAlias = Mapping[str, Sequence[int]]


def erdos_renyi(shapes: Shapes, sparsity: float, *, kernel: bool = True, power: float = 1.0) -> dict[str, float]:
    """Return every layer a density proportional to `(its dimensions' sum / their product) ** power` (ERK).

    Large layers become sparser than small ones. A layer whose density would exceed 1 stays dense, and the others make
    up for it.

    Args:
        shapes: weights' shapes by name.
        sparsity: the share of all weights that is off, in `[0, 1)`.
        kernel: all dimensions count; otherwise inputs and outputs alone do.
        power: how strongly densities differ; 0 makes them equal.

    Returns:
        By name, the share of the layer's weights that is off, in `[0, 1)`.

    Source: Mocanu et al. 2018, arXiv 1707.04780; with kernels Evci et al., RigL, arXiv 1911.11134. Layers' weights that
        are off are rounded down before the scale is found, as in the code of RigL.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    off = {name: int(sparsity * size) for name, size in sizes.items()}
    raw = {name: relative_density(shape, kernel=kernel, power=power) for name, shape in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(raw):
        room = sum(sizes[name] - off[name] if name not in dense else -off[name] for name in sizes)
        scale = room / sum(raw[name] * sizes[name] for name in raw if name not in dense)
        peak = max(raw[name] for name in raw if name not in dense)
        if scale * peak <= 1:
            break
        dense |= {name for name in raw if raw[name] == peak}
    return {name: 0.0 if name in dense else 1 - scale * raw[name] for name in raw}


def relative_density(shape: Sequence[int], *, kernel: bool = True, power: float = 1.0) -> float:
    """Return the density of a layer by Erdős-Rényi, up to a factor that all layers share."""
    counted = shape if kernel else shape[:2]
    return float((sum(counted) / math.prod(counted)) ** power)


def uniform(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Return all layers the same share, but for the first one, which stays dense.

    Args:
        shapes: weights' shapes by name.
        sparsity: the share of all weights that is off, in `[0, 1)`.

    Returns:
        By name, the share of the layer's weights that is off, in `[0, 1)`. A lone layer has the whole sparsity.

    Raises:
        BudgetError: the other layers are too small for so much.

    Source: Evci et al., RigL, arXiv 1911.11134. Ours makes the others a little sparser, so that the sparsity of the
        whole is what was asked.
    """
    first, *others = shapes
    if not others:
        return {first: sparsity}
    rest = sum(math.prod(shapes[name]) for name in others)
    whole = math.prod(shapes[first]) + rest
    share = sparsity * whole / rest
    if share >= 1:
        best = rest / whole
        raise BudgetError("weights", sparsity, best, [f"allocation 'uniform' leaves the first layer, {first!r}, whole"])
    return {first: 0.0, **dict.fromkeys(others, share)}


ALLOCATIONS: dict[str, Callable[[Shapes, float], dict[str, float]]] = {"erk": erdos_renyi, "uniform": uniform}


def counts_off(sizes: Mapping[str, int], sparsities: Mapping[str, float], total: int) -> dict[str, int]:
    """Round shares to whole weights, so that exactly `total` are off; at least one weight of every layer stays on.

    Args:
        sizes: number of weights by layer.
        sparsities: the share that is off, by layer. Layers where it is 0 stay dense.
        total: how many weights are off in all; fewer where so many cannot be.
    """
    most = {name: sizes[name] - 1 if sparsities[name] > 0 else 0 for name in sizes}
    exact = {name: sparsities[name] * sizes[name] for name in sizes}
    counts = {name: min(int(exact[name]), most[name]) for name in sizes}
    by_remainder = sorted(sizes, key=lambda name: counts[name] - exact[name])
    while sum(counts.values()) < min(total, sum(most.values())):
        for name in by_remainder:
            counts[name] += counts[name] < most[name] and sum(counts.values()) < total
    return counts
