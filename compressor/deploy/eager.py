"""One layer in PyTorch as it stands: every operation on its own, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter_ns

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.deploy.fragments import enough_runs
from compressor.deploy.layers import Follower, Kind
from compressor.deploy.place import Place
from compressor.deploy.timing import cuda_graph, torch_threads

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Relu": F.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "HardSigmoid": F.hardsigmoid,
    "HardSwish": F.hardswish,
    "Swish": F.silu,
    "Elu": F.elu,
    "LeakyRelu": F.leaky_relu,
    "Gelu": F.gelu,
    "Clip": F.relu6,
}
# One layer is done on a GPU before its call has returned: this many in a row make the call a small part of the time.
_ON_GPU = 20


def torch_ns(kind: Kind, inputs: int, outputs: int, place: Place) -> float:
    """Return the median time of one layer in PyTorch, in nanoseconds; arguments as for onnxruntime_ns."""
    generator = torch.Generator().manual_seed(0)
    is_vector = kind.map == (1, 1) and kind.operator in ("Gemm", "Identity")
    x = torch.randn((place.batch, inputs) if is_vector else (place.batch, inputs, *kind.map), generator=generator)
    x, own = x.to(place.device), _own(kind, inputs, outputs).to(place.device)
    with torch.inference_mode(), torch_threads(place.threads):
        sides = [_side(each, own(x), generator) for each in kind.followers]

        def run() -> None:
            y = own(x)
            for follower, side in zip(kind.followers, sides, strict=True):
                y = _after(follower, y, side)

        at_once = 1 if place.device == "cpu" else _ON_GPU
        timed = run if place.device == "cpu" else cuda_graph(run, at_once)
        timed()
        times = []
        for _ in enough_runs():
            began = perf_counter_ns()
            timed()
            times.append(float(perf_counter_ns() - began) / at_once)
    return median(times)


def _own(kind: Kind, inputs: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    if kind.operator == "Conv":
        groups = kind.groups or inputs
        bias = kind.bias and not kind.norm
        shape = (kind.kernel, kind.stride, kind.padding, kind.dilation)
        layers = [nn.Conv2d(inputs, outputs, *shape, groups, bias)]
    elif kind.operator == "Gemm":
        layers = [nn.Linear(inputs, outputs, kind.bias)]
    elif kind.operator == "MaxPool":
        layers = [nn.MaxPool2d(kind.kernel, kind.stride, kind.padding)]
    elif kind.operator == "AveragePool":
        layers = [nn.AvgPool2d(kind.kernel, kind.stride, kind.padding)]
    elif kind.operator == "ReduceMean":
        layers = [nn.AdaptiveAvgPool2d(1)]
    if kind.norm:
        layers.append(nn.BatchNorm2d(outputs))
    return nn.Sequential(*layers).eval()


def _side(follower: Follower, like: Tensor, generator: torch.Generator) -> Tensor | None:
    if not follower.side:
        return None
    shape = like.shape if follower.side == "map" else (*like.shape[:2], 1, 1)
    return torch.randn(shape, generator=generator).to(like.device)


def _after(follower: Follower, y: Tensor, side: Tensor | None) -> Tensor:
    if side is None:
        return _FUNCTIONS[follower.operator](y)
    return y + side if follower.operator == "Add" else y * side
