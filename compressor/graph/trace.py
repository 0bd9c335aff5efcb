"""Run the model once, apply the rules, return the channel graph.

The model runs on tensors without data (torch's meta device), so that a trace costs no arithmetic and no memory, under
a `TorchDispatchMode` that sees every operation that really runs, whatever Python code calls it. Constants that the
model makes for itself (positions, masks, small index tables) keep their data. A model that needs the values of its
activations runs on real ones instead, and the graph's notes say so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from compressor.errors import TraceError
from compressor.graph.axes import BoolArray, blank
from compressor.graph.flow import Axes, Flow, Known, Rule
from compressor.graph.group import ChannelGraph
from compressor.graph.grouping import group_channels
from compressor.graph.rules import IGNORED, RULES
from compressor.graph.rules.pointwise import filled
from compressor.graph.trail import Mismatch, ReplayFlow, Step, Trail, compare, shapes_of
from compressor.runtime import as_arguments, evaluating

_CONSTANT_NUMEL = 1 << 20


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
    flow, steps, notes = Flow(), list[Step](), list[str]()
    try:
        _run(model, example_inputs, flow, steps.append, meta=True)
    except Exception as failure:
        flow, steps = Flow(), []
        _run_real(model, example_inputs, flow, steps.append)
        notes.append(f"ran on real tensors, because without data it failed: {type(failure).__name__}: {failure}")
    classes = flow.labels.solve()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = group_channels(flow, classes, shapes)
    trail = Trail(steps, flow.labels.journal, flow.parameters, classes.of, found.channels, meta=not notes)
    return ChannelGraph(
        model=model,
        example_inputs=example_inputs,
        groups=found.groups,
        frozen=found.frozen,
        params=found.params,
        macs=found.macs,
        offsets=flow.sure_offsets(),
        notes=tuple(notes),
        trail=trail,
    )


def retrace(graph: ChannelGraph, removed: BoolArray) -> Trail:
    """Run the model after a cut and hold every operation against the trace: the same channels, less the removed ones.

    Args:
        graph: the graph as it was before the cut, of the model that is cut already.
        removed: `(number of classes,)`, which classes the cut took away.

    Returns:
        The trail of the cut model, for the next cut.

    Raises:
        Mismatch: an operation does not carry what the cut should leave; its `step` is the number of the operation.
    """
    trail = graph.trail
    flow = ReplayFlow(trail, removed)

    def record(step: Step) -> None:
        compare(trail, len(flow.steps), step, removed)
        flow.steps.append(step)

    try:
        _run(graph.model, graph.example_inputs, flow, record, meta=trail.meta)
    except Mismatch:
        raise
    except Exception as failure:
        raise Mismatch(f"{type(failure).__name__}: {failure}", len(flow.steps)) from failure
    identity = np.arange(len(removed), dtype=np.int64)
    return Trail(flow.steps, flow.labels.journal, flow.parameters, identity, trail.channels, trail.meta)


def _run_real(model: nn.Module, example_inputs: Any, flow: Flow, record: Callable[[Step], None]) -> None:
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        _run(model, example_inputs, flow, record, meta=False)
    except Exception as failure:
        shapes = tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, example_inputs)
        raise TraceError(type(model).__name__, str(shapes), flow.module, failure) from failure
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(saved[name])


def _run(model: nn.Module, example_inputs: Any, flow: Flow, record: Callable[[Step], None], meta: bool) -> None:
    owned = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    recorder = Recorder(flow, owned, record, meta)
    inputs = tree_map(recorder.enter_input, example_inputs)
    args, kwargs = as_arguments(inputs)
    with evaluating(model), _plain_attention(), _module_names(model, flow), recorder:
        result = model(*args, **kwargs)
    flow.op = flow.module = ""
    for tensor in _tensors_in(result):
        flow.freeze(flow.axes(tensor), "model output")


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Let attention run as the operations that it consists of, not as one that no rule can look into."""
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _module_names(model: nn.Module, flow: Flow) -> Iterator[None]:
    """Keep `flow.module` the qualified name of the module that runs."""
    names = {id(module): name for name, module in model.named_modules()}
    stack = [""]

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(names.get(id(module), stack[-1]))
        flow.module = stack[-1]

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()
        flow.module = stack[-1]

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Give every tensor in a model's result, whatever container or object holds it."""
    for leaf in tree_flatten(value)[0]:
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):
            yield from _tensors_in(dict(vars(leaf)))


@dataclass(eq=False)
class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation, runs it without data, applies its rule and records the step."""

    flow: Flow
    owned: Mapping[int, str]
    record: Callable[[Step], None]
    meta: bool
    _twins: dict[int, Tensor] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set)
    _originals: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Let the dispatch mode set itself up."""
        super().__init__()  # type: ignore[no-untyped-call]

    def enter_input(self, value: Any) -> Any:
        """Give what stands for an example input: a tensor without data, none of whose axes has channels."""
        if not isinstance(value, Tensor):
            return value
        return self._symbol(value, Known(tuple(blank(size) for size in value.shape)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        flat, spec = tree_flatten((args, kwargs or {}))
        name, rule = _rule_of(func)
        if rule is not filled and not any(self._is_symbol(value, func) for value in flat):
            return self._constant(func, args, kwargs or {})
        if rule is None and name not in IGNORED:
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        flat = [self._stand_in(value) for value in flat]
        args, kwargs = tree_unflatten(flat, spec)
        out = func(*args, **kwargs)
        self._apply(name, rule, args, kwargs, out, [value for value in flat if isinstance(value, Tensor)])
        return out

    # -- which tensors have no data

    def _is_symbol(self, value: Any, func: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        mutable = id(value) in self.owned and func._schema.is_mutable
        return id(value) in self._seen or self._parameter(value) or mutable

    def _parameter(self, tensor: Tensor) -> bool:
        return id(tensor) in self.owned and tensor.is_floating_point()

    def _stand_in(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("meta") if self.meta else value
        if not isinstance(value, Tensor) or id(value) in self._seen:
            return value
        if id(value) in self._twins:
            return self._twins[id(value)]
        name = self.owned.get(id(value))
        twin = self._symbol(value, None if name else self.flow.known(value))
        if name:
            self.flow.enter(twin, name, value.shape)
        self._twins[id(value)] = twin
        self._originals.append(value)
        return twin

    def _symbol(self, tensor: Tensor, known: Known | None) -> Tensor:
        """Give the tensor that takes part in the run for this one."""
        twin = tensor.detach()
        if self.meta:
            twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        self._seen.add(id(twin))
        if known:
            self.flow.know(twin, known)
        return twin

    def _constant(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation on constants alone; large or random results lose their data."""
        if not self.meta:
            return func(*args, **kwargs)
        if not _tensors_among(args, kwargs):
            shape = func(*args, **{**kwargs, "device": torch.device("meta")}) if "device" in kwargs else None
            if isinstance(shape, Tensor) and shape.numel() > _CONSTANT_NUMEL:
                return self._symbol(shape, None)
            if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
                kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **kwargs)

    # -- rules

    def _apply(self, name: str, rule: Rule | None, args: Any, kwargs: Any, out: Any, inputs: list[Tensor]) -> None:
        flow = self.flow
        flow.op = name
        flow.use(inputs)
        results = [value for value in tree_flatten(out)[0] if isinstance(value, Tensor)]
        taken = tuple(flow.axes(tensor) for tensor in inputs)
        axes = self._axes(rule, args, kwargs, out, results, inputs)
        weights = [flow.weight(tensor) for tensor in inputs]
        weight = weights[0] if weights and all(weights) else None
        made_by = flow.weight(inputs[1]) if name == "aten.convolution" else None
        for tensor, each in zip(results, axes, strict=True):
            self._seen.add(id(tensor))
            flow.know(tensor, Known(each, weight, made_by))
        if name not in IGNORED:
            self.record(Step(name, flow.module, taken, tuple(axes), shapes_of(results)))

    def _axes(
        self, rule: Rule | None, args: Any, kwargs: Any, out: Any, results: list[Tensor], inputs: list[Tensor]
    ) -> list[Axes]:
        """Apply the rule; where there is none, or it does not fit, nothing that reaches the operation can be cut."""
        why = "no axis rule for this operation"
        try:
            found = rule(self.flow, out, *args, **kwargs) if rule else None
            axes = [found] if isinstance(found, tuple) else found
            if axes is not None and _fits(axes, results):
                return axes
        except Mismatch:
            raise
        except Exception as failure:
            why = f"its axis rule failed ({type(failure).__name__}: {failure})"
        for tensor in inputs:
            self.flow.freeze(self.flow.axes(tensor), f"{why}, input shape {tuple(tensor.shape)}")
        return [tuple(blank(size) for size in tensor.shape) for tensor in results]


def _rule_of(func: Any) -> tuple[str, Rule | None]:
    """Give the name of an operation without its overload, and its rule. In-place ones go by the plain name."""
    name = f"{func.namespace}.{func._schema.name.partition('::')[2]}"
    if name not in RULES and func._schema.is_mutable:
        name = name.removesuffix("_")
    return name, RULES.get(name)


def _fits(axes: list[Axes], results: list[Tensor]) -> bool:
    """Tell whether a rule gave one axis for every dimension of every result, of the right length."""
    return len(axes) == len(results) and all(
        len(each) == tensor.dim()
        and all(
            not isinstance(axis, np.ndarray) or len(axis) == size for axis, size in zip(each, tensor.shape, strict=True)
        )
        for each, tensor in zip(axes, results, strict=True)
    )


def _tensors_among(args: Any, kwargs: Any) -> bool:
    return any(isinstance(value, Tensor) for value in tree_flatten((args, kwargs))[0])
