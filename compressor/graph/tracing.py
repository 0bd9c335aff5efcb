"""Run the model once, apply the rules, return the channel graph.

The model runs on tensors without data (torch's meta device), so that a trace costs no arithmetic and no memory, under
a `TorchDispatchMode` that sees every operation that really runs, whatever Python code calls it. Constants that the
model makes for itself (positions, masks, small index tables) keep their data. A model that needs the values of its
activations runs on real ones instead, and the graph's notes say so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from compressor._utils import gc_disabled
from compressor.errors import InputError, TraceError
from compressor.graph.channel_graph import ChannelGraph
from compressor.graph.context import TraceContext
from compressor.graph.grouping import group_channels
from compressor.graph.recorder import Recorder
from compressor.graph.recording import OpLog, Recording

logger = logging.getLogger(__name__)


@gc_disabled()
def trace(model: nn.Module, example_inputs: Any, *, outputs: Callable[[Any], Any] | None = None) -> ChannelGraph:
    """Work out which channels of a model go together.

    The model runs once, in evaluation mode, without data. Nothing is changed: training mode, gradients, buffers,
    random state and hooks are as before.

    Args:
        model: any module; its own code may branch and loop as it likes.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, as for `model(...)`.
        outputs: takes what the model returns and returns what counts of it: `lambda result: result.logits`, where
            hidden states come along that nobody reads. The others may lose channels. None: everything counts.

    Returns:
        The graph, with its groups in the order in which the model uses them.

    Raises:
        InputError: a wrapper such as DistributedDataParallel; new tensors go to a GPU by default.
        TraceError: the model does not run on the example inputs.
    """
    _refuse_wrappers(model)
    _refuse_default_device()
    context = TraceContext()
    log = OpLog(meta=True)
    notes = list[str]()
    try:
        Recorder(model, context, log).run(example_inputs, outputs)
    except Exception as failure:
        # Code that reads a value (`if x.sum() > 0`) fails on tensors without data, and so does a model that does not
        # run at all; the second run tells them apart.
        context, log = _run_real(model, example_inputs, outputs)
        notes.append(f"ran on real tensors, because without data it failed: {type(failure).__name__}: {failure}")
    classes = context.labels.solve()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    unused = [name for name in shapes if name not in context.parameters]
    for note in notes:
        logger.warning("%s: %s", type(model).__name__, note)
    found = group_channels(context, classes, shapes)
    log.journal = [log.slots(axes) for axes in context.labels.journal]
    log.parameters = {name: log.slots(axes) for name, axes in context.parameters.items()}
    log.indices = {name: log.slot(axis) for name, axis in context.indices.items()}
    graph = ChannelGraph(
        model=model,
        example_inputs=example_inputs,
        groups=found.groups,
        frozen=found.frozen,
        params=found.params,
        macs=found.macs,
        offsets=context.unshared_offsets(),
        notes=(*notes, *context.notes.values()),
        table=found.table,
        recording=Recording.from_log(log, classes.class_ids, found.channels),
        outputs=outputs,
        blocks=tuple(name for name, each in found.channels.items() if np.isin(each, classes.blocks).any()),
    )
    graph.freeze(
        _unread(graph), "nothing reads these channels in evaluation mode, or what does is hidden from the trace"
    )
    if unused:
        _freeze_what_training_reads(graph, unused)
    return graph


def _refuse_wrappers(model: nn.Module) -> None:
    """Refuse what keeps the shapes of a model's parameters, and would hand them on after a cut."""
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            kind = type(module).__name__
            where = f"the model's {name!r}" if name else "the model"
            raise InputError(
                f"{where} is wrapped in {kind}: give what is inside (its .module), and wrap it anew after every cut, "
                f"since {kind} keeps the old shapes"
            )


def _refuse_default_device() -> None:
    """Refuse a default device: positions of channels are numbers on the CPU, wherever the model is."""
    device = torch.get_default_device()
    if device.type != "cpu":
        raise InputError(
            f"new tensors go to {device} by default, and numbers of channels would too: call "
            f"torch.set_default_device('cpu') first, and model.to({str(device)!r})"
        )


def _freeze_what_training_reads(graph: ChannelGraph, unused: list[str]) -> None:
    """Freeze groups whose channels a part reads that only training runs: no cut could narrow that part along.

    Such are auxiliary classifiers (`if self.training: aux(h)`). A run in training mode shows what they read.

    Args:
        graph: of the run in evaluation mode.
        unused: parameters that took no part in it.
    """
    listed = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
    context = TraceContext()
    note = f"{len(unused)} parameters take no part in evaluation mode ({listed})"
    try:
        Recorder(graph.model, context, OpLog(meta=True)).run(graph.example_inputs, graph.outputs, training=True)
    except Exception as failure:
        # A BatchNorm may want more than one value, say. The graph holds for evaluation all the same.
        problem = f"{type(failure).__name__}: {failure}"
        _note(graph, f"{note}; what reads into them in training is not known, as that does not run: {problem}")
        return
    _note(graph, f"{note}: no cut narrows them, and channels that they read in training stay")
    classes = context.labels.solve().class_ids
    read = [context.parameters[name] for name in unused if name in context.parameters]
    labels = [axis for axes in read for axis in axes if isinstance(axis, np.ndarray)]
    tied = np.unique(classes[np.concatenate([*labels, np.empty(0, dtype=np.int64)])])
    for group in graph.groups:
        mine = [context.parameters[m.tensor][m.dim] for m in group.members if m.tensor in context.parameters]
        if any(isinstance(axis, np.ndarray) and np.isin(classes[axis], tied).any() for axis in mine):
            graph.freeze(
                [group.name], f"in training these channels reach parameters that evaluation never runs ({listed})"
            )


def _note(graph: ChannelGraph, text: str) -> None:
    logger.warning("%s: %s", type(graph.model).__name__, text)
    graph.notes += (text,)


def _unread(graph: ChannelGraph) -> list[str]:
    """Return the groups that no weight reads and nothing mixes: a head whose result only training returns, say.

    Scores converted to a list or to an array have left torch, and what they mean does not show either.
    """
    table = graph.table
    reads = np.array([place.role == "consumer" for place in table.places], dtype=bool)
    is_read = np.zeros(len(table.names), dtype=bool)
    is_read[table.group[reads[table.place]]] = True
    return [each.name for each, read in zip(graph.groups, is_read.tolist(), strict=True) if each.exact and not read]


def _run_real(
    model: nn.Module, example_inputs: Any, outputs: Callable[[Any], Any] | None
) -> tuple[TraceContext, OpLog]:
    context = TraceContext()
    log = OpLog(meta=False)
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        Recorder(model, context, log).run(example_inputs, outputs)
    except Exception as failure:
        shapes = tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, example_inputs)
        raise TraceError(type(model).__name__, str(shapes), context.module, failure) from failure
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(saved[name])
    return context, log
