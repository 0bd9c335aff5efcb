"""Run the model once, apply the rules, return the channel graph.

The model runs on tensors without data (torch's meta device), so that a trace costs no arithmetic and no memory, under
a `TorchDispatchMode` that sees every operation that really runs, whatever Python code calls it. Constants that the
model makes for itself (positions, masks, small index tables) keep their data. A model that needs the values of its
activations runs on real ones instead, and the graph's notes say so.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from compressor._utils import gc_disabled
from compressor.errors import TraceError
from compressor.graph.channel_graph import ChannelGraph
from compressor.graph.context import TraceContext
from compressor.graph.grouping import group_channels
from compressor.graph.recorder import Recorder
from compressor.graph.recording import OpLog, Recording

logger = logging.getLogger(__name__)


@gc_disabled()
def trace(model: nn.Module, example_inputs: Any) -> ChannelGraph:
    """Work out which channels of a model go together.

    The model runs once, in evaluation mode, without data. Nothing is changed: training mode, gradients, buffers,
    random state and hooks are as before.

    Args:
        model: any module; its own code may branch and loop as it likes.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, as for `model(...)`.

    Returns:
        The graph, with its groups in the order in which the model uses them.

    Raises:
        TraceError: the model does not run on the example inputs.
    """
    context = TraceContext()
    log = OpLog(meta=True)
    notes = list[str]()
    try:
        Recorder(model, context, log).run(example_inputs)
    except Exception as failure:
        # Code that reads a value (`if x.sum() > 0`) fails on tensors without data, and so does a model that does not
        # run at all; the second run tells them apart.
        context, log = _run_real(model, example_inputs)
        notes.append(f"ran on real tensors, because without data it failed: {type(failure).__name__}: {failure}")
    classes = context.labels.solve()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if unused := [name for name in shapes if name not in context.parameters]:
        listed = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
        notes.append(
            f"{len(unused)} parameters take no part in evaluation mode ({listed}): no cut narrows them, and parts "
            "that only training uses may not fit a cut model; build the model without them"
        )
    for note in notes:
        logger.warning("%s: %s", type(model).__name__, note)
    found = group_channels(context, classes, shapes)
    log.journal = [log.slots(axes) for axes in context.labels.journal]
    log.parameters = {name: log.slots(axes) for name, axes in context.parameters.items()}
    log.indices = {name: log.slot(axis) for name, axis in context.indices.items()}
    return ChannelGraph(
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
    )


def _run_real(model: nn.Module, example_inputs: Any) -> tuple[TraceContext, OpLog]:
    context = TraceContext()
    log = OpLog(meta=False)
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        Recorder(model, context, log).run(example_inputs)
    except Exception as failure:
        shapes = tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, example_inputs)
        raise TraceError(type(model).__name__, str(shapes), context.module, failure) from failure
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(saved[name])
    return context, log
