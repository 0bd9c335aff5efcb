"""Reconstruction: after the last cut, every layer computes again, as well as it can, what it did in the whole model.

A cut changes what all later layers read. Layer by layer, in the order in which they run, the weights are fitted by
least squares: from what the layer reads in the smaller model to what it returned in the whole one. Nothing is trained:
no labels, no gradients, one solution for each layer.

    the whole model:  h = [1, 2], W = [3, 1], output 5        the smaller one reads h' = [1.5] in that place
    over all places:  min |W' h' + b' - 5|^2                  W' = 2, say: it makes up for errors that came from before

Known for single layers as least-squares reconstruction (ThiNet, arXiv 1707.06342; He et al., arXiv 1707.06168). A
BatchNorm behind a layer gets the statistics of the new output, and scale and shift that say the same function in them,
so that training goes on from it: in training mode BatchNorm reads its batch, and not what stood there before.

Shape letters: N rows, one for each sample and place of the output; g groups of a convolution; F inputs of one output,
with the taps of its kernel; O outputs.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor._utils import device_of, eval_mode, run_model, to_device
from compressor.errors import InputError
from compressor.graph import ChannelGraph, Offset, Table

logger = logging.getLogger(__name__)

MOST_ROWS = 65_536  # for one layer: more say little about a few hundred weights
MOST_FEATURES = 6_000  # of one output: the solution takes the third power of it
# Of the mean square of each input. The one that predicts held-out rows best is taken.
_RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_FLOOR = 1e-7  # of the mean square of all inputs: some are always zero
_FIXED = 1e12
_HELD_OUT = 5  # one sample in so many

BatchNorm = nn.modules.batchnorm._BatchNorm
_FITTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Reference:
    """The model as it was before any cut, and which of its channels are left.

    Args:
        graph: of the model, not yet cut; the model is copied.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self.model = copy.deepcopy(graph.model)
        self._rows: dict[str, Tensor] = {}

    def follow(self, table: Table, keep: Mapping[str, Tensor]) -> None:
        """Note a cut: what of every tensor's first dimension stays.

        Args:
            table: of the graph before that cut.
            keep: by group of the table, the channels that stay, `(n,)`.
        """
        for name, dims in table.kept_positions(table.removed(keep)).items():
            if 0 in dims:
                self._rows[name] = self.rows(name, dims[0])[dims[0]] if name in self._rows else dims[0]

    def rows(self, name: str, usual: Tensor) -> Tensor:
        """Return the positions in the whole model of what is left of a tensor's first dimension, `(O,)`."""
        return self._rows.get(name, usual)


@torch.no_grad()
def reconstruct(graph: ChannelGraph, reference: Reference, batches: Sequence[Any]) -> list[str]:
    """Fit the weights of every layer to what it returned in the whole model; writes the model, all or nothing.

    Convolutions in 1 to 3 dimensions and Linear are fitted where they run once in a forward pass. What is tied, under a
    parametrization, or of too many inputs keeps the weights that the cut left it.

    Args:
        graph: of the model, cut.
        reference: the model before, which followed every cut.
        batches: inputs that the model accepts.

    Returns:
        The names of the layers that were fitted.

    Raises:
        InputError: no batch, or what a layer reads or returned is not finite.
    """
    if not batches:
        raise InputError("no batch to reconstruct layers on: give at least one batch of inputs that the model accepts")
    model = graph.model
    before = {id(each): (each, each.detach().clone()) for each in (*model.parameters(), *model.buffers())}
    fitted = []
    try:
        with eval_mode(model), eval_mode(reference.model):
            for name, norm in _layers(model, batches[0]).items():
                if _fit(graph, reference, name, norm, batches):
                    fitted.append(name)
    except BaseException:
        for tensor, values in before.values():
            tensor.copy_(values)
        raise
    return fitted


def _layers(model: nn.Module, batch: Any) -> dict[str, BatchNorm | None]:
    """Return the layers that can be fitted, in the order in which they run, and the BatchNorm that reads each."""
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    plain = {
        name: module
        for name, module in model.named_modules()
        if type(module) in _FITTED and (weight := module._parameters.get("weight")) is not None
        if uses[id(weight)] == 1 and weight[0].numel() <= MOST_FEATURES
    }
    names = {module: name for name, module in plain.items()}
    runs: Counter[str] = Counter()
    outputs: list[tuple[Tensor, str]] = []
    norms: dict[str, BatchNorm] = {}

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, BatchNorm):
            norms.update((name, module) for each, name in outputs if each is inputs[0])
        else:
            runs[names[module]] += 1
            outputs.append((output, names[module]))

    with ExitStack() as hooks:
        for module in model.modules():
            if module in names or isinstance(module, BatchNorm):
                hooks.callback(module.register_forward_hook(look).remove)
        run_model(model, to_device(batch, device_of(model)))
    return {name: norms.get(name) for name, times in runs.items() if times == 1}


class _Reached(Exception):
    """Raised where a layer has run: what comes after it need not."""


def _seen(model: nn.Module, name: str, batch: Any) -> tuple[Tensor, Tensor] | None:
    """Return what a layer reads and returns; None where it takes no single tensor."""
    seen: list[tuple[Any, Any]] = []

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen.append((inputs[0] if inputs else None, output))
        raise _Reached

    handle = model.get_submodule(name).register_forward_hook(look)
    try:
        with suppress(_Reached):
            run_model(model, to_device(batch, device_of(model)))
    finally:
        handle.remove()
    is_plain = bool(seen) and all(isinstance(each, Tensor) for each in seen[0])
    return seen[0] if is_plain else None


@dataclass
class _Sums:
    """Sums of products of a layer's inputs, a constant 1 behind them, and of its targets; `(g, ...)` each."""

    xx: Tensor  # (g, F + 1, F + 1)
    xy: Tensor  # (g, F + 1, O / g)
    yy: Tensor  # (g, O / g)
    rows: int

    @staticmethod
    def of(x: Tensor, y: Tensor) -> _Sums:
        """Return the sums over rows `(g, N, F + 1)` and `(g, N, O / g)`."""
        across = x.transpose(1, 2)
        return _Sums((across @ x).double(), (across @ y).double(), y.square().sum(1).double(), x.shape[1])

    def __add__(self, other: _Sums) -> _Sums:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Sums(*(mine + more for mine, more in pairs))

    def error(self, weights: Tensor) -> float:
        """Return the mean over outputs of the part of their variance that weights `(g, F + 1, O / g)` leave."""
        squares = self.yy + (weights * (self.xx @ weights - 2 * self.xy)).sum(1)
        variance = self.yy - self.xy[:, -1].square() / max(self.rows, 1)
        varies = variance > 1e-9 * self.yy
        return float((squares[varies] / variance[varies]).mean()) if varies.any() else 0.0

    def solve(self, near: Tensor, ridge: float, *, constant: bool) -> Tensor | None:
        """Return the weights of least squares that stay near others, `(g, F + 1, O / g)`; None if there are none.

        Without `constant` the last of them, which the input 1 has, stays as it is.
        """
        diagonal = self.xx.diagonal(dim1=1, dim2=2)
        penalty = ridge * diagonal + _FLOOR * diagonal[:, :-1].mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
        penalty[:, -1] = (_FLOOR if constant else _FIXED) * self.rows
        factor, failed = torch.linalg.cholesky_ex(self.xx + torch.diag_embed(penalty))
        if failed.any():
            return None
        found = near + torch.cholesky_solve(self.xy - self.xx @ near, factor)
        return found if found.isfinite().all() else None


def _fit(graph: ChannelGraph, reference: Reference, name: str, norm: BatchNorm | None, batches: Sequence[Any]) -> bool:
    """Fit one layer; return whether its weights are new."""
    weight, offset = _tensor(graph.model, f"{name}.weight"), _offset(graph, name)
    sums = _observe(graph, reference, name, offset, batches)
    if sums is None:
        return False
    kept, held_out = sums
    current = torch.zeros_like(kept.xy)  # (g, F + 1, O / g)
    groups, _, outputs = current.shape
    current[:, :-1] = weight.reshape(groups, outputs, -1).transpose(1, 2)
    if offset:
        values = _tensor(graph.model, offset.tensor)
        current[:, -1] = offset.sign * values.view(groups, outputs)
    ridge = _best_ridge(kept, held_out, current, constant=offset is not None)
    every = kept + held_out
    found = None if ridge is None else every.solve(current, ridge, constant=offset is not None)
    if found is None:
        logger.info("%s keeps its weights: no others predict held-out rows better", name)
        return False
    weight.copy_(found[:, :-1].transpose(1, 2).reshape(weight.shape))
    if offset:
        values.copy_(offset.sign * found[:, -1].flatten())
    if norm is not None:
        if offset is None or offset.sign < 0:
            found[:, -1] = 0  # what BatchNorm reads has no constant
        _take_statistics(norm, found, every)
    return True


def _observe(
    graph: ChannelGraph, reference: Reference, name: str, offset: Offset | None, batches: Sequence[Any]
) -> tuple[_Sums, _Sums] | None:
    """Return sums over some rows of all batches, and over those held out; None where the two models do not meet."""
    layer = graph.model.get_submodule(name)
    dim = -1 if isinstance(layer, nn.Linear) else 1
    positions = reference.rows(f"{name}.weight", torch.arange(len(_tensor(graph.model, f"{name}.weight"))))
    generator = torch.Generator().manual_seed(0)
    found: tuple[list[_Sums], list[_Sums]] = ([], [])
    for batch in batches:
        now, then = _seen(graph.model, name, batch), _seen(reference.model, name, batch)
        if now is None or then is None:
            return None
        y = then[1].movedim(dim, -1)[..., positions.to(then[1].device)]
        if y.shape != now[1].movedim(dim, -1).shape:
            return None
        places = y[..., 0].numel()
        some = torch.randperm(places, generator=generator)[: -(-MOST_ROWS // len(batches))].to(y.device)
        y = y.flatten(0, -2)[some].to(torch.promote_types(y.dtype, torch.float32))
        if offset and offset.sign < 0:
            y = y - _tensor(reference.model, offset.tensor)[positions.to(y.device)].to(y)
        x = _features(layer, now[0], some).to(y)
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        if not (x.isfinite().all() and y.isfinite().all()):
            raise InputError(f"what {name!r} reads is not finite on these inputs: leave out those that hold NaN or inf")
        y = y.reshape(len(y), x.shape[1], -1)
        sample = torch.div(some, max(places // len(now[0]), 1), rounding_mode="floor")
        is_out = sample % _HELD_OUT == _HELD_OUT - 1
        for part, sums in zip((~is_out, is_out), found, strict=True):
            sums.append(_Sums.of(x[part].transpose(0, 1), y[part].transpose(0, 1)))
    kept, held_out = (sum(sums[1:], sums[0]) for sums in found)
    return kept, held_out


def _best_ridge(train: _Sums, test: _Sums, current: Tensor, *, constant: bool) -> float | None:
    """Return the ridge whose weights predict held-out rows best; None if the present ones do."""
    least, best = test.error(current), None
    for ridge in _RIDGES:
        found = train.solve(current, ridge, constant=constant)
        if found is not None and (error := test.error(found)) < least:
            least, best = error, ridge
    return best


def _offset(graph: ChannelGraph, name: str) -> Offset | None:
    """Return where a constant on a layer's output can be put: its bias, or a running mean behind it."""
    if graph.model.get_submodule(name)._parameters.get("bias") is not None:
        return Offset(f"{name}.bias", 1)
    return graph.offsets.get(f"{name}.weight")


def _tensor(model: nn.Module, name: str) -> Tensor:
    """Return a parameter or a buffer by name."""
    module, _, leaf = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(module), leaf)
    return found


def _take_statistics(norm: BatchNorm, weights: Tensor, sums: _Sums) -> None:
    """Give a BatchNorm the statistics of what it reads now, and say the same function in them."""
    if not norm.affine or norm.running_mean is None or norm.running_var is None:
        return
    mean = (weights * sums.xx[:, -1:].transpose(1, 2)).sum(1).flatten() / sums.rows
    square = (weights * (sums.xx @ weights)).sum(1).flatten() / sums.rows
    variance = (square - mean.square()).clamp_min(0)
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    norm.bias.copy_(norm.bias.double() + norm.weight.double() * (mean - norm.running_mean.double()) / deviation)
    norm.weight.copy_(norm.weight.double() * (variance + norm.eps).sqrt() / deviation)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


def _features(module: nn.Module, x: Tensor, places: Tensor) -> Tensor:
    """Return what each output at some places is computed from, `(N, g, F)`, in the order of the weight."""
    if isinstance(module, nn.Linear):
        return x.flatten(0, -2)[places].unsqueeze(1)
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    spans = zip(x.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True)
    starts = [(size - dilation * (kernel - 1) - 1, stride) for size, kernel, stride, dilation in spans]
    taps = []
    for tap in product(*(range(size) for size in module.kernel_size)):
        at = [
            slice(index * dilation, index * dilation + last + 1, stride)
            for index, dilation, (last, stride) in zip(tap, module.dilation, starts, strict=True)
        ]
        taps.append(x[(slice(None), slice(None), *at)].movedim(1, -1).flatten(0, -2)[places])
    return torch.stack(taps, -1).reshape(len(places), module.groups, -1)
