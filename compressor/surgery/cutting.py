"""The cut: channels are removed for good, from weights, gradients, buffers and optimizer state at once.

A cut validates first, then writes, then runs the model without data and holds every operation against the trace. On any
failure everything is put back bit for bit. Parameters stay the same objects, so optimizers, schedulers and averaged
copies that refer to them carry on.

    a.weight (4, 3, 3, 3), b.weight (2, 4, 1, 1), keep {"a": [0, 2]}
    a.weight, its gradient and its momentum become rows 0 and 2: (2, 3, 3, 3); b.weight columns 0 and 2: (2, 2, 1, 1)
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor._utils import ambient_modes_disabled, gc_disabled
from compressor.errors import CutError, InputError, StaleGraphError, TraceError, UnknownNameError
from compressor.graph import (
    BoolArray,
    ChannelGraph,
    Group,
    Mismatch,
    Recording,
    is_bare_norm,
    is_torch_module,
    replace_size_attributes,
    sync_size_attributes,
    trace,
    verify_against_recording,
)
from compressor.surgery.compensation import constant_output
from compressor.surgery.moments import Moments
from compressor.surgery.optimizers import all_optimizers
from compressor.surgery.prediction import compensations
from compressor.surgery.transaction import Transaction

logger = logging.getLogger(__name__)


@ambient_modes_disabled()
@gc_disabled()
def cut(
    graph: ChannelGraph,
    keep: Mapping[str, Tensor | Sequence[int]],
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    means: Mapping[str, Tensor] | Moments | None = None,
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
            the removed channels contribute on average is folded into the next bias or running mean. Given `Moments`,
            what the channels that stay predict of them goes into their weights, and into these weights' momentum.
        check: called when the model is cut and verified; what it raises takes the cut back.
        copies: models with tensors of the same names and shapes that lose the same channels, such as an exponential
            moving average (`AveragedModel(...).module`).

    Raises:
        UnknownNameError: a group that is not in the graph.
        InputError: indices that are out of range, repeated, or none at all; a copy of another model.
        CutError: the cut model does not do what the trace says it should (a size baked into Python code, say), or an
            optimizer's state cannot follow. The model, the optimizers and the graph are as they were.
        StaleGraphError: the model does not even run uncut any more; what it ran when it was traced is out of date.
    """
    sizes = graph.sizes()
    kept = {name: _checked(sizes, name, indices) for name, indices in keep.items()}
    kept = {name: indices for name, indices in kept.items() if len(indices) < sizes[name]}
    if not kept:
        return
    optimizers = all_optimizers(optimizer)
    models = list(copies)
    try:
        _cut_once(graph, kept, optimizers, means, check, models)
    except CutError as refusal:
        if not refusal.groups or _is_current(graph):
            raise
        missing = [name for name in _trace_anew(graph, refusal) if name in kept]
        if missing:
            raise CutError(refusal.reason, missing) from refusal
        _cut_once(graph, kept, optimizers, means, check, models)


def _cut_once(
    graph: ChannelGraph,
    kept: Mapping[str, Tensor],
    optimizers: Sequence[Optimizer],
    means: Mapping[str, Tensor] | Moments | None,
    check: Callable[[], None] | None,
    copies: Sequence[nn.Module],
) -> None:
    transaction = Transaction(graph.model, copies, optimizers)
    parts = graph.uncoupled(kept)
    # A class is what the recording knows a channel by; it has others beside those of groups, which no cut removes.
    removed = graph.table.removed(parts)
    removed_classes = _removed_classes(graph.recording, parts)
    try:
        # The fold comes first: it reads the removed channels' weights, which are gone afterwards.
        if means:
            _fold(graph, kept, means, transaction)
        for name, positions in graph.table.kept_positions(removed).items():
            transaction.narrow(name, positions)
        for name, numbers in graph.recording.renumbered(removed_classes).items():
            transaction.renumber(name, torch.from_numpy(numbers))
        sync_size_attributes(graph.model)
        recording = _verified(graph, removed_classes)
        transaction.refit_copies()
        if check:
            check()
    # NOTE: BaseException, because Ctrl-C between two tensors must not leave half a cut either.
    except BaseException:
        transaction.undo()
        raise
    graph.narrow(removed, recording)


def _trace_anew(graph: ChannelGraph, refusal: CutError) -> list[str]:
    """Bring a graph up to date whose model, uncut, does not run any more as it was traced; return what it lost.

    A model that keeps something of a run (a grid for the last image size, an `lru_cache`) takes another way the next
    time, with the same channels.
    """
    logger.info("the model does not run as it was traced, so it is traced anew: %s", refusal.reason)
    try:
        fresh = trace(graph.model, graph.example_inputs, outputs=graph.outputs)
    except TraceError as failure:
        raise StaleGraphError(refusal.reason) from failure
    return graph.adopt(fresh)


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
    """Return the channels of a group that are not kept, `(C - n,)`, in order."""
    removed = torch.ones(group.size, dtype=torch.bool)
    removed[kept] = False
    return removed.nonzero().flatten()


def _removed_classes(recording: Recording, kept: Mapping[str, Tensor]) -> BoolArray:
    """Tell for every class of the recording whether it goes, `(classes,)`."""
    removed = np.zeros_like(recording.prunable)
    for name, indices in kept.items():
        classes = recording.channels[name]
        removed[np.delete(classes, indices.numpy())] = True
    return removed


def try_cut(
    graph: ChannelGraph,
    keep: Mapping[str, Tensor],
    optimizers: Sequence[Optimizer] = (),
    copies: Sequence[nn.Module] = (),
) -> None:
    """Cut, verify, and take the cut back.

    Raises:
        CutError: it would be refused.
    """
    with suppress(_TakenBack):
        cut(graph, keep, optimizers, check=_take_back, copies=copies)


class _TakenBack(Exception):
    """Raised by the check of a cut that was only a trial."""


def _take_back() -> NoReturn:
    raise _TakenBack


def _verified(graph: ChannelGraph, removed: BoolArray) -> Recording:
    """Run the cut model without data and hold it against the trace; give the recording for the next cut.

    Where a module's code does not follow, its attributes that say a size follow, and so do those of its like.
    """
    recording = graph.recording
    after = recording.without(removed)
    modules = dict(graph.model.named_modules())
    # NOTE: Blocks of one kind fail alike. All of them are changed, or refused, at the first failure: a network of
    # twelve blocks would otherwise be verified twelve times.
    first: dict[str, tuple[Mismatch, list[int]]] = {}
    tried: Counter[str] = Counter()
    for name in (name for name, module in modules.items() if is_bare_norm(module)):
        # InstanceNorm only warns of another width, so that no mismatch would tell.
        replace_size_attributes(modules[name], recording.changed_sizes_within(name, after), in_sequences=False)
    while True:
        try:
            verify_against_recording(graph, after)
            return after
        except Mismatch as mismatch:
            index = min(mismatch.index, len(recording.log.records) - 1)
            module = mismatch.module or recording.log.records[index].module
            same_op = recording.same_op_elsewhere(index, after, partial(_kind, modules))
            if mismatch.module is None:
                places = {recording.log.records[each].module for each in same_op}
                sizes = recording.changed_sizes
            else:
                places = {name for name in modules if _kind(modules, name) == _kind(modules, module)}
                sizes = recording.changed_sizes_within
            places = {name for name in places if tried[name] == tried[module]}
            for name in places:
                first.setdefault(name, (mismatch, same_op))
            # Numbers first, then those in tuples and lists, then no more: what counts is why it had to follow.
            changed = False
            while not changed and tried[module] < 2:
                follow = [
                    replace_size_attributes(modules[name], sizes(name, after), in_sequences=tried[module] == 1)
                    for name in places
                ]
                changed = any(follow)
                tried.update(places)
            if not changed:
                raise _refusal(graph, removed, *first[module]) from mismatch
            logger.info("sizes among the attributes of %s follow the cut", ", ".join(sorted(places)))


def _is_current(graph: ChannelGraph) -> bool:
    """Return whether the model, as it is, still runs what was traced."""
    try:
        verify_against_recording(graph, graph.recording)
    except Mismatch:
        return False
    return True


def _kind(modules: Mapping[str, nn.Module], name: str) -> object:
    """Return what the code that runs in a module is known by; torch's own modules have only their place."""
    return name if is_torch_module(modules[name]) else type(modules[name])


def _refusal(graph: ChannelGraph, removed: BoolArray, mismatch: Mismatch, same_op: Sequence[int]) -> CutError:
    """Say which operation does not follow, and which groups stand there, or at its like elsewhere."""
    recording = graph.recording
    records = recording.log.records
    record = records[min(mismatch.index, len(records) - 1)]
    groups = dict.fromkeys(name for index in same_op for name in recording.groups_at(index, removed))
    where = f"{record.op} in {record.module or 'the model'}"
    return CutError(f"{where} does not follow the cut: {mismatch}", graph.coupled_names(groups))


# -- compensation


def _fold(
    graph: ChannelGraph, kept: Mapping[str, Tensor], means: Mapping[str, Tensor] | Moments, transaction: Transaction
) -> None:
    """Add what removed channels contribute to what stays: the weights, and the bias or running mean behind them."""
    removed = {name: removed_channels(graph[name], indices) for name, indices in kept.items()}
    found = compensations(graph, removed, Moments.of(means))
    for weight, constant in found.constants.items():
        offset = graph.offsets[weight]
        for tensors in transaction.tensors:  # the model and its copies, each with weights of its own
            target = tensors[offset.tensor]
            transaction.add(target, offset.sign * constant_output(tensors[weight], constant, offset, len(target)))
    for weight, merges in found.merges.items():
        for merge in merges:
            transaction.add_linear(weight, merge.change)
