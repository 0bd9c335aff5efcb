"""Sees every operation of a model that runs, runs it without data, applies its rule and writes the trail."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from compressor._utils import as_arguments
from compressor.graph.axes import FREE, blank
from compressor.graph.context import Axes, Flow, Known, Origin, Rule
from compressor.graph.environment import module_names, plain_attention, undisturbed
from compressor.graph.meta_kernels import SHORTCUTS
from compressor.graph.recording import Form, Mismatch, Script, Step
from compressor.graph.rules import DATA_DEPENDENT, IGNORED, RULES, is_steady
from compressor.graph.rules.pointwise import filled
from compressor.graph.sizes import named_tensors_of, whole_numbers

_CONSTANT_NUMEL = 1 << 20
_COMPARED_NUMEL = 64


class Call(NamedTuple):
    """One call of an operation: its plain arguments, its tensors, where they came from, and their axes."""

    func: Any
    name: str
    plain: tuple[Any, ...]
    inputs: list[Tensor]
    origins: tuple[Origin, ...]
    taken: tuple[Axes, ...]


@dataclass(eq=False)
class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs a model once, on tensors without data where `script.meta` says so, and notes everything in flow and script.

    Attributes:
        model: the model, whose parameters and buffers are known by name.
        flow: the notebook that the rules write.
        script: the trail that grows.
        tensors: the model's parameters and buffers by name, each once.
    """

    model: nn.Module
    flow: Flow
    script: Script
    tensors: dict[str, Tensor] = field(init=False)
    _modules: dict[str, nn.Module] = field(init=False)
    _owned: Mapping[int, str] = field(init=False)
    _twins: dict[int, Tensor] = field(default_factory=dict)
    _originals: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Let the dispatch mode set itself up."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._modules = dict(self.model.named_modules())
        self.tensors = named_tensors_of(self._modules)
        self._owned = {id(tensor): name for name, tensor in self.tensors.items()}
        self.flow.says = _Sayings(self._modules, self.flow)

    def run(self, example_inputs: Any) -> None:
        """Run the model; what it returns is frozen as its output."""
        args, kwargs = as_arguments(tree_map(self._input, example_inputs))
        modules = self._modules
        with undisturbed(self.model, modules), plain_attention(modules), module_names(modules, self.flow), self:
            result = self.model(*args, **kwargs)
        self.flow.op = self.flow.module = ""
        for tensor in _tensors_in(result):
            self.flow.freeze(self.flow.axes(tensor), "model output")

    def _input(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        origin = ("input", len(self.flow.origins))
        return self._symbol(value, Known(tuple(blank(size) for size in value.shape)), origin)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        name, rule = _rule_of(func)
        tensors, plain = leaves((args, kwargs))
        if rule is filled and args and isinstance(args[0], list) and 0 in args[0]:
            return func(*args, **kwargs)  # nothing is in it; every BatchNorm makes one
        if rule is not filled and not any(self._is_symbol(tensor, func) for tensor in tensors):
            return self._constant(func, args, kwargs, bool(tensors))
        if rule is None and name not in IGNORED:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        inputs = [tensor if self.flow.takes_part(tensor) else self._stand_in(tensor) for tensor in tensors]
        if any(map(operator.is_not, inputs, tensors)) or any(isinstance(value, torch.device) for value in plain):
            args, kwargs = self._with_stand_ins(args), self._with_stand_ins(kwargs)
        out = self._execute(name, func, args, kwargs)
        self._apply(self._call(func, name, inputs, plain), rule, args, kwargs, out)
        return out

    def _call(self, func: Any, name: str, inputs: list[Tensor], plain: list[Any]) -> Call:
        origins = tuple(self.flow.origins.get(id(tensor)) or self._origin(tensor) for tensor in inputs)
        taken = tuple(self.flow.axes(tensor) for tensor in inputs)
        return Call(func, name, comparable(name, plain, inputs), inputs, origins, taken)

    def _execute(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        shortcut = SHORTCUTS.get(name) if self.script.meta else None
        out = shortcut(*args, **kwargs) if shortcut else NotImplemented
        if out is NotImplemented:
            return func(*args, **kwargs)
        return args[0] if func._schema.is_mutable else out

    # -- which tensors have no data

    def _is_symbol(self, tensor: Tensor, func: Any) -> bool:
        mutable = id(tensor) in self._owned and func._schema.is_mutable
        return self.flow.takes_part(tensor) or (id(tensor) in self._owned and tensor.is_floating_point()) or mutable

    def _with_stand_ins(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if self.flow.takes_part(value) else self._stand_in(value)
        if isinstance(value, list | tuple):
            return type(value)(self._with_stand_ins(each) for each in value)
        if isinstance(value, dict):
            return {key: self._with_stand_ins(each) for key, each in value.items()}
        return torch.device("meta") if isinstance(value, torch.device) and self.script.meta else value

    def _stand_in(self, value: Tensor) -> Tensor:
        if id(value) in self._twins:
            return self._twins[id(value)]
        name = self._owned.get(id(value))
        twin = self._symbol(value, None if name else self.flow.known(value), self._origin(value))
        if name:
            self.flow.enter(twin, name, value.shape)
            self.flow.keep_numbers(twin, value)
        self._twins[id(value)] = twin
        self._originals.append(value)
        return twin

    def _origin(self, tensor: Tensor) -> Origin:
        """Give where a tensor comes from that no operation of the trail made; of a small constant, also its values."""
        name = self._owned.get(id(tensor))
        if name:
            return ("tensor", name)
        small = tensor.numel() <= _COMPARED_NUMEL and not tensor.is_meta
        return ("constant", tuple(tensor.shape), str(tensor.tolist()) if small else None)

    def _symbol(self, tensor: Tensor, known: Known | None, origin: Origin) -> Tensor:
        """Give the tensor that takes part in the run for this one."""
        twin = tensor.detach()
        if self.script.meta:
            twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        self.flow.origins[id(twin)] = origin
        self.flow.know(twin, known or self.flow.known(twin))
        return twin

    def _constant(self, func: Any, args: Any, kwargs: dict[str, Any], from_tensors: bool) -> Any:
        """Run an operation on constants alone; large or random results lose their data."""
        if not self.script.meta or from_tensors:
            return func(*args, **kwargs)
        shape = func(*args, **{**kwargs, "device": torch.device("meta")}) if "device" in kwargs else None
        if isinstance(shape, Tensor) and shape.numel() > _CONSTANT_NUMEL:
            return self._symbol(shape, None, self._origin(shape))
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **kwargs)

    # -- rules

    def _apply(self, call: Call, rule: Rule | None, args: Any, kwargs: Any, out: Any) -> None:
        flow, name, inputs = self.flow, call.name, call.inputs
        flow.op = name
        flow.use(inputs)
        results = leaves(out)[0]
        handed_out = len(flow.labels.journal)
        axes, understood = self._axes(rule, args, kwargs, out, results, inputs)
        weights = [flow.weight(tensor) for tensor in inputs]
        weight = weights[0] if weights and all(weights) else None
        made_by = flow.weight(inputs[1]) if name == "aten.convolution" else None
        for tensor, each in zip(results, axes, strict=True):
            flow.know(tensor, Known(each, weight, made_by))
        if name not in IGNORED:
            number = self._record(call, axes, results, understood and len(flow.labels.journal) == handed_out)
            flow.origins.update({id(tensor): ("step", number, index) for index, tensor in enumerate(results)})

    def _record(self, call: Call, axes: list[Axes], results: list[Tensor], plain: bool) -> int:
        """Write a step into the script and give its number; `plain` where its rule only handed on what it got."""
        script = self.script
        forms = tuple(_form(script, each, tensor) for each, tensor in zip(axes, results, strict=True))
        sure = all(map(_is_sure, forms)) and all(map(_is_sized, call.taken, call.inputs))
        step = Step(
            func=call.func,
            op=call.name,
            module=self.flow.module,
            plain=call.plain,
            inputs=call.origins,
            taken=tuple(script.slots(each) for each in call.taken),
            results=forms,
            written=bool(results) and bool(call.inputs) and results[0] is call.inputs[0],
            steady=script.meta and plain and sure and is_steady(call.name, call.plain),
        )
        if script.loose_from is None and _depends_on_data(call):
            script.loose_from = len(script.steps)
        script.steps.append(step)
        return len(script.steps) - 1

    def _axes(
        self, rule: Rule | None, args: Any, kwargs: Any, out: Any, results: list[Tensor], inputs: list[Tensor]
    ) -> tuple[list[Axes], bool]:
        """Apply the rule; where there is none, or it does not fit, nothing that reaches the operation can be cut."""
        why = "no axis rule for this operation"
        try:
            found = rule(self.flow, out, *args, **kwargs) if rule else None
            axes = [found] if isinstance(found, tuple) else found
            if axes is not None and _fits(axes, results):
                return axes, True
        except Mismatch:
            raise
        except Exception as failure:
            why = f"its axis rule failed ({type(failure).__name__}: {failure})"
        for tensor in inputs:
            self.flow.freeze(self.flow.axes(tensor), f"{why}, input shape {tuple(tensor.shape)}")
        return [tuple(blank(size) for size in tensor.shape) for tensor in results], False


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


def _depends_on_data(call: Call) -> bool:
    masked = call.name == "aten.index" and any(index.dtype in (torch.bool, torch.uint8) for index in call.inputs[1:])
    return masked or call.name in DATA_DEPENDENT


def _form(script: Script, axes: Axes, tensor: Tensor) -> Form:
    return Form(script.slots(axes), tuple(tensor.shape), tensor.dtype, _memory_order(tensor))


def _is_sure(form: Form) -> bool:
    """Tell whether the memory of a result follows from its axes."""
    return form.order is not None and all(
        size == 1 or slot is not FREE for slot, size in zip(form.slots, form.shape, strict=True)
    )


def _is_sized(axes: Axes, tensor: Tensor) -> bool:
    """Tell whether the size of every dimension follows from its axis; an expanded one can have any."""
    return all(size == 1 or axis is not FREE for axis, size in zip(axes, tensor.shape, strict=True))


def _memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Give the dimensions from the slowest to the fastest in memory, or None where there are gaps or overlaps."""
    if tensor.is_contiguous():
        return tuple(range(tensor.dim()))
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda dim: -strides[dim]))
    expected = 1
    for dim in reversed(order):
        if tensor.shape[dim] != 1 and strides[dim] != expected:
            return None
        expected *= tensor.shape[dim]
    return order


def comparable(name: str, plain: list[Any], tensors: list[Tensor]) -> tuple[Any, ...]:
    """Give an operation's plain arguments as they stay when channels go: a block for every channel is not a number."""
    if name == "aten.convolution" and plain[-1] == tensors[0].shape[1] > 1:
        return (*plain[:-1], "channels")
    return tuple(plain)


def leaves(value: Any) -> tuple[list[Tensor], list[Any]]:
    """Give the tensors among an operation's arguments or results, and everything else, each in order."""
    tensors: list[Tensor] = []
    plain: list[Any] = []
    _collect(value, tensors, plain)
    return tensors, plain


def _collect(value: Any, tensors: list[Tensor], plain: list[Any]) -> None:
    if isinstance(value, Tensor):
        tensors.append(value)
    elif isinstance(value, list | tuple):
        for each in value:
            _collect(each, tensors, plain)
    elif isinstance(value, dict):
        for key, each in value.items():
            plain.append(key)
            _collect(each, tensors, plain)
    else:
        plain.append(value)


class _Sayings:
    """Tells whether the running module has an attribute of this value: then a size in its code may follow a cut."""

    def __init__(self, modules: Mapping[str, nn.Module], flow: Flow) -> None:
        self._modules, self._flow = modules, flow
        self._values: dict[str, set[int]] = {}

    def __call__(self, value: int) -> bool:
        name = self._flow.module
        if name not in self._values:
            self._values[name] = whole_numbers(self._modules[name])
        return value in self._values[name]


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Give every tensor in a model's result, whatever container or object holds it."""
    for leaf in tree_flatten(value)[0]:
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):
            yield from _tensors_in(dict(vars(leaf)))
