"""The cut: channels are removed for good, from weights, gradients, buffers and optimizer state at once.

A cut validates first, then writes, then runs the model without data and holds every operation against the trace. On any
failure everything is put back bit for bit. Parameters stay the same objects, so optimizers, schedulers and averaged
copies that refer to them carry on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor._utils import uncollected
from compressor.errors import CutError, InputError, StaleGraphError, UnknownNameError
from compressor.graph import (
    BoolArray,
    ChannelGraph,
    Group,
    Mismatch,
    Table,
    Trail,
    follow,
    is_torchs_own,
    refit,
    retrace,
)
from compressor.surgery.transaction import Transaction


@uncollected()
def cut(
    graph: ChannelGraph,
    keep: Mapping[str, Tensor | Sequence[int]],
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    means: Mapping[str, Tensor] | None = None,
    check: Callable[[], None] | None = None,
    copies: Iterable[nn.Module] = (),
) -> None:
    """Remove every channel that is not kept, in place; writes the model, its copies, the optimizers and the graph.

    Args:
        graph: the channel graph of the model; it describes the smaller model afterwards and can be cut again.
        keep: by group name, the channel indices that stay, `(n,)` with `1 <= n <= C`, in any order. Groups that are not
            named stay whole.
        optimizer: optimizers whose state is to be sliced along.
        means: by consuming weight, the mean of its input per channel, `(channels of that input,)`. Where given, what
            the removed channels contribute on average is folded into the next bias or running mean.
        check: called when the model is cut and verified; what it raises takes the cut back.
        copies: models with tensors of the same names and shapes that lose the same channels, such as an exponential
            moving average (`AveragedModel(...).module`).

    Raises:
        UnknownNameError: a group that is not in the graph.
        InputError: indices that are out of range, repeated, or none at all; a copy of another model.
        CutError: the cut model does not do what the trace says it should (a size baked into Python code, say), or an
            optimizer's state cannot follow. The model, the optimizers and the graph are as they were.
        StaleGraphError: the model does not even run uncut as it did when it was traced.
    """
    sizes = graph.sizes()
    kept = {name: _checked(sizes, name, indices) for name, indices in keep.items()}
    kept = {name: indices for name, indices in kept.items() if len(indices) < sizes[name]}
    if not kept:
        return
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    transaction = Transaction(graph.model, list(copies), optimizers)
    table: Table = graph.table
    gone, removed = table.gone(kept), _removed_classes(graph, kept)
    try:
        if means:
            _fold(graph, kept, means, transaction)
        for name, stays in table.stays(gone).items():
            transaction.narrow(name, stays)
        for name, numbers in graph.trail.renumbered(removed).items():
            transaction.renumber(name, torch.from_numpy(numbers))
        refit(graph.model)
        trail = _verified(graph, removed)
        transaction.refit_copies()
        if check:
            check()
    except BaseException as failure:
        transaction.undo()
        if isinstance(failure, CutError) and failure.groups and not _is_current(graph):
            raise StaleGraphError(failure.reason) from failure
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
    removed = np.zeros_like(trail.live)
    for name, indices in kept.items():
        removed[trail.channels[name][removed_channels(graph[name], indices).numpy()]] = True
    return removed


def _verified(graph: ChannelGraph, removed: BoolArray) -> Trail:
    """Run the cut model without data and hold it against the trace; give the trail for the next cut.

    Where a module's code does not follow, its attributes that say a size follow once, and so do those of its like.
    """
    trail: Trail = graph.trail
    after = trail.without(removed)
    modules = dict(graph.model.named_modules())
    first: dict[str, tuple[Mismatch, list[int]]] = {}
    while True:
        try:
            retrace(graph, after)
            return after
        except Mismatch as mismatch:
            at = min(mismatch.step, len(trail.script.steps) - 1)
            module = trail.script.steps[at].module
            if module in first:  # it has followed, in vain: what counts is why it had to
                raise _refusal(trail, removed, *first[module]) from mismatch
            alike = trail.alike(at, after, partial(_kind, modules))
            places = {trail.script.steps[number].module for number in alike} - first.keys()
            first |= dict.fromkeys(places, (mismatch, alike))
            followed = [follow(modules[name], trail.changes(name, after)) for name in places]
            if not any(followed):
                raise _refusal(trail, removed, mismatch, alike) from mismatch


def _is_current(graph: ChannelGraph) -> bool:
    """Tell whether the model, as it is, still runs what was traced."""
    try:
        retrace(graph, graph.trail)
    except Mismatch:
        return False
    return True


def _kind(modules: Mapping[str, nn.Module], name: str) -> object:
    """Give what the code that runs in a module is known by; torch's own modules have only their place."""
    return name if is_torchs_own(modules[name]) else type(modules[name])


def _refusal(trail: Trail, removed: BoolArray, mismatch: Mismatch, alike: Sequence[int]) -> CutError:
    """Say which operation does not follow, and which groups stand there, or at its like elsewhere."""
    steps = trail.script.steps
    step = steps[min(mismatch.step, len(steps) - 1)]
    groups = dict.fromkeys(name for number in alike for name in trail.blamed(number, removed))
    where = f"{step.op} in {step.module or 'the model'}"
    return CutError(f"{where} does not follow the cut: {mismatch}", list(groups))


# -- folding


def _fold(
    graph: ChannelGraph, kept: Mapping[str, Tensor], means: Mapping[str, Tensor], transaction: Transaction
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
        for tensors in transaction.tensors:
            transaction.add(tensors[offset.tensor], offset.sign * _response(tensors[weight], mean))


@torch.no_grad()
def _response(weight: Tensor, mean: Tensor) -> Tensor:
    """Give the output `(D,)` of a convolution or Linear `(D, C / blocks, ...)` for a constant input `(C,)`."""
    kernel = weight.detach().flatten(2).sum(2) if weight.dim() > 2 else weight.detach()
    blocks = len(mean) // kernel.shape[1]
    parts = zip(kernel.chunk(blocks), mean.to(kernel).chunk(blocks), strict=True)
    return torch.cat([part @ constant for part, constant in parts])
