"""Results without data for the commonest operations. torch's own kernels for its meta device are Python, and take up to
a millisecond each; these take a few microseconds. Where a case is not plain, they leave it to torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _empty(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device)  # a quarter of what `x.new_empty` takes


def _unary(x: Tensor, *args: object, **kwargs: object) -> Any:
    """One floating tensor in, one like it out; `clone` keeps the order in memory as these operations do."""
    return x.clone() if x.is_floating_point() and not kwargs else NotImplemented


def _binary(x: object, y: object, *args: object, **kwargs: object) -> Any:
    """Two floating tensors of one type, or one and a number; of one shape and order in memory, or both contiguous."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or kwargs:
        return NotImplemented
    # A number never changes the type of a floating tensor; another tensor may, and is left to torch unless it matches.
    if isinstance(y, int | float):
        return x.clone()
    if not isinstance(y, Tensor) or y.dtype != x.dtype:
        return NotImplemented
    if (y.shape, y.stride()) == (x.shape, x.stride()):
        return x.clone()
    if x.dim() != y.dim() or not x.is_contiguous() or not y.is_contiguous():
        return NotImplemented
    sizes = list(zip(x.shape, y.shape, strict=True))
    if all(b in (1, a) for a, b in sizes):
        return x.clone()
    return y.clone() if all(a in (1, b) for a, b in sizes) else NotImplemented  # `gate * x`, as in squeeze-and-excite


def _mean(x: Tensor, dims: Any = None, keepdim: bool = False, **kwargs: object) -> Any:
    """The mean over some dimensions of a floating tensor in plain order."""
    if not isinstance(dims, list) or not dims or kwargs or not x.is_floating_point() or not x.is_contiguous():
        return NotImplemented
    reduced = {dim % x.dim() for dim in dims}
    shape = [1 if dim in reduced else size for dim, size in enumerate(x.shape) if keepdim or dim not in reduced]
    return _empty(x, *shape)


def _linear(bias: Tensor, x: Tensor, weight: Tensor, **kwargs: object) -> Any:
    """What `nn.Linear` runs on a batch: `(B, n)` and `(n, m)` in, `(B, m)` out."""
    plain = bias.dim() == 1 and bias.dtype == x.dtype == weight.dtype and not kwargs
    fits = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[0] and weight.shape[1] == len(bias)
    return _empty(x, x.shape[0], len(bias)) if plain and fits else NotImplemented


def _batch_norm(x: Tensor, weight: object, bias: object, mean: object, var: object, *rest: object) -> Any:
    return x.clone(), _empty(x, x.shape[1]), _empty(x, x.shape[1])


def _layer_norm(x: Tensor, shape: list[int], *rest: object) -> Any:
    if tuple(shape) != tuple(x.shape[x.dim() - len(shape) :]):
        return NotImplemented
    statistics = (*x.shape[: x.dim() - len(shape)], *[1] * len(shape))
    return x.clone(memory_format=torch.contiguous_format), _empty(x, *statistics), _empty(x, *statistics)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Any:
    """A convolution in plain order; torch's own kernel imports sympy, which takes two seconds."""
    space = x.dim() - 2
    plain = x.is_contiguous() and weight.is_contiguous() and x.dim() == weight.dim() and x.dtype == weight.dtype
    fits = not transposed and x.shape[1] == weight.shape[1] * groups and weight.shape[0] % groups == 0
    if not plain or not fits or not len(stride) == len(padding) == len(dilation) == space:
        return NotImplemented
    settings = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    sizes = [(n + 2 * pad - dilate * (k - 1) - 1) // step + 1 for n, k, step, pad, dilate in settings]
    return _empty(x, x.shape[0], weight.shape[0], *sizes) if min(sizes, default=0) > 0 else NotImplemented


# Only what shows up hundreds of times in common networks. Every entry is compared with torch's own kernel in
# tests/test_meta_kernels.py, over memory orders and types: a wrong stride here would make a later `view` fail or copy.
_UNARY = "relu gelu silu hardswish hardsigmoid hardtanh sigmoid tanh leaky_relu elu mish exp sqrt"

META_KERNELS: dict[str, Callable[..., Any]] = {
    **{f"aten.{name}": _unary for name in _UNARY.split()},
    **{f"aten.{name}": _binary for name in ("add", "mul", "sub", "div")},
    "aten.mean": _mean,
    "aten.addmm": _linear,
    "aten.convolution": _convolution,
    "aten.native_batch_norm": _batch_norm,
    "aten.native_layer_norm": _layer_norm,
}
