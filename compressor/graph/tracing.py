"""Run the model once, apply the rules, return the channel graph.

The model runs on tensors without data (torch's meta device), so that a trace costs no arithmetic and no memory, under
a `TorchDispatchMode` that sees every operation that really runs, whatever Python code calls it. Constants that the
model makes for itself (positions, masks, small index tables) keep their data. A model that needs the values of its
activations runs on real ones instead, and the graph's notes say so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from compressor._utils import uncollected
from compressor.errors import TraceError
from compressor.graph.context import Flow
from compressor.graph.group import ChannelGraph
from compressor.graph.grouping import group_channels
from compressor.graph.recorder import Recorder
from compressor.graph.recording import Script, Trail


@uncollected()
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
    flow, script, notes = Flow(), Script(meta=True), list[str]()
    try:
        Recorder(model, flow, script).run(example_inputs)
    except Exception as failure:
        flow, script = _run_real(model, example_inputs)
        notes.append(f"ran on real tensors, because without data it failed: {type(failure).__name__}: {failure}")
    classes = flow.labels.solve()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if unused := [name for name in shapes if name not in flow.parameters]:
        listed = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
        notes.append(
            f"{len(unused)} parameters take no part in evaluation mode ({listed}): no cut narrows them, and parts "
            "that only training uses may not fit a cut model; build the model without them"
        )
    found = group_channels(flow, classes, shapes)
    script.journal = [script.slots(axes) for axes in flow.labels.journal]
    script.parameters = {name: script.slots(axes) for name, axes in flow.parameters.items()}
    script.indices = {name: script.slot(axis) for name, axis in flow.indices.items()}
    return ChannelGraph(
        model=model,
        example_inputs=example_inputs,
        groups=found.groups,
        frozen=found.frozen,
        params=found.params,
        macs=found.macs,
        offsets=flow.sure_offsets(),
        notes=tuple(notes),
        table=found.table,
        trail=Trail.of(script, classes.of, found.channels),
    )


def _run_real(model: nn.Module, example_inputs: Any) -> tuple[Flow, Script]:
    flow, script = Flow(), Script(meta=False)
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        Recorder(model, flow, script).run(example_inputs)
    except Exception as failure:
        shapes = tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, example_inputs)
        raise TraceError(type(model).__name__, str(shapes), flow.module, failure) from failure
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(saved[name])
    return flow, script
