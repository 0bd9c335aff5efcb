"""Operations that work position by position, with broadcasting: channels meet where positions meet."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from compressor.graph.axes import BROADCAST, UNPRUNABLE, Axis
from compressor.graph.context import Axes, Rule, TraceContext


def pointwise(context: TraceContext, out: Tensor, *args: object, **kwargs: object) -> Axes:
    """Tie all inputs position by position. A broadcast axis of size one ties nothing."""
    tensors = [tensor for tensor in _tensors([*args, *kwargs.values()]) if tensor.dim() > 0]
    if len(tensors) > 1 and context.main_weight(tensors):
        tensors.sort(key=context.is_buffer)  # of a weight and its mask, the result has the labels of the weight
    # From the last dimension backwards, as broadcasting aligns.
    return tuple(_meet(context, out.shape, tensors, dim) for dim in range(-out.dim(), 0))


# NOTE: Axes of size one are left out where the result is larger: they are read again and again, and meet nobody.
def _meet(context: TraceContext, shape: tuple[int, ...], tensors: list[Tensor], dim: int) -> Axis:
    return context.tie(*(context.axes(t)[dim] for t in tensors if t.dim() >= -dim and t.shape[dim] == shape[dim]))


def _tensors(values: Iterable[object]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(_tensors(value))
    return found


def filled(context: TraceContext, out: Tensor, *args: object, **kwargs: object) -> Axes:
    """A new tensor of one value, or of any: its positions are whatever they meet (and it may be written to)."""
    # NOTE: Labels of its own, not BROADCAST: `torch.zeros(1, 64, 1, 1)` is 64 positions, and a number in the code. Tied
    # to the channels that it meets, it shows after a cut as what does not follow.
    return tuple(BROADCAST if size == 1 else context.labels.new_axis(size) for size in out.shape)


def like(context: TraceContext, out: Tensor, x: Tensor, *args: object, **kwargs: object) -> Axes:
    """A tensor shaped like `x`, or `x` itself in another memory layout or type."""
    return context.axes(x)


def channelwise_dropout(context: TraceContext, out: tuple[Tensor, Tensor], x: Tensor, *args: object) -> list[Axes]:
    """Dropout with its mask."""
    return [context.axes(x), context.axes(x)]


def log_sigmoid(context: TraceContext, out: tuple[Tensor, Tensor], x: Tensor) -> list[Axes]:
    """The result, and a buffer for the backward pass, which is empty on some devices."""
    return [context.axes(x), context.axes(x) if out[1].shape == x.shape else tuple(UNPRUNABLE for _ in out[1].shape)]


def prelu(context: TraceContext, out: Tensor, x: Tensor, weight: Tensor) -> Axes:
    """`weight` (C,) or (1,) along dimension 1 of `x`."""
    axes = context.axes(x)
    if x.dim() < 2 or weight.numel() == 1:
        return axes
    slope = context.axes(weight)[0] if weight.dim() == 1 else context.axes(weight)[1]
    return (axes[0], context.tie(axes[1], slope), *axes[2:])


def copy(context: TraceContext, out: Tensor, x: Tensor, source: Tensor, *args: object) -> Axes:
    """Write `source` into `x`, which may be a view of something larger."""
    pointwise(context, out, x, source)
    # The axes of `x`, not of what it met: other views of the same memory have those labels.
    return context.axes(x)


_UNARY = """
abs acos acosh asin asinh atan atanh bernoulli bitwise_not ceil celu clamp clamp_max clamp_min cos cosh
deg2rad digamma elu erf erfc erfinv exp exp2 expm1 floor frac gelu hardshrink hardsigmoid hardswish hardtanh
isfinite isinf isnan leaky_relu lgamma log log10 log1p log2 log_sigmoid logical_not logit
mish nan_to_num neg positive rad2deg reciprocal relu relu6 round rrelu rrelu_with_noise rsqrt selu sgn sigmoid sign
silu sin sinc sinh softplus softshrink sqrt square tan tanh threshold trunc
"""
_MANY = """
add addcdiv addcmul atan2 bitwise_and bitwise_or bitwise_xor copysign div eq floor_divide fmax fmin fmod ge gt
heaviside hypot le lerp logaddexp logical_and logical_or logical_xor lt masked_fill maximum minimum mul ne
nextafter pow remainder rsub sub true_divide where xlogy
"""
_FILLED = """
empty empty_strided full new_empty new_empty_strided new_full new_ones new_zeros ones rand randn scalar_tensor zeros
"""
_LIKE = """
_to_copy alias alpha_dropout clone contiguous detach dropout empty_like exponential feature_dropout fill full_like lift
lift_fresh lift_fresh_copy normal ones_like rand_like randn_like uniform zero zeros_like
"""

RULES: dict[str, Rule] = {
    **{f"aten.{name}": pointwise for name in (_UNARY + " " + _MANY).split()},
    **{f"aten.{name}": filled for name in _FILLED.split()},
    **{f"aten.{name}": like for name in _LIKE.split()},
    "aten.native_dropout": channelwise_dropout,
    "aten.log_sigmoid_forward": log_sigmoid,
    "aten._prelu_kernel": prelu,
    "aten.prelu": prelu,
    "aten.copy": copy,
}
