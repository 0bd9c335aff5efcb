"""Run a model after a cut and hold every operation against the trail of the trace.

Where an operation treats positions alike whatever they are (a convolution, a sum), and its tensors come from where they
came from before, with the same arguments, its result follows from the trail and is not computed again. Where sizes or
positions stand in arguments (a view, a slice) the operation runs and its rule is applied anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compressor.graph.context import Axes
from compressor.graph.group import ChannelGraph
from compressor.graph.recorder import Call, Recorder, comparable, leaves
from compressor.graph.recording import Form, Mismatch, ReplayFlow, Step, Trail, compare

_META = torch.device("meta")


def retrace(graph: ChannelGraph, trail: Trail) -> None:
    """Run the model after a cut and hold every operation against the trace: the same channels, less the removed ones.

    Args:
        graph: the graph as it was before the cut, of the model that is cut already.
        trail: the graph's trail without what the cut removed.

    Raises:
        Mismatch: an operation does not carry what the cut should leave; its `step` is the number of the operation.
    """
    flow = ReplayFlow(trail)
    follower = Follower(graph.model, flow, trail.script, trail=trail)
    try:
        follower.check_parameters()
        follower.run(graph.example_inputs)
    except Mismatch:
        raise
    except Exception as failure:
        raise Mismatch(f"{type(failure).__name__}: {failure}", flow.at) from failure
    if flow.at < (trail.end if trail.is_loose(flow.at) else len(trail.script.steps)):
        raise Mismatch("the cut model stops before this operation", flow.at)


@dataclass(eq=False)
class Follower(Recorder):  # type: ignore[no-untyped-call]
    """A recorder that writes nothing, and compares."""

    flow: ReplayFlow
    trail: Trail = field(kw_only=True)
    _alive: list[Tensor] = field(default_factory=list)

    def check_parameters(self) -> None:
        """Raise Mismatch for a parameter or buffer that has not the shape that the cut should leave."""
        for name, slots in self.script.parameters.items():
            shape = tuple(self.tensors[name].shape)
            wanted = self.trail.shape(Form(slots, shape, torch.float32, None))
            if list(shape) != wanted:
                raise Mismatch(f"{name!r} has shape {shape}, not {tuple(wanted)}", 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Give an operation's result, from the trail where that is sure."""
        steps, at = self.script.steps, self.flow.at
        if at < len(steps) and steps[at].steady and steps[at].func is func:
            tensors, plain = leaves((args, kwargs or {}))
            if self._as_before(steps[at], tensors, comparable(steps[at].op, plain, tensors)):
                return self._result(steps[at], tensors)
        if at >= self.trail.end and self.trail.is_loose(at):
            return func(*args, **(kwargs or {}))  # no channel comes after this, and what runs may depend on values
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _as_before(self, step: Step, tensors: list[Tensor], plain: tuple[Any, ...]) -> bool:
        """Tell whether an operation gets what it got before the cut, less what was removed."""
        origins = self.flow.origins
        return plain == step.plain and all(
            (origins.get(id(tensor)) or self._origin(tensor)) == origin
            for tensor, origin in zip(tensors, step.inputs, strict=True)
        )

    def _result(self, step: Step, tensors: list[Tensor]) -> Any:
        made = [tensors[0]] if step.written else [self._made(form) for form in step.results]
        for index, tensor in enumerate(made):
            self.flow.came_from(tensor, ("step", self.flow.at, index))
        self._alive += made
        self.flow.at += 1
        return made[0] if len(made) == 1 else tuple(made)

    def _made(self, form: Form) -> Tensor:
        shape = self.trail.shape(form)
        assert form.order is not None
        strides, step = [0] * len(shape), 1
        for dim in reversed(form.order):
            strides[dim] = step
            step *= max(shape[dim], 1)
        return torch.empty_strided(shape, strides, dtype=form.dtype, device=_META)

    def _record(self, call: Call, axes: list[Axes], results: list[Tensor], plain: bool) -> int:
        """Compare instead of writing."""
        compare(self.trail, self.flow.at, call.name, axes, results)
        self._require_same(self.script.steps[self.flow.at], call)
        self.flow.at += 1
        return self.flow.at - 1

    def _require_same(self, step: Step, call: Call) -> None:
        """Refuse other tensors and other values than before: the model would compute something else.

        Whole numbers may differ where an operation has sizes among its arguments.
        """
        if self.trail.is_loose(self.flow.at):
            return
        if call.origins != step.inputs:
            raise Mismatch("it gets other tensors than before the cut", self.flow.at)
        before, now = (_values(plain, step.steady) for plain in (step.plain, call.plain))
        if before != now:
            raise Mismatch(f"its arguments {before} became {now}: a value that depends on a size", self.flow.at)


def _values(plain: tuple[Any, ...], with_integers: bool) -> list[Any]:
    return [value for value in plain if isinstance(value, float) or (with_integers and type(value) is int)]
