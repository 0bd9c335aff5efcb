"""Reconstruction: after the last cut, every layer computes again, as well as it can, what it did in the whole model.

A cut changes what all later layers read. Layer by layer, in the order in which they run, the weights are fitted by
least squares: from what the layer reads in the smaller model to what it returned in the whole one. Nothing is trained:
no labels, no gradients, one solution for each layer.

    the whole model:  h = [1, 2], W = [3, 1], output 5        the smaller one reads h' = [1.5] in that place
    over all places:  min |W' h' + b' - 5|^2                  W' = 2, say: it makes up for errors that came from before

Where a layer's output is added to another tensor, as at the end of a residual block, the sum is what is fitted: the
block makes up for what its shortcut lost.

Known for single layers as least-squares reconstruction (ThiNet, arXiv 1707.06342; He et al., arXiv 1707.06168). A
BatchNorm behind a layer gets the statistics of the new output, and scale and shift that say the same function in them,
so that training goes on from it: in training mode BatchNorm reads its batch, and not what stood there before.

Shape letters: N rows, one for each sample and place of the output; g groups of a convolution; F inputs of one output,
with the taps of its kernel; O outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor._utils import eval_mode, tf32_disabled
from compressor.errors import InputError
from compressor.graph import ChannelGraph, Offset, Table, copied
from compressor.surgery.layer_inputs import BatchNorm, Layer, fittable_layers, seen_by

logger = logging.getLogger(__name__)

MOST_ROWS = 65_536  # for one layer: more say little about a few hundred weights
# A fitted weight has at most so many times the norm that it had. A ResNet-20 without 70 % of its MACs needs 3.6. A
# classifier at 12 times, fitted to fewer rows than it has inputs, learnt nothing any more: its gradients were as large.
MOST_GROWTH = 4.0
# Of the mean square of each input. The one that predicts held-out rows best is taken.
_RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Of the mean square of all inputs: some are always zero, or nearly so. The first that lets no weight grow too far.
_FLOORS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_FIXED = 1e12
_LEAST_SCALE = 0.05
_HELD_OUT = 5  # one sample in so many


class Reference:
    """The model as it was before any cut, and which of its channels are left.

    Args:
        graph: of the model, not yet cut; the model is copied.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self.model = copied(graph.model)
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
        # The products of inputs are inverted: ten bits of each factor would be too few.
        with eval_mode(model), eval_mode(reference.model), tf32_disabled():
            for layer in fittable_layers(model, batches[0]):
                if _fit(graph, reference, layer, batches):
                    fitted.append(layer.name)
    except BaseException:
        for tensor, values in before.values():
            tensor.copy_(values)
        raise
    return fitted


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
        """Return the weights of least squares that stay near others, `(g, F + 1, O / g)`.

        None if there are none, or only such as training could not go on from.
        Without `constant` the last of them, which the input 1 has, stays as it is.
        """
        diagonal = self.xx.diagonal(dim1=1, dim2=2)
        mean, most = diagonal[:, :-1].mean(1, keepdim=True), MOST_GROWTH * near[:, :-1].norm()
        for floor in _FLOORS:
            penalty = ridge * diagonal + floor * mean + torch.finfo(torch.float32).tiny
            penalty[:, -1] = (_FLOORS[0] if constant else _FIXED) * self.rows
            factor, failed = torch.linalg.cholesky_ex(self.xx + torch.diag_embed(penalty))
            found = near + torch.cholesky_solve(self.xy - self.xx @ near, factor)
            if not failed.any() and found.isfinite().all() and found[:, :-1].norm() <= most:
                return found
        return None


def _fit(graph: ChannelGraph, reference: Reference, layer: Layer, batches: Sequence[Any]) -> bool:
    """Fit one layer; return whether its weights are new."""
    weight, offset = _tensor(graph.model, f"{layer.name}.weight"), _offset(graph, layer.name)
    sums = _observe(graph, reference, layer, offset, batches)
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
        logger.info("%s keeps its weights: no others predict held-out rows better", layer.name)
        return False
    weight.copy_(found[:, :-1].transpose(1, 2).reshape(weight.shape))
    if offset:
        values.copy_(offset.sign * found[:, -1].flatten())
    if layer.norm:
        if offset is None or offset.sign < 0:
            found[:, -1] = 0  # what BatchNorm reads has no constant
        _take_statistics(cast(BatchNorm, graph.model.get_submodule(layer.norm)), found, every)
    return True


def _observe(
    graph: ChannelGraph, reference: Reference, layer: Layer, offset: Offset | None, batches: Sequence[Any]
) -> tuple[_Sums, _Sums] | None:
    """Return sums over some rows of all batches, and over those held out; None where the two models do not meet."""
    module = graph.model.get_submodule(layer.name)
    dim = -1 if isinstance(module, nn.Linear) else 1
    weight = f"{layer.name}.weight"
    positions = reference.rows(weight, torch.arange(len(_tensor(graph.model, weight))))
    generator = torch.Generator().manual_seed(0)
    found: tuple[list[_Sums], list[_Sums]] = ([], [])
    samples = 0
    for batch in batches:
        now, then = seen_by(graph.model, layer, batch), seen_by(reference.model, layer, batch)
        if now is None or then is None:
            return None
        at = positions.to(then.returned.device)
        y = then.returned.index_select(dim, at)
        if y.shape != now.returned.shape:
            return None
        if now.sum_with is not None and then.sum_with is not None:
            y = y + _missing(reference.model, layer.norm, then.sum_with.index_select(dim, at) - now.sum_with, at)
        y = y.movedim(dim, -1)
        places = y[..., 0].numel()
        some = torch.randperm(places, generator=generator)[: -(-MOST_ROWS // len(batches))].to(y.device)
        y = y.flatten(0, -2)[some].to(torch.promote_types(y.dtype, torch.float32))
        if offset and offset.sign < 0:
            y = y - _tensor(reference.model, offset.tensor)[at].to(y)
        x = _features(module, now.read, some).to(y)
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        if not (x.isfinite().all() and y.isfinite().all()):
            raise InputError(
                f"what {layer.name!r} reads is not finite on these inputs: leave out those that hold NaN or inf"
            )
        y = y.reshape(len(y), x.shape[1], -1)
        sample = torch.div(some, max(places // len(now.read), 1), rounding_mode="floor")
        is_out = (samples + sample) % _HELD_OUT == _HELD_OUT - 1  # counted on: batches may be of one sample
        samples += len(now.read)
        for part, sums in zip((~is_out, is_out), found, strict=True):
            sums.append(_Sums.of(x[part].transpose(0, 1), y[part].transpose(0, 1)))
    kept, held_out = (sum(sums[1:], sums[0]) for sums in found)
    return kept, held_out


def _missing(whole: nn.Module, norm: str | None, difference: Tensor, positions: Tensor) -> Tensor:
    """Return what a layer has to add so that the sum behind it makes up for what the other part of it lost."""
    if norm is None:
        return difference
    module = cast(BatchNorm, whole.get_submodule(norm))
    if module.running_var is None:
        return torch.zeros_like(difference)
    scale = (module.running_var + module.eps).rsqrt() * (1.0 if module.weight is None else module.weight)
    # A channel that BatchNorm scales by next to nothing cannot make up for anything.
    inverse = torch.where(scale.abs() > _LEAST_SCALE * scale.abs().mean(), 1 / scale, 0.0)[positions]
    return difference * inverse.view(1, -1, *[1] * (difference.dim() - 2))


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
