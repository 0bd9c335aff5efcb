"""Models of one operation between two weights, and the index arrays that must come out, computed by hand.

`a`'s outputs 0, 1, 2, ... are the channels, and `b` reads what the operation makes of them. `a`'s inputs and `b`'s
outputs belong to the model's, so they are always frozen; a case lists the rest. `I4` says that four channels stay as
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

aten = torch.ops.aten
Rows = list[list[int]]
I1, I2, I3, I4, I5, I6 = ([[position] for position in range(size)] for size in range(1, 7))
HALVES = [[0, 2], [1, 3]]  # position j of both halves of four
PAIRS = [[0, 1], [2, 3]]  # neighbours of four
COLUMNS = [[0, 3], [1, 4], [2, 5]]  # position j of both halves of six
PALINDROME = [[0, 3], [1, 2]]
NEIGHBOURS = [[0, 1], [2, 3], [4, 5]]


class Net(nn.Module):
    """Modules and parameters by name, and how they are called."""

    def __init__(self, call: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.call = call
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


class Numbers(nn.Module):
    """A buffer of positions."""

    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.register_buffer("numbers", torch.tensor(numbers))


@dataclass(frozen=True)
class Case:
    """A model with one operation, and what must come out.

    Attributes:
        ops: the rules that must have been asked; "aten." is left out.
        model, shape: the model, and the shape of its input.
        groups: by name, the rows of every member; members that are missing here must not exist.
        frozen: besides `a`'s inputs and `b`'s outputs: by tensor dimension, words of the reason.
        inexact: groups for which masking a channel and cutting it may differ; all of them where it says True.
        whole: whether the model runs in inference mode, where we see operations before PyTorch takes them apart.
        real: whether the model must run on real tensors, because a result's shape depends on values.
    """

    ops: str
    model: nn.Module
    shape: tuple[int, ...]
    groups: Mapping[str, Mapping[str, Rows]]
    frozen: Mapping[str, str] = field(default_factory=dict)
    inexact: bool | tuple[str, ...] = False
    whole: bool = False
    real: bool = False

    @property
    def rules(self) -> set[str]:
        """The full names of the rules."""
        return {op if "." in op else f"aten.{op}" for op in self.ops.split()}


def conv(channels: int, read: int, op: Callable[[Tensor], Tensor], **more: nn.Module | nn.Parameter) -> Net:
    """`b(op(a(x)))` with convolutions, for images of 4 by 6."""
    a, b = nn.Conv2d(3, channels, 1, bias=False), nn.Conv2d(read, 2, 1, bias=False)
    return Net(lambda net, x: net.b(op(net.a(x))), a=a, b=b, **more)


def between(op: nn.Module, channels: int, read: int) -> Net:
    """The same around a module `w`."""
    a, b = nn.Conv2d(3, channels, 1, bias=False), nn.Conv2d(read, 2, 1, bias=False)
    return Net(lambda net, x: net.b(net.w(net.a(x))), a=a, w=op, b=b)


def lin(channels: int, read: int, op: Callable[[Tensor], Tensor]) -> Net:
    """`b(op(a(x)))` with Linear layers, for two sequences of five."""
    a, b = nn.Linear(3, channels, bias=False), nn.Linear(read, 2, bias=False)
    return Net(lambda net, x: net.b(op(net.a(x))), a=a, b=b)


IMAGE, SEQUENCE = (1, 3, 4, 6), (2, 5, 3)


def image(ops: str, op: Callable[[Tensor], Tensor], a: Rows, b: Rows, **rest: Any) -> Case:
    """One group, `a`'s rows to `b`'s rows, of images."""
    made, read = (1 + max(map(max, rows)) for rows in (a, b))
    return Case(ops, conv(made, read, op), IMAGE, {"a": {"a.weight.0": a, "b.weight.1": b}}, **rest)


def scaled_by_dot(op: str) -> Case:
    """The output is multiplied with a product of two parameters, which is a sum over the channels."""
    net = Net(
        lambda n, x: n.b(n.a(x)) * getattr(torch, op)(n.a.weight[:, 0], n.s),
        a=nn.Linear(3, 4, bias=False),
        s=nn.Parameter(torch.ones(4)),
        b=nn.Linear(4, 2, bias=False),
    )
    return Case(op, net, (7, 3), {"a": {"a.weight.0": I4, "s.0": I4, "b.weight.1": I4}}, inexact=True)


def stuck(ops: str, op: Callable[[Tensor], Tensor], read: int, why: str, channels: int = 4) -> Case:
    """Everything between the two convolutions is frozen."""
    net = conv(channels, read, op)
    return Case(ops, net, IMAGE, {}, {"a.weight.0": why, "b.weight.1": ""})


def sequence(ops: str, op: Callable[[Tensor], Tensor], a: Rows, b: Rows, **rest: Any) -> Case:
    """One group, `a`'s rows to `b`'s rows, of sequences."""
    made, read = (1 + max(map(max, rows)) for rows in (a, b))
    return Case(ops, lin(made, read, op), SEQUENCE, {"a": {"a.weight.0": a, "b.weight.1": b}}, **rest)


# -- operations that move nothing: four channels in, the same four out

UNARY = """
abs acos acosh asin asinh atan atanh bernoulli ceil celu cos cosh deg2rad digamma elu erf erfc erfinv exp exp2 expm1
floor frac gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu lgamma log log10 log1p log2 logit mish nan_to_num
neg rad2deg reciprocal relu round rsqrt sgn sigmoid sign silu sin sinc sinh softplus softshrink sqrt tan tanh
trunc _to_copy alias clone detach
"""
BINARY = """
add atan2 copysign div floor_divide fmax fmin fmod heaviside hypot logaddexp maximum minimum mul nextafter remainder
rsub sub xlogy
"""
COMPARISONS = "eq ge gt le logical_and logical_or logical_xor lt ne"
LIKE = "empty_like ones_like rand_like randn_like zeros_like isinf isnan logical_not"
REDUCTIONS = "mean sum amax amin logsumexp nansum var std"


def each(names: str, use: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
    """Return `use` for each of these operations."""
    return {name: partial(use, getattr(aten, name)) for name in names.split()}


KEEP: dict[str, Callable[[Tensor], Tensor]] = {
    **each(UNARY, lambda op, h: op(h)),
    **each(LIKE, lambda op, h: h * op(h)),
    **each(REDUCTIONS, lambda op, h: h * op(h, [2, 3], keepdim=True)),
    **each("_safe_softmax", lambda op, h: op(h, 2)),
    **each("all any", lambda op, h: h * op(h, 2, keepdim=True)),
    "bitwise_not": lambda h: h * aten.bitwise_not(h > 0),
    "clamp": lambda h: aten.clamp(h, 0, 6),
    "clamp_max": lambda h: aten.clamp_max(h, 6),
    "clamp_min": lambda h: aten.clamp_min(h, 0),
    "threshold": lambda h: aten.threshold(h, 0, 0),
    "pow": lambda h: aten.pow(h, 2),
    "fill": lambda h: h + aten.fill(h, 1.0),
    "full_like": lambda h: h + aten.full_like(h, 1.0),
    "zero": lambda h: h + aten.zero(h),
    "normal": lambda h: h + aten.empty_like(h).normal_(),
    "uniform": lambda h: h + aten.empty_like(h).uniform_(),
    "log_sigmoid_forward": lambda h: aten.log_sigmoid_forward(h)[0],
    "exponential": lambda h: h + aten.empty_like(h).exponential_(),
    "rrelu_with_noise": lambda h: aten.rrelu_with_noise(h, aten.ones_like(h), 0.1, 0.3, False),
    "native_dropout": lambda h: aten.native_dropout(h, 0.5, False)[0],
    "lift": lambda h: aten.lift(h),
    "lift_fresh": lambda h: aten.lift_fresh(h),
    "lift_fresh_copy": lambda h: aten.lift_fresh_copy(h),
    # what is as large as the channels are now follows them
    "empty": lambda h: h + torch.empty(h.shape),
    "empty_strided": lambda h: h + aten.empty_strided(h.shape, h.stride()),
    "full": lambda h: h + torch.full(h.shape, 1.0),
    "ones": lambda h: h + torch.ones(h.shape),
    "zeros": lambda h: h + torch.zeros(h.shape),
    "new_empty": lambda h: h + h.new_empty(h.shape),
    "new_empty_strided": lambda h: h + h.new_empty_strided(h.shape, h.stride()),
    "new_full": lambda h: h + h.new_full(h.shape, 1.0),
    "new_ones": lambda h: h + h.new_ones(h.shape),
    "new_zeros": lambda h: h + h.new_zeros(h.shape),
    "rand": lambda h: h + torch.rand(h.shape),
    "randn": lambda h: h + torch.randn(h.shape),
    "scalar_tensor": lambda h: h * aten.scalar_tensor(2.0),
    # memory and dimensions of size one
    "permute": lambda h: h.permute(2, 1, 0, 3).permute(2, 1, 0, 3),
    "transpose": lambda h: h.transpose(1, 3).neg().transpose(3, 1),
    "_reshape_alias": lambda h: aten._reshape_alias(h, [1, 4, 24, 1], [96, 24, 1, 1]),
    "unsqueeze": lambda h: h.unsqueeze(1).neg().flatten(1, 2),
    "squeeze": lambda h: h.unsqueeze(2).neg().squeeze(2),
    "expand": lambda h: h.mean((2, 3), keepdim=True).expand(1, -1, 4, 6),
    "as_strided": lambda h: h.as_strided(h.shape, h.stride()),
    # along space
    "select": lambda h: h.select(2, 1).unsqueeze(2),
    "slice": lambda h: h[:, :, 1:3, ::2],
    "unbind": lambda h: h.unbind(2)[0].unsqueeze(2),
    "split": lambda h: h.split(2, 2)[0],
    "split_with_sizes": lambda h: h.split([1, 3], 2)[1],
    "unfold": lambda h: h.unfold(2, 2, 2).mean(-1),
    "flip": lambda h: h.flip(2, 3),
    "roll": lambda h: h.roll((1, 2), (2, 3)),
    "index": lambda h: h[:, :, torch.tensor([2, 0])],
    "index_select": lambda h: h.index_select(3, torch.tensor([2, 0, 1])),
    "index_put": lambda h: aten.index_put(h, [None, None, torch.tensor([0, 2])], h[:, :, 1:3]),
    "index_add": lambda h: h.index_add(2, torch.tensor([0, 2]), h[:, :, 1:3]),
    "index_copy": lambda h: h.index_copy(2, torch.tensor([0, 2]), h[:, :, 1:3]),
    "index_fill": lambda h: h.index_fill(2, torch.tensor([0, 2]), 1.0),
    "gather": lambda h: h.gather(2, h.topk(2, 2).indices),
    "scatter": lambda h: h.scatter(2, h.argmax(2, keepdim=True), h),
    "scatter_add": lambda h: h.scatter_add(-1, h.argmax(-1, keepdim=True), h),
    "scatter_reduce": lambda h: h.scatter_reduce(2, h.argmax(2, keepdim=True), h, "amax"),
    "slice_scatter": lambda h: h.slice_scatter(h[:, :, :2], 2, 1, 3),
    "select_scatter": lambda h: h.select_scatter(h.amax(3), 3, -1),
    "diagonal": lambda h: h.diagonal(1, 2, 3).unsqueeze(3),
    "tril": lambda h: h.tril(),
    "triu": lambda h: h.triu(1),
    "rot90": lambda h: h.rot90(1, (2, 3)),
    "grid_sampler_2d": lambda h: F.grid_sample(h, torch.zeros(1, 5, 7, 2), align_corners=False),
    "grid_sampler_3d": lambda h: F.grid_sample(h[:, :, None], torch.zeros(1, 2, 5, 7, 3), align_corners=False).mean(2),
    "torchvision.roi_align": lambda h: torchvision.ops.roi_align(h, torch.zeros(3, 5), 2),
    "torchvision.roi_pool": lambda h: torchvision.ops.roi_pool(h, torch.zeros(3, 5), (2, 3)),
    "constant_pad_nd": lambda h: F.pad(h, (1, 2, 0, 1)),
    "repeat": lambda h: h.repeat(1, 1, 2, 3),
    "cat": lambda h: torch.cat([h, h.neg()], 2),
    "stack": lambda h: torch.stack([h, h.neg()], 2).flatten(2, 3),
    "glu": lambda h: F.glu(h, 3),
    # ordering space, or going along it
    "sort": lambda h: h.sort(2).values,
    "topk": lambda h: h.topk(3, -1).values,
    "argmax": lambda h: h * h.argmax(2, keepdim=True),
    "argmin": lambda h: h * h.argmin(3).unsqueeze(3),
    "kthvalue": lambda h: h * h.kthvalue(2, 3, keepdim=True).values,
    "median": lambda h: h * h.median(2).values.unsqueeze(2),
    "nanmedian": lambda h: h * h.nanmedian(-2, keepdim=True).values,
    "mode": lambda h: h * h.mode(3, keepdim=True).values,
    "cummax": lambda h: h.cummax(2).values,
    "cummin": lambda h: h.cummin(-1).values,
    # reductions over space
    "count_nonzero": lambda h: h * aten.count_nonzero(h, [2, 3])[..., None, None],
    "prod": lambda h: h * h.prod(2, keepdim=True),
    "var_mean": lambda h: h * torch.var_mean(h, (2, 3), keepdim=True)[0],
    "std_mean": lambda h: h * torch.std_mean(h, (2, 3), keepdim=True)[1],
    "max": lambda h: h * h.max(2, keepdim=True).values,
    "min": lambda h: h * h.min(2, keepdim=True).values,
    "aminmax": lambda h: h * torch.aminmax(h, dim=2, keepdim=True).max,
    "linalg_vector_norm": lambda h: h * torch.linalg.vector_norm(h, dim=(2, 3), keepdim=True),
    "norm": lambda h: h * aten.norm(h, 2, [2, 3], True),
}  # fmt: skip

MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "_softmax": lambda h: h.softmax(1),
    "_safe_softmax": lambda h: aten._safe_softmax(h, 1),
    "_log_softmax": lambda h: h.log_softmax(1),
    "cumsum": lambda h: h.cumsum(1),
    "cumprod": lambda h: h.cumprod(1),
    "logcumsumexp": lambda h: h.logcumsumexp(1),
    "cummax": lambda h: h.cummax(1).values,
    "cummin": lambda h: h.cummin(1).values,
    "count_nonzero": lambda h: h * aten.count_nonzero(h, [1]).unsqueeze(1),
    **each(REDUCTIONS, lambda op, h: h * op(h, [1], keepdim=True)),
    **each("all any prod", lambda op, h: h * op(h, 1, keepdim=True)),
    **each("max min", lambda op, h: h * op(h, 1, keepdim=True)[0]),
    **each("var_mean std_mean", lambda op, h: h * op(h, [1, 2], keepdim=True)[0]),
    "aminmax": lambda h: h * torch.aminmax(h, dim=1, keepdim=True).max,
    "linalg_vector_norm": lambda h: F.normalize(h, dim=1),
    "norm": lambda h: h * aten.norm(h, 2, [1], True),
}

# over everything at once
MIXED_WHOLLY: dict[str, Callable[[Tensor], Tensor]] = each("all any max mean min prod sum", lambda op, h: h * op(h))

# -- operations in which the outputs of two convolutions meet, position by position

MEET: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **each(BINARY, lambda op, h, g: op(h, g)),
    **each(COMPARISONS, lambda op, h, g: h * op(h, g)),
    **each("bitwise_and bitwise_or bitwise_xor", lambda op, h, g: h * op(h > 0, g > 0)),
    "lerp": lambda h, g: aten.lerp(h, g, 0.5),
    "addcmul": lambda h, g: aten.addcmul(h, h, g),
    "addcdiv": lambda h, g: aten.addcdiv(h, g, g),
    "where": lambda h, g: aten.where(g > 0, h, 0.0),
    "masked_fill": lambda h, g: aten.masked_fill(h, g > 0, 0.0),
    "copy": lambda h, g: h.clone().copy_(g),
}


def meeting(op: str, join: Callable[[Tensor, Tensor], Tensor]) -> Case:
    """`b(join(a(x), c(x)))`: channel by channel, `a` and `c` are one group."""
    a, c, b = (nn.Conv2d(before, after, 1, bias=False) for before, after in ((3, 4), (3, 4), (4, 2)))
    net = Net(lambda n, x: n.b(join(n.a(x), n.c(x))), a=a, c=c, b=b)
    together = dict.fromkeys(("a.weight.0", "c.weight.0", "b.weight.1"), I4)
    return Case(op, net, IMAGE, {"a": together}, {"c.weight.1": "meets an axis without channels"})


# -- operations on space, by the number of its dimensions: channels pass beside it, and stay where they are in it

SPACE: dict[int, dict[str, Callable[[Tensor], Tensor]]] = {
    1: {
        "upsample_nearest1d": lambda h: F.interpolate(h, scale_factor=2),
        "upsample_linear1d": lambda h: F.interpolate(h, size=7, mode="linear"),
        "reflection_pad1d": lambda h: F.pad(h, (1, 1), mode="reflect"),
        "replication_pad1d": lambda h: F.pad(h, (1, 1), mode="replicate"),
    },
    2: {
        "max_pool2d_with_indices": lambda h: F.max_pool2d(h, 2),
        "avg_pool2d": lambda h: F.avg_pool2d(h, 2),
        "_adaptive_avg_pool2d": lambda h: F.adaptive_avg_pool2d(h, (2, 3)),
        "adaptive_max_pool2d": lambda h: F.adaptive_max_pool2d(h, (2, 3)),
        "fractional_max_pool2d": lambda h: F.fractional_max_pool2d(h, 2, output_size=(2, 3)),
        "upsample_nearest2d": lambda h: F.interpolate(h, scale_factor=2),
        "upsample_bilinear2d": lambda h: F.interpolate(h, size=(8, 9), mode="bilinear"),
        "upsample_bicubic2d": lambda h: F.interpolate(h, size=(8, 9), mode="bicubic"),
        "_upsample_nearest_exact2d": lambda h: F.interpolate(h, scale_factor=2, mode="nearest-exact"),
        "_upsample_bilinear2d_aa": lambda h: F.interpolate(h, size=(2, 3), mode="bilinear", antialias=True),
        "_upsample_bicubic2d_aa": lambda h: F.interpolate(h, size=(2, 3), mode="bicubic", antialias=True),
        "reflection_pad2d": lambda h: F.pad(h, (1, 1, 1, 1), mode="reflect"),
        "replication_pad2d": lambda h: F.pad(h, (1, 1, 1, 1), mode="replicate"),
        "max_unpool2d": lambda h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2),
    },
    3: {
        "max_pool3d_with_indices": lambda h: F.max_pool3d(h, (1, 2, 2)),
        "avg_pool3d": lambda h: F.avg_pool3d(h, (1, 2, 2)),
        "_adaptive_avg_pool3d": lambda h: F.adaptive_avg_pool3d(h, (2, 2, 3)),
        "adaptive_max_pool3d": lambda h: F.adaptive_max_pool3d(h, (2, 2, 3)),
        "upsample_nearest3d": lambda h: F.interpolate(h, scale_factor=(1, 2, 2)),
        "upsample_trilinear3d": lambda h: F.interpolate(h, size=(2, 5, 7), mode="trilinear"),
        "reflection_pad3d": lambda h: F.pad(h, (1, 1, 1, 1, 0, 0), mode="reflect"),
        "replication_pad3d": lambda h: F.pad(h, (1, 1, 1, 1, 1, 1), mode="replicate"),
        "max_unpool3d": lambda h: F.max_unpool3d(*F.max_pool3d(h, (1, 2, 2), return_indices=True), (1, 2, 2)),
    },
}  # fmt: skip

SPACE_WHOLE: dict[int, dict[str, Callable[[Tensor], Tensor]]] = {
    1: {
        "adaptive_avg_pool1d": lambda h: F.adaptive_avg_pool1d(h, 3),
        "adaptive_max_pool1d": lambda h: F.adaptive_max_pool1d(h, 3),
        "avg_pool1d": lambda h: F.avg_pool1d(h, 2),
        "max_pool1d": lambda h: F.max_pool1d(h, 2),
    },
    2: {
        "adaptive_avg_pool2d": lambda h: F.adaptive_avg_pool2d(h, (2, 3)),
        "max_pool2d": lambda h: F.max_pool2d(h, 2),
    },
    3: {
        "adaptive_avg_pool3d": lambda h: F.adaptive_avg_pool3d(h, (2, 2, 3)),
        "max_pool3d": lambda h: F.max_pool3d(h, (1, 2, 2)),
    },
}


def beside(dims: int, call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Use an operation on space where channels stand in front of it."""
    ways: dict[int, Callable[[Tensor], Tensor]] = {
        1: lambda h: call(h.flatten(2)).unsqueeze(3),
        2: call,
        3: lambda h: call(h.unsqueeze(2)).mean(2),
    }
    return ways[dims]


def inside(dims: int, call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Use an operation on space where channels stand in its first dimension."""
    ways: dict[int, Callable[[Tensor], Tensor]] = {
        1: lambda h: call(h.mean(3).transpose(1, 2)).transpose(1, 2).unsqueeze(3),
        2: lambda h: call(h.transpose(1, 2)).transpose(1, 2),
        3: lambda h: call(h.unsqueeze(1)).squeeze(1),
    }
    return ways[dims]


def on_space(table: Mapping[int, Mapping[str, Callable[[Tensor], Tensor]]]) -> dict[str, Case]:
    """Two cases for each operation."""
    found = {}
    for dims, calls in table.items():
        for op, call in calls.items():
            read = inside(dims, call)(torch.zeros(1, 4, 4, 6)).shape[1]
            found[f"{op} beside channels"] = image(op, beside(dims, call), I4, I4)
            found[f"{op} over channels"] = stuck(op, inside(dims, call), read, "pooled or resized along this axis")
    return found


ORDERED: dict[str, Callable[[Tensor], Tensor]] = {
    "sort": lambda h: h.sort(1).values,
    "topk": lambda h: h.topk(4, 1).values,
    "argmax": lambda h: h * h.argmax(1, keepdim=True),
    "argmin": lambda h: h * h.argmin(1, keepdim=True),
    "kthvalue": lambda h: h * h.kthvalue(2, 1, keepdim=True).values,
    "median": lambda h: h * h.median(1, keepdim=True).values,
    "nanmedian": lambda h: h * h.nanmedian(),
    "mode": lambda h: h * h.mode(1, keepdim=True).values,
    "searchsorted": lambda h: torch.searchsorted(torch.arange(4.0), h).float(),
    "bucketize": lambda h: torch.bucketize(h, torch.arange(4.0)).float(),
}

ZEROS = torch.zeros(1, 4, 4, 6, dtype=torch.long)
NUMBERED: dict[str, Callable[[Tensor], Tensor]] = {
    "gather": lambda h: h.gather(1, ZEROS),
    "scatter": lambda h: h.scatter(1, ZEROS, 1.0),
    "scatter_add": lambda h: h.scatter_add(1, ZEROS, h),
    "scatter_reduce": lambda h: h.scatter_reduce(1, ZEROS, h, "sum"),
    "index_add": lambda h: h.index_add(1, torch.tensor([2, 0]), h[:, :2]),
    "index_copy": lambda h: h.index_copy(1, torch.tensor([2, 0]), h[:, :2]),
    "index_fill": lambda h: h.index_fill(1, torch.tensor([2, 0]), 1.0),
    "index_put": lambda h: aten.index_put(h, [None, torch.tensor([2, 0])], torch.ones(2, 4, 6)),
    "slice_scatter": lambda h: h.slice_scatter(torch.ones(1, 3, 4, 6), 1, 1),
}

MOVES = {
    # flattening: channel c of three on a plane of 24 positions, or last
    "flatten": Case(
        "view",
        Net(lambda n, x: n.b(n.a(x).flatten(1)), a=nn.Conv2d(3, 2, (4, 3), bias=False), b=nn.Linear(8, 2, bias=False)),
        IMAGE,
        {"a": {"a.weight.0": I2, "b.weight.1": [[0, 1, 2, 3], [4, 5, 6, 7]]}},
    ),
    "flatten, channels last": Case(
        "_unsafe_view permute",
        Net(
            lambda n, x: n.b(n.a(x).permute(0, 2, 3, 1).reshape(1, -1)),
            a=nn.Conv2d(3, 2, (4, 3), bias=False),
            b=nn.Linear(8, 2, bias=False),
        ),
        IMAGE,
        {"a": {"a.weight.0": I2, "b.weight.1": [[0, 2, 4, 6], [1, 3, 5, 7]]}},
    ),
    "view in blocks and back": image("view", lambda h: h.view(1, 2, 3, 4, 6).neg().view(1, 6, 4, 6), COLUMNS, COLUMNS),
    "unflatten and sum": image("view sum", lambda h: h.unflatten(1, (2, 3)).sum(1), COLUMNS, I3),
    "shuffle by hand": image(
        "view transpose _unsafe_view",
        lambda h: h.view(1, 2, 3, 4, 6).transpose(1, 2).reshape(1, 6, 4, 6),
        COLUMNS,
        NEIGHBOURS,
    ),
    "channel_shuffle": image("channel_shuffle", lambda h: F.channel_shuffle(h, 2), COLUMNS, NEIGHBOURS),
    "pixel_shuffle": image("pixel_shuffle", lambda h: F.pixel_shuffle(h, 2), [[0, 1, 2, 3], [4, 5, 6, 7]], I2),
    "pixel_unshuffle": image("pixel_unshuffle", lambda h: F.pixel_unshuffle(h, 2), I2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    "movedim": image("permute", lambda h: h.movedim(1, 3).neg().movedim(3, 1), I4, I4),
    "t": Case(
        "t",
        Net(lambda n, x: n.b(n.a(x).t().neg().t()), a=nn.Linear(3, 4, bias=False), b=nn.Linear(4, 2, bias=False)),
        (5, 3),
        {"a": {"a.weight.0": I4, "b.weight.1": I4}},
    ),
    "expand to the front": image("expand", lambda h: h.expand(1, 1, -1, -1, -1).mean(0), I4, I4),
    "repeat": image("repeat", lambda h: h.repeat(1, 2, 1, 1), I3, COLUMNS),
    "tile": image("repeat", lambda h: h.tile(2, 1, 1), I3, COLUMNS),
    "repeat_interleave": image("", lambda h: h.repeat_interleave(2, 1), I3, NEIGHBOURS),
    "cat with itself": image("cat", lambda h: torch.cat([h, h], 1), I3, COLUMNS),
    "stack before the channels": image("stack", lambda h: torch.stack([h, h], 1).flatten(1, 2), I3, COLUMNS),
    "stack behind the channels": image("stack", lambda h: torch.stack([h, h], 2).flatten(1, 2), I3, NEIGHBOURS),
    "cat of two": Case(
        "cat",
        Net(
            lambda n, x: n.b(torch.cat([n.a(x), n.c(x)], 1)),
            a=nn.Conv2d(3, 3, 1, bias=False),
            c=nn.Conv2d(3, 2, 1, bias=False),
            b=nn.Conv2d(5, 2, 1, bias=False),
        ),
        IMAGE,
        {"a": {"a.weight.0": I3, "b.weight.1": I3}, "c": {"c.weight.0": I2, "b.weight.1": [[3], [4]]}},
        {"c.weight.1": "meets an axis without channels"},
    ),
    "padding of channels": Case(
        "constant_pad_nd",
        conv(3, 6, lambda h: F.pad(h, (0, 0, 0, 0, 1, 2))),
        IMAGE,
        {"a": {"a.weight.0": I3, "b.weight.1": [[1], [2], [3]]}},
        {"b.weight.1": "padding"},
    ),
    "cat with the input": Case(
        "cat",
        Net(
            lambda n, x: n.b(torch.cat([x, n.a(x)], 1)),
            a=nn.Conv2d(3, 2, 1, bias=False),
            b=nn.Conv2d(5, 2, 1, bias=False),
        ),
        IMAGE,
        {"a": {"a.weight.0": I2, "b.weight.1": [[3], [4]]}},
        {"b.weight.1": "stands beside channels"},
    ),
    "chunk": image("split", lambda h: h.chunk(2, 1)[0] * h.chunk(2, 1)[1], HALVES, I2),
    "split in equal parts": image("split", lambda h: torch.cat(h.split(2, 1)[::-1], 1), HALVES, HALVES),
    "unsafe_split": image("unsafe_split", lambda h: aten.unsafe_split(h, 2, 1)[0], HALVES, I2),
    "split in other parts": stuck(
        "split_with_sizes", lambda h: torch.cat(h.split([1, 3], 1)[::-1], 1), 4, "pieces of fixed sizes [1, 3]"
    ),
    "glu": image("glu", lambda h: F.glu(h, 1), HALVES, I2),
    "first half": image("slice", lambda h: h[:, : h.shape[1] // 2], HALVES, I2),
    "every second": image("slice", lambda h: h[:, ::2], PAIRS, I2),
    "every second from one": image("slice", lambda h: h[:, 1::2], PAIRS, I2),
    "narrow": image("slice", lambda h: h.narrow(1, 2, 2), HALVES, I2),
    "all but the first two of five": Case(
        "slice",
        conv(5, 3, lambda h: h[:, 2:]),
        IMAGE,
        {"a": {"a.weight.0": [[2], [3], [4]], "b.weight.1": I3}},
        {"a.weight.0": "positions 2 to 5 of 5 are taken"},
    ),
    "flip": image("flip", lambda h: h.flip(1), I3, [[2], [1], [0]]),
    "roll": stuck("roll", lambda h: h.roll(1, 1), 4, "rolled by 1 positions"),
    "roll of everything": stuck("roll", lambda h: aten.roll(h, [1]), 4, "rolled as a flat sequence"),
    "select": Case(
        "select",
        conv(4, 1, lambda h: h.select(1, 0).unsqueeze(1)),
        IMAGE,
        {},
        {"a.weight.0": "one position is taken by its number"},
    ),
    "unbind": stuck("unbind", lambda h: torch.stack(h.unbind(1)[::-1], 1), 4, "one position is taken by its number"),
    "index_select": stuck("index_select", lambda h: h.index_select(1, torch.tensor([2, 0])), 2, "taken by number"),
    "index": stuck("index", lambda h: h[:, torch.tensor([2, 0, 1])], 3, "positions are taken by number"),
    "index_select by a buffer": Case(
        "index_select",
        Net(
            lambda n, x: n.b(n.a(x).index_select(1, n.order.numbers)),
            a=nn.Conv2d(3, 3, 1, bias=False),
            order=Numbers(2, 0, 1),
            b=nn.Conv2d(3, 2, 1, bias=False),
        ),
        IMAGE,
        {"a": {"a.weight.0": I3, "order.numbers.0": [[1], [2], [0]], "b.weight.1": [[1], [2], [0]]}},
    ),
    "index by a buffer that leaves one out": Case(
        "index",
        Net(
            lambda n, x: n.b(n.a(x)[:, n.order.numbers]),
            a=nn.Conv2d(3, 3, 1, bias=False),
            order=Numbers(2, 0),
            b=nn.Conv2d(2, 2, 1, bias=False),
        ),
        IMAGE,
        {"a": {"a.weight.0": [[0], [2]], "order.numbers.0": [[1], [0]], "b.weight.1": [[1], [0]]}},
        {"a.weight.0": "nothing reads these channels"},
    ),
    "unfold": stuck("unfold", lambda h: h.unfold(1, 2, 2).mean(-1), 2, "a window slides over this axis"),
    "gather of the first channels": stuck(
        "gather", lambda h: h.gather(2, ZEROS[:, :3]), 3, "positions are taken by number"
    ),
    "gather by a constant table": stuck("gather", lambda h: h.gather(2, ZEROS), 4, "meets an axis without channels"),
    "index_put under a mask": image("index_put", lambda h: h.index_put((h < 0,), torch.tensor(1.0)), I4, I4),
    "index_put of a mask of channels": image(
        "index_put", lambda h: aten.index_put(h, [None, h.amax((0, 2, 3)) < 0], torch.tensor(1.0)), I4, I4
    ),
    "slice_scatter over all channels": image(
        "slice_scatter", lambda h: h.slice_scatter(h.flip(1), 1), PALINDROME, PALINDROME
    ),
    "select_scatter": stuck(
        "select_scatter", lambda h: h.select_scatter(torch.ones(1, 4, 6), 1, 0), 4, "one position is taken"
    ),
    "diagonal": stuck("diagonal", lambda h: h.diagonal(0, 1, 2).permute(0, 2, 1)[..., None], 4, "two numbers agree"),
    "triu": stuck("triu", lambda h: h.transpose(1, 2).triu().transpose(1, 2), 4, "zero above or below a diagonal"),
    "a quarter turn through channels": image(
        "rot90", lambda h: h.rot90(1, (1, 3)).transpose(1, 3).rot90(2, (2, 3)), I3, I3
    ),
    "three quarters through channels": image(
        "rot90", lambda h: h.rot90(3, (1, 3)).transpose(1, 3), I3, [[2], [1], [0]]
    ),
    "im2col": image("im2col", lambda h: F.unfold(h, 2).unsqueeze(3), I2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    "col2im": image("col2im", lambda h: F.fold(h.flatten(2), (5, 7), 2), [[0, 1, 2, 3], [4, 5, 6, 7]], I2),
    "grid_sampler_2d over channels": stuck(
        "grid_sampler_2d",
        lambda h: F.grid_sample(h.transpose(1, 2), torch.zeros(1, 5, 7, 2), align_corners=False).transpose(1, 2),
        5,
        "places of an image, by their coordinates",
    ),
    "a grid of channels": stuck(
        "grid_sampler_3d",
        lambda h: F.grid_sample(h[:, None], h[:, None, None, :, 0, :3], align_corners=False)[:, 0].transpose(1, 3),
        4,
        "places of an image, by their coordinates",
    ),
    "regions by their place": stuck(
        "torchvision.ps_roi_align",
        lambda h: torchvision.ops.ps_roi_align(h, torch.zeros(3, 5), 2),
        2,
        "channels are taken by their place in a box",
        channels=8,
    ),
    "pooled regions by their place": stuck(
        "torchvision.ps_roi_pool",
        lambda h: torchvision.ops.ps_roi_pool(h, torch.zeros(3, 5), 2),
        2,
        "channels are taken by their place in a box",
        channels=8,
    ),
    "as_strided": stuck("as_strided", lambda h: h.as_strided((1, 4, 4, 6), (96, 1, 24, 4)), 4, "in another order"),
    "broadcast of a scale": Case(
        "mul",
        Net(
            lambda n, x: n.b(n.a(x) * n.s),
            a=nn.Conv2d(3, 4, 1, bias=False),
            s=nn.Parameter(torch.ones(4, 1, 1)),
            b=nn.Conv2d(4, 2, 1, bias=False),
        ),
        IMAGE,
        {"a": {"a.weight.0": I4, "s.0": I4, "b.weight.1": I4}},
    ),
    "outer product of positions": image("mul", lambda h: h * h.mean((1, 2, 3), keepdim=True), I4, I4, inexact=True),
}  # fmt: skip

NORMS = {
    **{
        name: Case(
            name,
            Net(
                partial(lambda norm, n, x: n.b(norm(n.a(x), n.w)), norm),
                a=nn.Conv2d(3, 4, 1, bias=False),
                w=nn.BatchNorm2d(4),
                b=nn.Conv2d(4, 2, 1, bias=False),
            ),
            IMAGE,
            {
                "a": {
                    "a.weight.0": I4,
                    **{f"w.{each}.0": I4 for each in ("weight", "bias", "running_mean", "running_var")},
                    "b.weight.1": I4,
                }
            },
        )
        for name, norm in {
            "native_batch_norm": lambda h, w: w(h),
            "_native_batch_norm_legit": lambda h, w: aten._native_batch_norm_legit(
                h, w.weight, w.bias, w.running_mean, w.running_var, False, 0.1, 1e-5
            )[0],
            "_native_batch_norm_legit_functional": lambda h, w: aten._native_batch_norm_legit_functional(
                h, w.weight, w.bias, w.running_mean, w.running_var, False, 0.1, 1e-5
            )[0],
            "_native_batch_norm_legit_no_training": lambda h, w: aten._native_batch_norm_legit_no_training(
                h, w.weight, w.bias, w.running_mean, w.running_var, 0.1, 1e-5
            )[0],
            "cudnn_batch_norm": lambda h, w: aten.cudnn_batch_norm(
                h, w.weight, w.bias, w.running_mean, w.running_var, False, 0.1, 1e-5
            )[0],
            "_batch_norm_with_update": lambda h, w: aten._batch_norm_with_update(
                h, w.weight, w.bias, w.running_mean, w.running_var, 0.1, 1e-5
            )[0],
            "_batch_norm_no_update": lambda h, w: aten._batch_norm_no_update(
                h, w.weight, w.bias, w.running_mean, w.running_var, 0.1, 1e-5
            )[0],
        }.items()
    },
    "instance norm": Case("", between(nn.InstanceNorm2d(4), 4, 4), IMAGE, {"a": {"a.weight.0": I4, "b.weight.1": I4}}),
    "instance norm with a scale": Case(
        "",
        between(nn.InstanceNorm2d(4, affine=True), 4, 4),
        IMAGE,
        {"a": {"a.weight.0": I4, "w.weight.0": I4, "w.bias.0": I4, "b.weight.1": I4}},
    ),
    "instance norm of a batch": Case(
        "",
        between(nn.InstanceNorm2d(4, affine=True), 4, 4),
        (2, 3, 4, 6),
        {"a": {"a.weight.0": I4, "w.weight.0": I4, "w.bias.0": I4, "b.weight.1": I4}},
    ),
    "layer norm": Case(
        "native_layer_norm",
        Net(
            lambda n, x: n.b(n.w(n.a(x))),
            a=nn.Linear(3, 4, bias=False),
            w=nn.LayerNorm(4),
            b=nn.Linear(4, 2, bias=False),
        ),
        SEQUENCE,
        {"a": {"a.weight.0": I4, "w.weight.0": I4, "w.bias.0": I4, "b.weight.1": I4}},
        inexact=True,
    ),
    "rms norm": Case(
        "",
        Net(
            lambda n, x: n.b(n.w(n.a(x))),
            a=nn.Linear(3, 4, bias=False),
            w=nn.RMSNorm(4),
            b=nn.Linear(4, 2, bias=False),
        ),
        SEQUENCE,
        {"a": {"a.weight.0": I4, "w.weight.0": I4, "b.weight.1": I4}},
        inexact=True,
    ),
    "group norm": Case(
        "native_group_norm",
        between(nn.GroupNorm(2, 4), 4, 4),
        IMAGE,
        {"a": {"a.weight.0": HALVES, "w.weight.0": HALVES, "w.bias.0": HALVES, "b.weight.1": HALVES}},
        inexact=True,
    ),
    "group norm in one block": Case(
        "native_group_norm",
        between(nn.GroupNorm(1, 4), 4, 4),
        IMAGE,
        {"a": {"a.weight.0": I4, "w.weight.0": I4, "w.bias.0": I4, "b.weight.1": I4}},
        inexact=True,
    ),
    "group norm, channel by channel": Case(
        "native_group_norm",
        between(nn.GroupNorm(4, 4), 4, 4),
        IMAGE,
        {},
        dict.fromkeys(("a.weight.0", "w.weight.0", "w.bias.0", "b.weight.1"), "number of normalised blocks"),
    ),
    "prelu": Case(
        "_prelu_kernel",
        between(nn.PReLU(4), 4, 4),
        IMAGE,
        {"a": {"a.weight.0": I4, "w.weight.0": I4, "b.weight.1": I4}},
    ),
    "prelu with one slope": Case(
        "_prelu_kernel", between(nn.PReLU(), 4, 4), IMAGE, {"a": {"a.weight.0": I4, "b.weight.1": I4}}
    ),
}


WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    **each("isfinite", lambda op, h: h * op(h)),
    **each("log_sigmoid positive relu6 rrelu selu square contiguous", lambda op, h: op(h)),
    **each("alpha_dropout dropout feature_dropout", lambda op, h: op(h, 0.5, False)),
    "prelu": lambda h: aten.prelu(h, torch.ones(1)),
    "broadcast_to": lambda h: h.mean((2, 3), keepdim=True).broadcast_to(h.shape),
    "chunk": lambda h: h.chunk(2, 2)[1],
    "repeat_interleave": lambda h: h.repeat_interleave(2, 2),
    "flatten": lambda h: h.flatten(2).unsqueeze(3),
    "reshape": lambda h: h.reshape(1, -1, 24, 1),
    "unflatten": lambda h: h.unflatten(3, (2, 3)).mean(4),
}

WHOLE_MOVES = {
    "reshape": image(
        "reshape", lambda h: h.reshape(1, 2, 3, 4, 6).transpose(1, 2).reshape(1, 6, 4, 6), COLUMNS, NEIGHBOURS
    ),
    "unflatten and flatten": image(
        "unflatten flatten", lambda h: h.unflatten(1, (2, 3)).flatten(1, 2), COLUMNS, COLUMNS
    ),
    "broadcast to the front": image("broadcast_to", lambda h: h.broadcast_to(1, *h.shape).mean(0), I4, I4),
    "chunk": image("chunk", lambda h: h.chunk(2, 1)[0] * h.chunk(2, 1)[1], HALVES, I2),
    "repeat_interleave": image("repeat_interleave", lambda h: h.repeat_interleave(2, 1), I3, NEIGHBOURS),
    "native_channel_shuffle": image(
        "native_channel_shuffle", lambda h: aten.native_channel_shuffle(h, 2), COLUMNS, NEIGHBOURS
    ),
    "prelu with a slope for each": Case(
        "prelu", between(nn.PReLU(4), 4, 4), IMAGE, {"a": {"a.weight.0": I4, "w.weight.0": I4, "b.weight.1": I4}}
    ),
    "linear": Case(
        "linear",
        Net(lambda n, x: n.b(n.w(n.a(x))), a=nn.Linear(3, 4), w=nn.Linear(4, 5), b=nn.Linear(5, 2)),
        SEQUENCE,
        {
            "a": {"a.weight.0": I4, "a.bias.0": I4, "w.weight.1": I4},
            "w": {"w.weight.0": I5, "w.bias.0": I5, "b.weight.1": I5},
        },
        {"b.bias.0": "model output"},
    ),
    "argsort of space": image("argsort", lambda h: h * h.argsort(2), I4, I4),
    "argsort": stuck("argsort", lambda h: h.argsort(1).float(), 4, "depends on channel positions"),
    "_fused_rms_norm": sequence(
        "_fused_rms_norm", lambda h: aten._fused_rms_norm(h, [4], None, 1e-5)[0], I4, I4, inexact=True
    ),
}  # fmt: skip

REAL = {
    "nms": stuck(
        "torchvision.nms",
        lambda h: h * torchvision.ops.nms(h.mean((2, 3)), torch.zeros(1), 0.5).sum(),
        4,
        "depends on channel positions",
    ),
    "a mask of places": image(
        "index", lambda h: h.permute(0, 2, 3, 1)[torch.ones(1, 4, 6, dtype=torch.bool)].T[None, ..., None], I4, I4
    ),
    "nonzero": stuck("nonzero", lambda h: h * h.nonzero().sum(), 4, "depends on channel positions"),
    "unique_consecutive": stuck(
        "unique_consecutive", lambda h: h * h.unique_consecutive().sum(), 4, "depends on channel positions"
    ),
}


def flat(op: nn.Module, channels: int, read: int, space: int) -> Net:
    """A module `w` of `space` dimensions between two convolutions of as many."""
    kind = {1: nn.Conv1d, 3: nn.Conv3d}[space]
    a, b = kind(3, channels, 1, bias=False), kind(read, 2, 1, bias=False)
    return Net(lambda net, x: net.b(net.w(net.a(x))), a=a, w=op, b=b)


DENSE = {"a": {"a.weight.0": I4, "w.weight.1": I4}, "w": {"w.weight.0": I5, "w.bias.0": I5, "b.weight.1": I5}}
TRANSPOSED = {"a": {"a.weight.0": I4, "w.weight.0": I4}, "w": {"w.weight.1": I5, "w.bias.0": I5, "b.weight.1": I5}}
HEADS = [[0, 1, 2, 3], [4, 5, 6, 7]]
CPU = "_scaled_dot_product_flash_attention_for_cpu"
FLASH, ANY = "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"


def attention(op: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Net:
    """Attention with two heads of four."""

    def attend(net: Net, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(2, 5, -1, 4).transpose(1, 2) for part in (net.a, net.k, net.v))
        return net.b(op(q, k, v).transpose(1, 2).flatten(2))

    parts = {name: nn.Linear(3, 8, bias=False) for name in "akv"}
    return Net(attend, **parts, b=nn.Linear(8, 2, bias=False))


CONTRACTIONS = {
    "convolution": Case("convolution", between(nn.Conv2d(4, 5, 3), 4, 5), IMAGE, DENSE),
    "convolution in 1-D": Case("convolution", flat(nn.Conv1d(4, 5, 3), 4, 5, 1), (1, 3, 6), DENSE),
    "convolution in 3-D": Case("convolution", flat(nn.Conv3d(4, 5, 3), 4, 5, 3), (1, 3, 4, 5, 6), DENSE),
    "transposed": Case("convolution", between(nn.ConvTranspose2d(4, 5, 2), 4, 5), IMAGE, TRANSPOSED),
    "transposed in 1-D": Case("convolution", flat(nn.ConvTranspose1d(4, 5, 2), 4, 5, 1), (1, 3, 6), TRANSPOSED),
    "transposed in 3-D": Case("convolution", flat(nn.ConvTranspose3d(4, 5, 2), 4, 5, 3), (1, 3, 4, 5, 6), TRANSPOSED),
    "grouped": Case(
        "convolution",
        between(nn.Conv2d(4, 6, 1, groups=2, bias=False), 4, 6),
        IMAGE,
        {"a": {"a.weight.0": HALVES, "w.weight.1": I2}, "w": {"w.weight.0": COLUMNS, "b.weight.1": COLUMNS}},
    ),
    "grouped and transposed": Case(
        "convolution",
        between(nn.ConvTranspose2d(4, 6, 1, groups=2, bias=False), 4, 6),
        IMAGE,
        {"a": {"a.weight.0": HALVES, "w.weight.0": HALVES}, "w": {"w.weight.1": I3, "b.weight.1": COLUMNS}},
    ),
    "depthwise": Case(
        "convolution",
        between(nn.Conv2d(3, 3, 3, groups=3), 3, 3),
        IMAGE,
        {"a": {"a.weight.0": I3, "w.weight.0": I3, "w.bias.0": I3, "b.weight.1": I3}},
    ),
    "depthwise and transposed": Case(
        "convolution",
        between(nn.ConvTranspose2d(3, 3, 2, groups=3), 3, 3),
        IMAGE,
        {"a": {"a.weight.0": I3, "w.weight.0": I3, "w.bias.0": I3, "b.weight.1": I3}},
    ),
    "deformable": Case(
        "torchvision.deform_conv2d",
        Net(
            lambda n, x: n.b(n.w(n.a(x), n.o(x))),
            a=nn.Conv2d(3, 4, 1, bias=False),
            o=nn.Conv2d(3, 18, 1, bias=False),
            w=torchvision.ops.DeformConv2d(4, 5, 3, padding=1),
            b=nn.Conv2d(5, 2, 1, bias=False),
        ),
        IMAGE,
        DENSE,
        {"o.weight.0": "moves or weighs the places", "o.weight.1": "meets an axis without channels"},
    ),
    "weight_norm": Case(
        "_weight_norm_interface",
        Net(lambda n, x: n.b(n.a(x)), a=weight_norm(nn.Linear(3, 4, bias=False)), b=weight_norm(nn.Linear(4, 2))),
        (7, 3),
        {
            "a": {
                "a.parametrizations.weight.original0.0": I4,
                "a.parametrizations.weight.original1.0": I4,
                "b.parametrizations.weight.original1.1": I4,
            }
        },
        {
            "a.parametrizations.weight.original1.1": "meets an axis without channels",
            "b.parametrizations.weight.original0.0": "model output",
            "b.parametrizations.weight.original1.0": "model output",
            "b.bias.0": "model output",
        },
        inexact=True,
    ),
    **{op: scaled_by_dot(op) for op in ("dot", "vdot")},
    "bilinear": Case(
        "_trilinear",
        Net(
            lambda n, x: n.b(n.w(n.a(x), n.k(x))),
            a=nn.Linear(3, 4, bias=False),
            k=nn.Linear(3, 5, bias=False),
            w=nn.Bilinear(4, 5, 6, bias=False),
            b=nn.Linear(6, 2, bias=False),
        ),
        (7, 3),
        {
            "a": {"a.weight.0": I4, "w.weight.1": I4},
            "k": {"k.weight.0": I5, "w.weight.2": I5},
            "w": {"w.weight.0": I6, "b.weight.1": I6},
        },
        {"k.weight.1": "meets an axis without channels"},
    ),
    "distances to prototypes": Case(
        "_cdist_forward",
        Net(
            lambda n, x: n.b(torch.cdist(n.a(x), n.v, p=1.0)),
            a=nn.Linear(3, 4, bias=False),
            v=nn.Parameter(torch.ones(2, 5, 4)),
            b=nn.Linear(5, 2, bias=False),
        ),
        SEQUENCE,
        {"a": {"a.weight.0": I4, "v.2": I4}, "v": {"v.1": I5, "b.weight.1": I5}},
        {"v.0": "meets an axis without channels"},
        inexact=("a",),
    ),
    "mv": Case(
        "mv",
        Net(lambda n, x: torch.mv(n.a(x), n.v), a=nn.Linear(3, 4, bias=False), v=nn.Parameter(torch.ones(4))),
        (6, 3),
        {"a": {"a.weight.0": I4, "v.0": I4}},
    ),
    "depthwise, two filters a channel": Case(
        "convolution",
        between(nn.Conv2d(3, 6, 3, groups=3), 3, 6),
        IMAGE,
        {"a": {"a.weight.0": I3, **dict.fromkeys(("w.weight.0", "w.bias.0", "b.weight.1"), NEIGHBOURS)}},
    ),
    "linear": Case(
        "addmm",
        Net(lambda n, x: n.b(n.w(n.a(x))), a=nn.Linear(3, 4), w=nn.Linear(4, 5), b=nn.Linear(5, 2)),
        (6, 3),
        {
            "a": {"a.weight.0": I4, "a.bias.0": I4, "w.weight.1": I4},
            "w": {"w.weight.0": I5, "w.bias.0": I5, "b.weight.1": I5},
        },
        {"b.bias.0": "model output"},
    ),
    "matmul with a parameter": Case(
        "mm",
        Net(
            lambda n, x: n.b(n.a(x) @ n.w),
            a=nn.Linear(3, 4, bias=False),
            w=nn.Parameter(torch.ones(4, 5)),
            b=nn.Linear(5, 2, bias=False),
        ),
        (6, 3),
        {"a": {"a.weight.0": I4, "w.0": I4}, "w": {"w.1": I5, "b.weight.1": I5}},
    ),
    "bmm with a parameter": Case(
        "bmm",
        Net(
            lambda n, x: n.b(torch.bmm(n.a(x), n.w)),
            a=nn.Linear(3, 4, bias=False),
            w=nn.Parameter(torch.ones(2, 4, 5)),
            b=nn.Linear(5, 2, bias=False),
        ),
        SEQUENCE,
        {"a": {"a.weight.0": I4, "w.1": I4}, "w": {"w.2": I5, "b.weight.1": I5}},
        {"w.0": "meets an axis without channels"},
    ),
    "baddbmm with parameters": Case(
        "baddbmm",
        Net(
            lambda n, x: n.b(torch.baddbmm(n.s, n.a(x), n.w)),
            a=nn.Linear(3, 4, bias=False),
            w=nn.Parameter(torch.ones(2, 4, 5)),
            s=nn.Parameter(torch.ones(1, 1, 5)),
            b=nn.Linear(5, 2, bias=False),
        ),
        SEQUENCE,
        {"a": {"a.weight.0": I4, "w.1": I4}, "w": {"w.2": I5, "s.2": I5, "b.weight.1": I5}},
        {"w.0": "meets an axis without channels"},
    ),
    "einsum": Case(
        "",
        Net(
            lambda n, x: n.b(torch.einsum("nkc,cd->nkd", n.a(x), n.w)),
            a=nn.Linear(3, 4, bias=False),
            w=nn.Parameter(torch.ones(4, 5)),
            b=nn.Linear(5, 2, bias=False),
        ),
        SEQUENCE,
        {"a": {"a.weight.0": I4, "w.0": I4}, "w": {"w.1": I5, "b.weight.1": I5}},
    ),
    "product of activations": Case(
        "bmm",
        Net(
            lambda n, x: n.b(torch.bmm(torch.bmm(n.a(x), n.k(x).transpose(1, 2)), n.v(x))),
            a=nn.Linear(3, 4, bias=False),
            k=nn.Linear(3, 4, bias=False),
            v=nn.Linear(3, 5, bias=False),
            b=nn.Linear(5, 2, bias=False),
        ),
        SEQUENCE,
        {"a": {"a.weight.0": I4, "k.weight.0": I4}, "v": {"v.weight.0": I5, "b.weight.1": I5}},
        dict.fromkeys(("k.weight.1", "v.weight.1"), "meets an axis without channels"),
        inexact=("a",),  # nothing reads these channels with a weight, so nothing can mask them
    ),
    "embedding": Case(
        "embedding",
        Net(
            lambda n, x: n.b(n.a(x.long().squeeze(-1))), a=nn.Embedding(7, 4), b=nn.Linear(4, 2, bias=False)
        ),
        (2, 5, 1),
        {"a": {"a.weight.1": I4, "b.weight.1": I4}},
        {"a.weight.0": "rows are looked up by index"},
    ),
    **{
        name: Case(
            op,
            attention(call),
            SEQUENCE,
            {"a": dict.fromkeys(("a.weight.0", "k.weight.0", "v.weight.0", "b.weight.1"), HEADS)},
            dict.fromkeys(("k.weight.1", "v.weight.1"), "meets an axis without channels"),
        )
        for name, op, call in (
            ("attention", "", F.scaled_dot_product_attention),
            ("on a CPU", CPU, lambda *qkv: aten._scaled_dot_product_flash_attention_for_cpu(*qkv)[0]),
            ("on a GPU", FLASH, lambda *qkv: aten._scaled_dot_product_flash_attention(*qkv)[0]),
            ("on any GPU", ANY, lambda *qkv: aten._scaled_dot_product_efficient_attention(*qkv, None, False)[0]),
        )
    },
}  # fmt: skip

CASES: dict[str, Case] = {
    **{f"{op} keeps": image(op, call, I4, I4) for op, call in KEEP.items()},
    **{f"{op} mixes": image(op, call, I4, I4, inexact=True) for op, call in MIXED.items()},
    **{f"{op} of everything mixes": image(op, call, I4, I4, inexact=True) for op, call in MIXED_WHOLLY.items()},
    **{f"{op} meets": meeting(op, join) for op, join in MEET.items()},
    "true_divide meets, whole": replace(meeting("true_divide", torch.true_divide), whole=True),
    **on_space(SPACE),
    **{f"{name}, whole": replace(case, whole=True) for name, case in on_space(SPACE_WHOLE).items()},
    **{f"{op} orders": stuck(op, call, 4, "depends on channel positions") for op, call in ORDERED.items()},
    **{f"{op} over channels": stuck(op, call, 4, "taken by number") for op, call in NUMBERED.items()},
    **MOVES,
    **NORMS,
    **CONTRACTIONS,
    **{f"{op} keeps, whole": replace(image(op, call, I4, I4), whole=True) for op, call in WHOLE.items()},
    **{f"{name}, whole": replace(case, whole=True) for name, case in WHOLE_MOVES.items()},
    **{f"{name}, on values": replace(case, real=True) for name, case in REAL.items()},
}
