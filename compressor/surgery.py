"""The cut: channels are removed for good, from weights, gradients, buffers and optimizer state at once.

A cut validates first, then writes, then runs the model without data and holds every operation against the trace. On any
failure everything is put back bit for bit. Parameters stay the same objects, so optimizers, schedulers and averaged
copies that refer to them carry on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.errors import CutError, InputError, UnknownNameError
from compressor.graph.axes import BoolArray
from compressor.graph.group import ChannelGraph, Group
from compressor.graph.retrace import retrace
from compressor.graph.table import Table
from compressor.graph.trail import Mismatch, Trail
from compressor.sizes import follow, named_tensors_of, refit, replace_data


def cut(
    graph: ChannelGraph,
    keep: Mapping[str, Tensor | Sequence[int]],
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    means: Mapping[str, Tensor] | None = None,
    check: Callable[[], None] | None = None,
) -> None:
    """Remove every channel that is not kept, in place; writes the model, the optimizers' state and the graph.

    Args:
        graph: the channel graph of the model; it describes the smaller model afterwards and can be cut again.
        keep: by group name, the channel indices that stay, `(n,)` with `1 <= n <= C`, in any order. Groups that are not
            named stay whole.
        optimizer: optimizers whose state is to be sliced along.
        means: by consuming weight, the mean of its input per channel, `(channels of that input,)`. Where given, what
            the removed channels contribute on average is folded into the next bias or running mean.
        check: called when the model is cut and verified; what it raises takes the cut back.

    Raises:
        UnknownNameError: a group that is not in the graph.
        InputError: indices that are out of range, repeated, or none at all.
        CutError: the cut model does not do what the trace says it should (a size baked into Python code, say), or an
            optimizer's state cannot follow. The model, the optimizers and the graph are as they were.
    """
    sizes = graph.sizes()
    kept = {name: _checked(sizes, name, indices) for name, indices in keep.items()}
    kept = {name: indices for name, indices in kept.items() if len(indices) < sizes[name]}
    if not kept:
        return
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    transaction = _Transaction(graph.model, optimizers)
    table: Table = graph.table
    gone, removed = table.gone(kept), _removed_classes(graph, kept)
    try:
        if means:
            _fold(graph, kept, means, transaction)
        for place, positions in table.stays(gone).items():
            if place.role:
                transaction.narrow(place.tensor, place.dim, positions)
        for name, numbers in graph.trail.renumbered(removed).items():
            transaction.renumber(name, torch.from_numpy(numbers))
        refit(graph.model)
        trail = _verified(graph, removed)
        if check:
            check()
    except BaseException:
        transaction.undo()
        raise
    graph.table, graph.trail = table.without(gone), trail
    exact = {group.name: group.exact for group in graph.groups}
    graph.groups = tuple(
        group for group in graph.table.groups([exact.get(name, True) for name in table.names]) if group.name in exact
    )


def _checked(sizes: Mapping[str, int], name: str, indices: Tensor | Sequence[int]) -> Tensor:
    if name not in sizes:
        raise UnknownNameError("group", name, sizes, hint="`graph.groups` lists them")
    chosen = torch.as_tensor(indices).detach().cpu()
    if (chosen.numel() and (chosen.dtype.is_floating_point or chosen.dtype == torch.bool)) or chosen.dim() != 1:
        kind = f"{chosen.dtype} of shape {tuple(chosen.shape)}"
        raise InputError(f"keep[{name!r}] is {kind}: give the channel indices that stay, as integers of shape (n,)")
    chosen = chosen.long()
    if len(chosen) == 0:
        raise InputError(f"keep[{name!r}] is empty: at least one of its {sizes[name]} channels must stay")
    if int(chosen.min()) < 0 or int(chosen.max()) >= sizes[name]:
        raise InputError(f"keep[{name!r}] holds index {_outside(chosen, sizes[name])}: give 0 to {sizes[name] - 1}")
    if len(set(chosen.tolist())) < len(chosen):
        raise InputError(f"keep[{name!r}] names a channel twice: give every index once")
    return chosen.sort().values


def _outside(chosen: Tensor, size: int) -> int:
    return int(chosen[(chosen < 0) | (chosen >= size)][0])


def removed_channels(group: Group, kept: Tensor) -> Tensor:
    """Give the channels of a group that are not kept, `(C - n,)`, in order."""
    gone = torch.ones(group.size, dtype=torch.bool)
    gone[kept] = False
    return gone.nonzero().flatten()


def _removed_classes(graph: ChannelGraph, kept: Mapping[str, Tensor]) -> BoolArray:
    """Tell for every class of the trail whether it goes, `(classes,)`."""
    trail: Trail = graph.trail
    removed = np.zeros(trail.classes, dtype=bool)
    for name, indices in kept.items():
        removed[trail.channels[name][removed_channels(graph[name], indices).numpy()]] = True
    return removed


def _verified(graph: ChannelGraph, removed: BoolArray) -> Trail:
    """Run the cut model without data and hold it against the trace; attributes that say a size may follow once."""
    try:
        return retrace(graph, removed)
    except Mismatch as mismatch:
        if not follow(graph.model, graph.trail.changes(removed)):
            raise _refusal(graph.trail, removed, mismatch) from mismatch
    try:
        return retrace(graph, removed)
    except Mismatch as mismatch:
        raise _refusal(graph.trail, removed, mismatch) from mismatch


def _refusal(trail: Trail, removed: BoolArray, mismatch: Mismatch) -> CutError:
    """Say which operation does not follow, and which groups stand there."""
    steps = trail.script.steps
    at = min(mismatch.step, len(steps) - 1)
    where = f"{steps[at].op} in {steps[at].module or 'the model'}"
    return CutError(f"{where} does not follow the cut: {mismatch}", trail.blamed(at, removed))


# -- folding


def _fold(
    graph: ChannelGraph, kept: Mapping[str, Tensor], means: Mapping[str, Tensor], transaction: _Transaction
) -> None:
    """Add what removed channels contribute on average to the bias, or running mean, behind each consumer."""
    gone: dict[str, Tensor] = {}
    for name, indices in kept.items():
        channels = removed_channels(graph[name], indices)
        for seen in graph[name].inputs:
            if seen.weight in means and seen.weight in graph.offsets:
                mean = means[seen.weight]
                positions = seen.positions[channels].flatten().to(mean.device)
                gone.setdefault(seen.weight, torch.zeros_like(mean))[positions] = mean[positions]
    for weight, mean in gone.items():
        offset = graph.offsets[weight]
        transaction.add(offset.tensor, offset.sign * _response(transaction.tensors[weight], mean))


@torch.no_grad()
def _response(weight: Tensor, mean: Tensor) -> Tensor:
    """Give the output `(D,)` of a convolution or Linear `(D, C / blocks, ...)` for a constant input `(C,)`."""
    kernel = weight.detach().flatten(2).sum(2) if weight.dim() > 2 else weight.detach()
    blocks = len(mean) // kernel.shape[1]
    parts = zip(kernel.chunk(blocks), mean.to(kernel).chunk(blocks), strict=True)
    return torch.cat([part @ constant for part, constant in parts])


# -- writing, and putting back


class _Transaction:
    """Writes tensors, gradients and optimizer state, and remembers how to put everything back."""

    def __init__(self, model: nn.Module, optimizers: list[Optimizer]) -> None:
        modules = dict(model.named_modules())
        self.tensors = named_tensors_of(modules)
        self._optimizers = optimizers
        self._data: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._state: list[tuple[dict[str, Any], str, Any]] = []
        self._attributes = [(module, type(module), _plain(module)) for module in modules.values()]

    def narrow(self, name: str, dim: int, stays: Tensor) -> None:
        """Leave only some positions along one dimension of a tensor, its gradient and its optimizer state."""
        tensor = self.tensors[name]
        self._remember(name)
        index = stays.to(tensor.device)
        gradient, shape = tensor.grad, tensor.shape
        tensor.grad = None
        self._narrow_state(name, tensor, shape, dim, index)
        replace_data(tensor, tensor.data.index_select(dim, index))
        if gradient is not None:
            tensor.grad = gradient.index_select(dim, index)

    def _narrow_state(self, name: str, tensor: Tensor, shape: torch.Size, dim: int, index: Tensor) -> None:
        for optimizer in self._optimizers:
            state = optimizer.state.get(tensor, {})
            for key, value in list(state.items()):
                if not isinstance(value, Tensor) or value.dim() == 0 or value.numel() == 1:
                    continue
                if value.shape != shape:
                    raise CutError(
                        f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for {name!r} of shape "
                        f"{tuple(shape)}, which does not say what belongs to a channel; use SGD, Adam(W) or RMSprop"
                    )
                self._state.append((state, key, value))
                state[key] = value.index_select(dim, index.to(value.device))

    def add(self, name: str, amount: Tensor) -> None:
        """Add to a tensor, into new memory so that the old values can come back."""
        self._remember(name)
        self.tensors[name].data = self.tensors[name].data + amount.to(self.tensors[name])

    def renumber(self, name: str, numbers: Tensor) -> None:
        """Replace every position in a buffer of positions by its new number."""
        self._remember(name)
        tensor = self.tensors[name]
        tensor.data = numbers.to(tensor.device)[tensor.data.long()].to(tensor.dtype)

    def _remember(self, name: str) -> None:
        self._data.setdefault(name, (self.tensors[name].data, self.tensors[name].grad))

    def undo(self) -> None:
        """Put everything back, bit for bit."""
        for name, (data, gradient) in self._data.items():
            self.tensors[name].grad = None
            replace_data(self.tensors[name], data)
            self.tensors[name].grad = gradient
        for state, key, value in reversed(self._state):
            state[key] = value
        for module, kind, sizes in self._attributes:
            module.__class__ = kind
            module.__dict__.update(sizes)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, int | tuple)}
