"""Results without data are those of torch's own meta kernels: same shape, type and order in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.graph.meta_kernels import META_KERNELS

INPUTS = {
    "plain": lambda: empty(2, 8, 4, 4),
    "channels last": lambda: empty(2, 8, 4, 4).to(memory_format=torch.channels_last),
    "transposed": lambda: empty(2, 4, 8).transpose(1, 2),
    "ones": lambda: empty(1, 8, 1, 1),
    "expanded": lambda: empty(8, 1).expand(8, 4),
    "sliced": lambda: empty(2, 8, 9)[:, :, ::2],
    "permuted": lambda: empty(2, 6, 4, 4).permute(2, 0, 1, 3),
    "double": lambda: empty(2, 8, 4, 4).double(),
}
CALLS = {
    **{f.__name__: f for f in (torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.sqrt, F.gelu, F.silu)},
    **{f.__name__: f for f in (F.hardswish, F.hardsigmoid, F.hardtanh, F.leaky_relu, F.elu, F.mish)},
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "plus itself": lambda x: x + x,
    "plus a copy in order": lambda x: x + torch.empty(x.shape, device="meta", dtype=x.dtype),
    "times a number": lambda x: x * 2,
    "number minus": lambda x: 1.5 - x,
    "minus a number": lambda x: x - 1.5,
    "divided": lambda x: x / 2,
    "scaled": lambda x: x * x.sum(),
    "whole plus one": lambda x: x.int() + 1,
    "whole times a fraction": lambda x: x.int() * 1.5,
    "promoted": lambda x: x + x.double(),
    "with alpha": lambda x: torch.add(x, x, alpha=2),
    "gated": lambda x: x * torch.empty(gate(x.shape), device="meta", dtype=x.dtype),
    "gates": lambda x: torch.empty(gate(x.shape), device="meta", dtype=x.dtype) * x,
    "broadcast from nothing": lambda x: x + torch.empty(x.shape[-1:], device="meta", dtype=x.dtype),
    "mean over one": lambda x: x.mean(-1),
    "mean over all but one": lambda x: x.mean(list(range(1, x.dim())), keepdim=True),
    "mean of all": lambda x: x.mean(),
    "mean of whole numbers": lambda x: x.int().mean(-1, dtype=torch.float32),
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "layer norm over two": lambda x: F.layer_norm(x, x.shape[-2:]),
    "convolution": lambda x: conv(x, 6, 3, padding=1, bias=True),
    "convolution with stride": lambda x: conv(x, 6, 2, stride=2),
    "convolution of one pixel": lambda x: conv(x, 6, 1),
    "dilated convolution": lambda x: conv(x, 4, 2, dilation=2, padding=1),
    "convolution in blocks": lambda x: conv(x, 4, 1, groups=2),
    "depthwise convolution": lambda x: conv(x, x.shape[1], 3, padding=1, groups=x.shape[1]),
    "transposed convolution": lambda x: (
        nn.ConvTranspose2d(x.shape[1], 4, 2, device="meta", dtype=x.dtype)(x) if x.dim() == 4 else x
    ),
    "linear": lambda x: nn.Linear(x.shape[-1], 6, device="meta", dtype=x.dtype)(x),
    "linear on rows": lambda x: nn.Linear(x[0].numel(), 6, device="meta", dtype=x.dtype)(x.flatten(1)),
    "scaled linear": lambda x: torch.addmm(row(x, 6), x.flatten(1), row(x, x[0].numel(), 6), beta=2),
    "linear with a whole matrix of biases": lambda x: torch.addmm(
        row(x, len(x), 6), x.flatten(1), row(x, x[0].numel(), 6)
    ),
    "linear without a column": lambda x: torch.addmm(row(x, 1), x.flatten(1), row(x, x[0].numel(), 6)),
    "batch norm": lambda x: nn.BatchNorm2d(x.shape[1], device="meta", dtype=x.dtype).eval()(x) if x.dim() == 4 else x,
}


def conv(x: Tensor, channels: int, kernel: int, **how: object) -> Tensor:
    kinds = {3: nn.Conv1d, 4: nn.Conv2d}
    if x.dim() not in kinds or x.shape[-1] + 2 * how.get("padding", 0) < kernel * how.get("dilation", 1):
        return x
    return kinds[x.dim()](x.shape[1], channels, kernel, device="meta", dtype=x.dtype, **how)(x)


def row(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, device="meta", dtype=x.dtype)


def gate(shape: torch.Size) -> tuple[int, ...]:
    return (*shape[:2], *[1] * (len(shape) - 2)) if len(shape) > 2 else (shape[0], 1)


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


class Compare(TorchDispatchMode):
    """Runs torch's own kernel, and holds the shortcut against it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = f"aten.{func._schema.name.partition('::')[2]}"
        ours = META_KERNELS[name](*args, **(kwargs or {})) if name in META_KERNELS else NotImplemented
        if ours is not NotImplemented:
            self.seen.append(name)
            assert [looks(t) for t in tensors(ours)] == [looks(t) for t in tensors(out)], name
        return out


def tensors(value) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def looks(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.stride(), tensor.device


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", INPUTS)
def test_a_shortcut_gives_what_torch_gives(kind: str, call: str) -> None:
    x = INPUTS[kind]()
    with torch.no_grad(), Compare():
        CALLS[call](x)


def test_every_shortcut_is_taken_by_one_of_these_calls() -> None:
    with torch.no_grad(), Compare() as compare:
        for call in CALLS.values():
            call(INPUTS["plain"]())
    assert set(compare.seen) == set(META_KERNELS)
